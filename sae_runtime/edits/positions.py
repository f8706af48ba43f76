"""Which tokens of a row an edit covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sae_runtime.edits.edit import AfterText, Positions

TokenBytes = Callable[[int], bytes]
"""The bytes that a token id stands for; a ValueError (an id without a token) counts as no bytes."""


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
        self._found = False

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
        if self._pattern in window and not (self._found and self._rule.occurrence == "first"):
            self._found = True
            self._open = self._rule.max_tokens or 1 << 62
        self._tail = window[max(0, len(window) - len(self._pattern) + 1) :]


def offsets_covered(positions: Positions, past: int, length: int, prompt_length: int) -> Sequence[int]:
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


def settled_from(positions: Positions, prompt_length: int) -> int | None:
    """The position from which on coverage no longer changes; None where it depends on the row's text."""
    if isinstance(positions, AfterText):
        return None
    if isinstance(positions, tuple):
        return max(positions) + 1
    return 0 if positions == "all" else prompt_length
