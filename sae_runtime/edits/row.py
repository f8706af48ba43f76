"""The edits of one row made ready: what each does to its latent, which tokens it covers, what its condition reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits.edit import AfterText, AnyOf, Condition, Edit, InvalidEdit, Positions, Where
from sae_runtime.model.sites import Site

TokenBytes = Callable[[int], bytes]
"""The bytes that a token id stands for; a ValueError (an id without a token) counts as no bytes."""
Offsets = Sequence[int] | NDArray[np.int64]
"""Tokens of a row in a batch, counted from the row's first one there; ascending."""


@dataclass(frozen=True, eq=False)
class Threshold:
    """A Condition made ready: it holds on a token where sign * z > sign * threshold, or >= for sign -1."""

    dictionary: Dictionary
    site: Site
    latent: int
    threshold: float
    sign: Literal[1, -1]  # 1: above, -1: at most


@dataclass(frozen=True, eq=False)
class Combination:
    """AllOf or AnyOf made ready: it holds where at least `needed` of the inner conditions hold."""

    inner: tuple[ReadyCondition, ...]
    needed: int


ReadyCondition = Threshold | Combination


@dataclass(frozen=True, eq=False)
class ReadyEdit:
    """One edit as z' = min(max(scale * z + shift, minimum), maximum) of one latent, or a replacement."""

    dictionary: Dictionary
    site: Site
    latent: int
    positions: Positions
    replaces: bool
    scale: float = 1.0
    shift: float = 0.0
    minimum: float = -math.inf
    maximum: float = math.inf
    shifts: NDArray[np.float64] | None = None  # instead of shift: one a position
    condition: ReadyCondition | None = None


class RowEdits(Sequence[Edit]):
    """The edits of one row, made when the row arrives and used for every batch that it is part of.

    It is the sequence of its edits. It belongs to one row: where edits follow a text it remembers what it has read, so
    that another row (a second sample of the same request) should have its own, `for_another_row`.
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        dictionaries: Mapping[str, Dictionary],
        prompt_length: int,
        *,
        token_bytes: TokenBytes | None = None,
        max_relative_change: float = math.inf,
    ) -> None:
        """The edits must have passed `check_edits` with the same dictionaries.

        prompt_length: tokens of the row's prompt; a token at this position or later is a generated one. token_bytes:
        needed by edits after a text, as are the row's tokens then. max_relative_change: forwards raise EditOutOfRange
        where edits add more than this times the size of a token's activation (Euclidean norms).
        InvalidEdit: a resample edit that has not been resolved, a text without token_bytes.
        """
        self._edits = tuple(edits)
        self._token_bytes = token_bytes
        self.prompt_length = prompt_length
        self.max_relative_change = max_relative_change
        self.ready = tuple(_make_ready(edit, dictionaries, index) for index, edit in enumerate(self._edits))
        """The edits in their order."""
        self._new_followers()

    def _new_followers(self) -> None:
        rules = {edit.positions for edit in self._edits if isinstance(edit.positions, AfterText)}
        if rules and self._token_bytes is None:
            raise InvalidEdit("positions", "after a text, but the bytes of tokens are not known here")
        self._followers = {rule: TextFollower(rule, self._token_bytes) for rule in rules} if self._token_bytes else {}

    def for_another_row(self) -> RowEdits:
        """The same edits for a row that begins with the same prompt and goes on otherwise."""
        other = object.__new__(RowEdits)
        other.__dict__.update(self.__dict__)
        other._new_followers()
        return other

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Edit]: ...
    def __getitem__(self, index: int | slice) -> Edit | Sequence[Edit]:
        return self._edits[index]

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    @cached_property
    def _settled_from(self) -> int | None:
        """The position from which on every token has the same edits, or None if that is not known."""
        settled = [_settled_from(edit.positions, self.prompt_length) for edit in self.ready]
        if None in settled or any(edit.shifts is not None for edit in self.ready):
            return None
        return max((at for at in settled if at is not None), default=0)

    @cached_property
    def _settled_key(self) -> int:
        return self._key(self._settled_from or 0, ())

    def key_at(self, position: int, tokens: Sequence[int] | None) -> int:
        """A number that tells which edits cover the token at a position: bit i for edit i; 0 if none does.

        Two positions with the same key have the same edits; with edits that hold a value for each position the position
        is part of the key.
        """
        if self._settled_from is not None and position >= self._settled_from:
            return self._settled_key
        return self._key(position, tokens)

    def _key(self, position: int, tokens: Sequence[int] | None) -> int:
        key = 0
        for index, edit in enumerate(self.ready):
            if len(self.offsets(edit, position, 1, tokens)):
                key |= 1 << index
                if edit.shifts is not None:
                    key |= (position + 1) << len(self.ready)
        return key

    def offsets(self, edit: ReadyEdit, past: int, length: int, tokens: Sequence[int] | None) -> Offsets:
        """Which of the row's tokens at past <= position < past + length one of its edits covers."""
        offsets: Offsets
        if isinstance(edit.positions, AfterText):
            if tokens is None:
                raise ValueError("edits after a text need the tokens of the row")
            offsets = self._followers[edit.positions].covered(tokens, past, past + length).nonzero()[0]
        else:
            offsets = _offsets_covered(edit.positions, past, length, self.prompt_length)
        if edit.shifts is not None:
            return [int(offset) for offset in offsets if past + offset < len(edit.shifts)]
        return offsets


def _make_ready(edit: Edit, dictionaries: Mapping[str, Dictionary], index: int) -> ReadyEdit:
    dictionary = dictionaries[edit.dictionary]
    statistics = dictionary.statistics
    unit = 1.0
    if edit.unit == "max":
        assert statistics is not None, "check_edits refuses this"
        unit = float(statistics.max[edit.feature])
    scale, shift, minimum, maximum = 1.0, 0.0, -math.inf, math.inf
    shifts = None
    match edit.operation:
        case "set":
            scale, shift = 0.0, edit.value * unit
            shifts = None if edit.values is None else np.array(edit.values) * unit
        case "add":
            shift = edit.value * unit
        case "scale":
            scale = edit.value
        case "clamp":
            minimum = -math.inf if edit.minimum is None else edit.minimum * unit
            maximum = math.inf if edit.maximum is None else edit.maximum * unit
        case "ablate_zero":
            scale = 0.0
        case "ablate_mean":
            assert statistics is not None, "check_edits refuses this"
            scale, shift = 0.0, float(statistics.mean[edit.feature])
        case "resample":
            raise InvalidEdit("reference", "has not been run; see resolve_references", index)
        case "replace":
            pass
    condition = None if edit.condition is None else _ready_condition(edit.condition, edit.dictionary, dictionaries)
    site, replaces = dictionary.require_site(), edit.operation == "replace"
    return ReadyEdit(
        dictionary, site, edit.feature, edit.positions, replaces, scale, shift, minimum, maximum, shifts, condition
    )


def _ready_condition(where: Where, edited: str, dictionaries: Mapping[str, Dictionary]) -> ReadyCondition:
    """`edited`: the name of the edit's dictionary, which conditions read if they name no other."""
    if isinstance(where, Condition):
        dictionary = dictionaries[edited if where.dictionary is None else where.dictionary]
        threshold = where.threshold
        if where.unit == "max":
            assert dictionary.statistics is not None, "check_edits refuses this"
            threshold *= float(dictionary.statistics.max[where.feature])
        sign: Literal[1, -1] = 1 if where.comparison == "above" else -1
        return Threshold(dictionary, dictionary.require_site(), where.feature, threshold, sign)
    inner = tuple(_ready_condition(condition, edited, dictionaries) for condition in where.conditions)
    return Combination(inner, 1 if isinstance(where, AnyOf) else len(inner))


# Positions


class TextFollower:
    """The tokens of one row that follow a text (see AfterText), found as the row grows.

    Whether a token is covered depends on the tokens before it alone, so that decoding step by step, in chunks and all
    at once give the same. Each token is looked at once; a row that turns out to be another one starts afresh.
    """

    def __init__(self, rule: AfterText, token_bytes: TokenBytes) -> None:
        self._rule = rule
        self._pattern = rule.text.encode(errors="surrogatepass")
        self._token_bytes = token_bytes
        self._restart()

    def _restart(self) -> None:
        self._seen: list[int] = []
        self._covered = np.zeros(64, bool)
        self._tail = b""  # the end of the row's bytes, shorter than the pattern
        self._open = 0  # tokens that are covered from here on
        self._occurred = False

    def covered(self, tokens: Sequence[int], start: int, stop: int) -> NDArray[np.bool_]:
        """bool [stop - start]: whether the tokens at positions start <= p < stop of the row `tokens` are covered."""
        if len(tokens) < stop:
            raise ValueError(f"a row of {len(tokens)} tokens is to be edited up to position {stop}")
        n = min(len(self._seen), stop)
        if self._seen[:n] != list(tokens[:n]):
            self._restart()
        for token in tokens[len(self._seen) : stop]:
            self._push(token)
        return self._covered[start:stop]

    def _push(self, token: int) -> None:
        position = len(self._seen)
        if position == len(self._covered):
            self._covered = np.concatenate([self._covered, np.zeros_like(self._covered)])
        self._covered[position] = self._open > 0
        self._open -= self._open > 0
        self._seen.append(token)
        try:
            window = self._tail + self._token_bytes(token)
        except ValueError:
            return
        # An occurrence in the window ends in this token's bytes: the next token is the first to start at its end.
        if self._pattern in window and not (self._occurred and self._rule.occurrence == "first"):
            self._occurred = True
            self._open = self._rule.max_tokens or 1 << 62
        self._tail = window[max(0, len(window) - len(self._pattern) + 1) :]


def _offsets_covered(positions: Positions, past: int, length: int, prompt_length: int) -> Offsets:
    """Offsets among `length` tokens from position `past` on that the rule covers; not for AfterText."""
    if isinstance(positions, tuple):
        return [p - past for p in sorted(set(positions)) if past <= p < past + length]
    boundary = min(max(prompt_length - past, 0), length)  # first generated token in the batch
    match positions:
        case "prompt":
            return range(boundary)
        case "generated":
            return range(boundary, length)
        case "last":
            last = prompt_length - 1 - past
            return range(last, last + 1) if 0 <= last < length else range(0)
        case _:
            return range(length)


def _settled_from(positions: Positions, prompt_length: int) -> int | None:
    """The position from which on coverage no longer changes; None where it depends on the row's text."""
    if isinstance(positions, AfterText):
        return None
    if isinstance(positions, tuple):
        return max(positions) + 1
    return 0 if positions == "all" else prompt_length
