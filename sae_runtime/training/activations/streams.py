"""The rows of a text dealt to a fixed number of streams, so that workers read disjoint parts of one order.

What a stream holds depends on the text and the number of streams alone, not on how many processes there are or which
of them reads it. N processes that share the streams therefore see together exactly what one process sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Pass = list[list[int]]
"""Rows of token ids that go through the backbone together."""


class RowSource(Protocol):
    """Endless rows of token ids, epoch after epoch, whose position can be saved and restored exactly."""

    @property
    def epoch(self) -> int:
        """Epoch of the row given last, from 0."""

    def __next__(self) -> list[int]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class RowStreams:
    """Deals rows to `n_streams` streams and gives out those of `mine`, a pass of the backbone at a time.

    The next row goes to the stream with the fewest tokens in this epoch. A pass never holds rows of two epochs, so
    every epoch has the same passes. Rows of a stream that are not yet asked for are kept as token ids.
    """

    def __init__(
        self, rows: RowSource, *, n_streams: int, mine: Sequence[int], rows_per_pass: int, skip_first: bool
    ) -> None:
        """`skip_first`: a row's first token is not trained on, so it does not count."""
        self._rows = rows
        self._rows_per_pass = rows_per_pass
        self._uncounted = int(skip_first)
        self._dealt = [0] * n_streams  # tokens given to each stream in this epoch
        self._read = 0  # rows read from the source
        self._epoch = 0
        self._again: dict[int, deque[Pass]] = {stream: deque() for stream in mine}  # passes to return again
        self._pending: dict[int, deque[tuple[int, list[int]]]] = {stream: deque() for stream in mine}  # (epoch, row)
        self._known = dict.fromkeys(mine, 0)  # rows read that a stream's restored state holds already

    def next_pass(self, stream: int) -> Pass:
        """The next rows of a stream: rows_per_pass of them, fewer at an epoch's end, at least one.

        Raises:
            ValueError: there is no text.
        """
        if self._again[stream]:
            return self._again[stream].popleft()
        pending = self._pending[stream]
        while True:
            if pending:
                epoch = pending[0][0]
                one = pending[-1][0] == epoch
                same = len(pending) if one else sum(1 for other, _ in pending if other == epoch)
                # The epoch is over for every stream once a row of the next was dealt to any.
                if same >= self._rows_per_pass or self._epoch > epoch:
                    return [pending.popleft()[1] for _ in range(min(same, self._rows_per_pass))]
            self._deal()

    def give_back(self, stream: int, rows: Pass) -> None:
        """Takes back the pass that was given last, so that it comes next again."""
        self._again[stream].appendleft(rows)

    def _deal(self) -> None:
        row = next(self._rows)
        if self._rows.epoch != self._epoch:
            self._epoch = self._rows.epoch
            # With fewer rows in an epoch than streams, the streams that had none are served first in the next.
            if min(self._dealt) > 0:
                self._dealt = [0] * len(self._dealt)
        stream = self._dealt.index(min(self._dealt))
        self._dealt[stream] += len(row) - self._uncounted
        self._read += 1
        if stream in self._pending and self._read > self._known[stream]:
            self._pending[stream].append((self._epoch, row))

    def state_of(self, stream: int, again: Sequence[Pass] = ()) -> dict[str, Any]:
        """The state from which a stream continues, in any process.

        again: the last passes taken from it, which are to be returned again.
        """
        return {
            "again": [*again, *self._again[stream]],
            "pending": list(self._pending[stream]),
            "rows": self._rows.state_dict(),
            "dealt": list(self._dealt),
            "read": max(self._read, self._known[stream]),
            "reader_read": self._read,
            "epoch": self._epoch,
        }

    def load(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Restores the streams of `mine` from their `state_of`, which may come from different processes."""
        # Processes read at different speeds. From the earliest position, every stream reads the rows it lacks.
        reader = min(states.values(), key=lambda state: state["reader_read"])
        self._rows.load_state_dict(reader["rows"])
        self._dealt, self._read, self._epoch = list(reader["dealt"]), reader["reader_read"], reader["epoch"]
        for stream, state in states.items():
            self._again[stream] = deque([list(row) for row in rows] for rows in state["again"])
            self._pending[stream] = deque((epoch, list(row)) for epoch, row in state["pending"])
            self._known[stream] = state["read"]
