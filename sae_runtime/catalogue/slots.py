"""A fixed number of places for each of many rows, which the candidates of highest priority hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

_AT_ONCE = 1 << 16
"""Candidates whose columns are made at once."""


class Slots:
    """n slots for each row, the highest priority first.

    With random priorities (`random_keys`) the slots hold a uniform sample of all candidates, in whatever order and
    number of calls they come. Memory is n_rows x n_slots x (4 + bytes of the columns).
    """

    def __init__(self, n_rows: int, n_slots: int, columns: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        """`columns`: dtype and shape of what a slot holds."""
        self.n_slots = n_slots
        self.priority = np.zeros((n_rows, n_slots), np.float32)
        """[n_rows, n_slots], above 0; 0 in an empty slot."""
        self.columns: dict[str, Array] = {
            name: np.zeros((n_rows, n_slots, *shape), dtype) for name, (dtype, shape) in columns.items()
        }

    def offer(self, rows: Integers, priority: Array, make: Callable[[Integers], Mapping[str, Array]]) -> None:
        """Offers candidates [c]. Of equal priorities the earlier one wins.

        Args:
            rows: [c], the row of each.
            priority: float32 [c].
            make: the columns of chosen candidates, given their indices [m].
        """
        if not self.n_slots:
            return
        chosen = np.flatnonzero(priority > self.priority[rows, -1])
        chosen = chosen[np.lexsort((-priority[chosen], rows[chosen]))]
        rank = np.arange(len(chosen)) - np.searchsorted(rows[chosen], rows[chosen])
        chosen = chosen[rank < self.n_slots]
        # Rows are never cut apart, as a row's candidates must be merged together.
        starts = np.flatnonzero(np.diff(rows[chosen], prepend=-1))
        begin = 0
        while begin < len(chosen):
            after = np.searchsorted(starts, begin + _AT_ONCE)
            end = int(starts[after]) if after < len(starts) else len(chosen)
            self._merge(rows[chosen[begin:end]], priority[chosen[begin:end]], make(chosen[begin:end]))
            begin = end

    def _merge(self, rows: Integers, priority: Array, columns: Mapping[str, Array]) -> None:
        """Puts candidates, which are sorted by row, beside what the rows hold; the first n_slots of both stay."""
        touched, line = np.unique(rows, return_inverse=True)
        place = self.n_slots + np.arange(len(rows)) - np.searchsorted(rows, rows)

        def widened(table: Array, new: Array) -> Array:
            old = table[touched]
            wide = np.concatenate([old, np.zeros_like(old)], axis=1)
            wide[line, place] = new
            return wide

        wide = widened(self.priority, priority)
        keep = np.argsort(-wide, axis=1, kind="stable")[:, : self.n_slots]
        line_of = np.arange(len(touched))[:, None]
        self.priority[touched] = wide[line_of, keep]
        for name, table in self.columns.items():
            table[touched] = widened(table, columns[name])[line_of, keep]

    def state(self) -> dict[str, Array]:
        return {"priority": self.priority, **self.columns}

    def load(self, state: Mapping[str, Array]) -> None:
        self.priority = state["priority"]
        self.columns = {name: state[name] for name in self.columns}
