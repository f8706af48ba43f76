"""Lanes: the rows of the text dealt to a fixed number of streams, so that workers read disjoint parts of one order.

What a lane holds depends on the text and the number of lanes alone, not on how many processes there are or which of
them reads it. N processes that share the lanes therefore see together exactly what one process sees.
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


class RowLanes:
    """Deals rows to `n_lanes` lanes and gives out those of `mine`, a pass of the backbone at a time.

    The next row goes to the lane with the fewest tokens in this epoch. A pass never holds rows of two epochs, so every
    epoch has the same passes. Rows of a lane that are not yet asked for are kept as token ids.
    """

    def __init__(
        self, rows: RowSource, *, n_lanes: int, mine: Sequence[int], rows_per_pass: int, skip_first: bool
    ) -> None:
        """`skip_first`: a row's first token is not trained on, so it does not count."""
        self._rows = rows
        self._rows_per_pass = rows_per_pass
        self._uncounted = int(skip_first)
        self._dealt = [0] * n_lanes  # tokens given to each lane in this epoch
        self._read = 0  # rows read from the source
        self._epoch = 0
        self._again: dict[int, deque[Pass]] = {lane: deque() for lane in mine}  # passes to be given once more
        self._pending: dict[int, deque[tuple[int, list[int]]]] = {lane: deque() for lane in mine}  # (epoch, row)
        self._known = dict.fromkeys(mine, 0)  # rows read that a lane's restored state holds already

    def next_pass(self, lane: int) -> Pass:
        """The next rows of a lane: rows_per_pass of them, fewer at an epoch's end, at least one.

        Raises:
            ValueError: there is no text.
        """
        if self._again[lane]:
            return self._again[lane].popleft()
        pending = self._pending[lane]
        while True:
            if pending:
                epoch = pending[0][0]
                one = pending[-1][0] == epoch
                same = len(pending) if one else sum(1 for other, _ in pending if other == epoch)
                # The epoch is over for every lane once a row of the next was dealt to any.
                if same >= self._rows_per_pass or self._epoch > epoch:
                    return [pending.popleft()[1] for _ in range(min(same, self._rows_per_pass))]
            self._deal()

    def give_back(self, lane: int, rows: Pass) -> None:
        """Takes back the pass that was given last, so that it comes next again."""
        self._again[lane].appendleft(rows)

    def _deal(self) -> None:
        row = next(self._rows)
        if self._rows.epoch != self._epoch:
            self._epoch = self._rows.epoch
            # With fewer rows in an epoch than lanes, the lanes that had none are served first in the next.
            if min(self._dealt) > 0:
                self._dealt = [0] * len(self._dealt)
        lane = self._dealt.index(min(self._dealt))
        self._dealt[lane] += len(row) - self._uncounted
        self._read += 1
        if lane in self._pending and self._read > self._known[lane]:
            self._pending[lane].append((self._epoch, row))

    def state_of(self, lane: int, again: Sequence[Pass] = ()) -> dict[str, Any]:
        """What a lane needs to go on, in any process. `again`: passes taken from it last that are to be given again."""
        return {
            "again": [*again, *self._again[lane]],
            "pending": list(self._pending[lane]),
            "rows": self._rows.state_dict(),
            "dealt": list(self._dealt),
            "read": max(self._read, self._known[lane]),
            "reader_read": self._read,
            "epoch": self._epoch,
        }

    def load(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Goes on from the `state_of` each lane of `mine`, which may come from different processes."""
        # Processes read ahead of each other; from the least far position every lane finds what it lacks.
        reader = min(states.values(), key=lambda state: state["reader_read"])
        self._rows.load_state_dict(reader["rows"])
        self._dealt, self._read, self._epoch = list(reader["dealt"]), reader["reader_read"], reader["epoch"]
        for lane, state in states.items():
            self._again[lane] = deque([list(row) for row in rows] for rows in state["again"])
            self._pending[lane] = deque((epoch, list(row)) for epoch, row in state["pending"])
            self._known[lane] = state["read"]
