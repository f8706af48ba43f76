"""The edits of one row, made ready once: what each does to its latent, and what its condition reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits.edit import AfterText, AnyOf, Condition, Edit, InvalidEdit, Where
from sae_runtime.edits.positions import TextFollower, TokenBytes, offsets_covered, settled_from
from sae_runtime.model.sites import Site


@dataclass(frozen=True, eq=False)
class Leaf:
    """One threshold of a condition: it holds on a token where sign * z > sign * threshold, or >= for sign -1."""

    dictionary: Dictionary
    feature: int
    threshold: float
    sign: Literal[1, -1]  # 1: above, -1: at most
    site: Site


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition as a tree: a leaf, or inner gates of which `need` must hold."""

    leaf: Leaf | None = None
    inner: tuple[Gate, ...] = ()
    need: int = 1


@dataclass(frozen=True, eq=False)
class CompiledEdit:
    """One edit as z' = clamp(scale * z + shift, minimum, maximum) of one latent, or a replacement."""

    edit: Edit
    dictionary: Dictionary
    site: Site
    scale: float = 1.0
    shift: float = 0.0
    minimum: float = -math.inf
    maximum: float = math.inf
    values: NDArray[np.float64] | None = None  # instead of shift: one a position
    gate: Gate | None = None

    @property
    def replaces(self) -> bool:
        return self.edit.operation == "replace"


class CompiledEdits(Sequence[Edit]):
    """The edits of one row, to be made once when it arrives and used for every plan that it is part of.

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

        token_bytes: needed by edits after a text, as is `RowEdits.tokens` then. max_relative_change: planned forwards
        raise EditOutOfRange where edits add more than this times the size of a token's activation (Euclidean norms).
        InvalidEdit: a resample edit that has not been resolved, a text without token_bytes.
        """
        self._edits = tuple(edits)
        self._token_bytes = token_bytes
        self.prompt_length = prompt_length
        self.max_relative_change = max_relative_change
        self.parts = tuple(_compile(edit, dictionaries, index) for index, edit in enumerate(self._edits))
        texts = {edit.positions for edit in self._edits if isinstance(edit.positions, AfterText)}
        if texts and token_bytes is None:
            raise InvalidEdit("positions", "after a text, but the bytes of tokens are not known here")
        self._settled = [settled_from(edit.positions, prompt_length) for edit in self._edits]
        self._new_followers()

    def _new_followers(self) -> None:
        texts = {edit.positions for edit in self._edits if isinstance(edit.positions, AfterText)}
        self._followers = {rule: TextFollower(rule, self._token_bytes) for rule in texts} if self._token_bytes else {}

    def for_another_row(self) -> CompiledEdits:
        """The same edits for a row that begins with the same prompt and goes on otherwise."""
        other = object.__new__(CompiledEdits)
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
        settled = [at for at in self._settled if at is not None]
        unsteady = len(settled) < len(self._settled) or any(part.values is not None for part in self.parts)
        return None if unsteady else max(settled, default=0)

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
        for index, part in enumerate(self.parts):
            if len(self.offsets(part, position, 1, tokens)):
                key |= 1 << index
                if part.values is not None:
                    key |= (position + 1) << len(self.parts)
        return key

    def offsets(
        self, part: CompiledEdit, past: int, length: int, tokens: Sequence[int] | None
    ) -> NDArray[np.int64] | Sequence[int]:
        """Offsets, among the row's tokens at past <= p < past + length, that one of the edits covers."""
        positions = part.edit.positions
        offsets: NDArray[np.int64] | Sequence[int]
        if isinstance(positions, AfterText):
            if tokens is None:
                raise ValueError("edits after a text need the tokens of the row")
            offsets = self._followers[positions].covered(tokens, past, past + length).nonzero()[0]
        else:
            offsets = offsets_covered(positions, past, length, self.prompt_length)
        if part.values is not None:
            return [int(offset) for offset in offsets if past + offset < len(part.values)]
        return offsets


def _compile(edit: Edit, dictionaries: Mapping[str, Dictionary], index: int) -> CompiledEdit:
    dictionary = dictionaries[edit.dictionary]
    if dictionary.site is None:
        raise InvalidEdit("dictionary", f"{edit.dictionary!r} does not say which site it reads", index)
    statistics = dictionary.statistics
    unit = 1.0
    if edit.unit == "max":
        assert statistics is not None, "check_edits refuses this"
        unit = float(statistics.max[edit.feature])
    scale, shift, minimum, maximum = 1.0, 0.0, -math.inf, math.inf
    values = None
    match edit.operation:
        case "set":
            scale, shift = 0.0, edit.value * unit
            values = None if edit.values is None else np.array(edit.values) * unit
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
    gate = None if edit.condition is None else _gate(edit.condition, edit.dictionary, dictionaries)
    site = Site.parse(dictionary.site)
    return CompiledEdit(edit, dictionary, site, scale, shift, minimum, maximum, values, gate)


def _gate(where: Where, own: str, dictionaries: Mapping[str, Dictionary]) -> Gate:
    if isinstance(where, Condition):
        dictionary = dictionaries[own if where.dictionary is None else where.dictionary]
        threshold = where.threshold
        if where.unit == "max":
            assert dictionary.statistics is not None, "check_edits refuses this"
            threshold *= float(dictionary.statistics.max[where.feature])
        site = Site.parse(dictionary.site or "")
        return Gate(Leaf(dictionary, where.feature, threshold, 1 if where.comparison == "above" else -1, site))
    inner = tuple(_gate(each, own, dictionaries) for each in where.conditions)
    return Gate(None, inner, 1 if isinstance(where, AnyOf) else len(inner))
