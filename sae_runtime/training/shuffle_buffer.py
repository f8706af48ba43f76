"""A bounded, shuffled buffer of activations: neighbours in the text do not meet in the same training batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ShuffleBuffer:
    """Gives out random batches of a stream of rows; half of the buffer is replaced at a time.

    The buffer is filled to `capacity` rows and given out in a random order without replacement. When half of it is
    used, the used rows are overwritten with the next ones of the stream and the whole is shuffled anew, so a row meets
    rows from several buffers' length around it. Memory: capacity × width, allocated once, and one chunk of the stream.
    """

    def __init__(self, stream: Iterator[Tensor], capacity: int, *, seed: int) -> None:
        """`stream` yields [n, width] of any n; it may end, and then the rest is given out."""
        self._stream = stream
        self._capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Tensor | None = None  # [capacity, width]
        self._order = torch.empty(0, dtype=torch.int64)  # rows in the order they are given out
        self._cursor = 0  # entries of _order that were given out
        self._chunk: Tensor | None = None  # rows of the stream that did not fit

    def next_batch(self, size: int) -> Tensor:
        """The next [size, width] rows.

        Raises:
            ValueError: the batch is larger than half the buffer.
            StopIteration: fewer than `size` rows are left in the buffer and the stream.
        """
        if 2 * size > self._capacity:
            raise ValueError(f"a batch of {size} rows needs a buffer of {2 * size}, this one holds {self._capacity}")
        if self._cursor + size > len(self._order) - self._capacity // 2:
            self._refill()
        if self._cursor + size > len(self._order) or self._rows is None:
            raise StopIteration
        chosen = self._order[self._cursor : self._cursor + size]
        self._cursor += size
        return self._rows[chosen]

    def peek(self, size: int) -> Tensor:
        """Up to `size` of the rows that come next, without taking them."""
        if self._rows is None:
            self._refill()
        if self._rows is None:
            raise ValueError("the stream of activations is empty")
        return self._rows[self._order[self._cursor : self._cursor + size]]

    def _refill(self) -> None:
        unused = self._order[self._cursor :]
        free = self._order[: self._cursor] if self._rows is not None else torch.arange(self._capacity)
        filled = 0
        while filled < len(free):
            chunk = self._chunk if self._chunk is not None else next(self._stream, None)
            self._chunk = None
            if chunk is None:
                break
            if self._rows is None:
                self._rows = chunk.new_empty(self._capacity, chunk.shape[1])
            taken = min(len(chunk), len(free) - filled)
            self._rows[free[filled : filled + taken]] = chunk[:taken]
            filled += taken
            if taken < len(chunk):
                self._chunk = chunk[taken:].clone()  # the clone lets go of the rest of the chunk
        kept = torch.cat([unused, free[:filled]])
        self._order = kept[torch.randperm(len(kept), generator=self._generator)]
        self._cursor = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything but the stream's own position."""
        return {
            "rows": self._rows,
            "order": self._order,
            "cursor": self._cursor,
            "chunk": self._chunk,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows, self._order, self._cursor = state["rows"], state["order"], state["cursor"]
        self._chunk = state["chunk"]
        self._generator.set_state(state["generator"])
