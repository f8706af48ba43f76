"""Passes of the backbone over the lanes of a text: one when it is asked for, or a bounded number ahead in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.cache import ActivationCache
from sae_runtime.training.activations.forward import read_activations
from sae_runtime.training.activations.streams import Pass, RowLanes


class ActivationReader:
    """Reads a lane's next pass when it is asked for."""

    def __init__(
        self,
        backbone: Backbone,
        sites: Sequence[Site],
        lanes: RowLanes,
        *,
        skip_first: bool,
        cache: ActivationCache | None = None,
    ) -> None:
        self._backbone = backbone
        self._sites = sites
        self._lanes = lanes
        self._skip_first = skip_first
        self._cache = cache

    def next_pass(self, lane: int) -> dict[Site, Tensor]:
        """[n, width] activations of each site. After an error the same pass comes next."""
        rows = self._lanes.next_pass(lane)
        try:
            return self._read(rows)
        except BaseException:
            self._lanes.give_back(lane, rows)
            raise

    def state_of(self, lane: int) -> dict[str, Any]:
        """What the lane needs to go on after the last pass that was given."""
        return self._lanes.state_of(lane)

    def load(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        self._lanes.load(states)

    def close(self) -> None:
        """Ends what runs in the background."""

    def _read(self, rows: Pass) -> dict[Site, Tensor]:
        if self._cache is not None and (found := self._cache.get(rows)) is not None:
            return found
        activations = read_activations(self._backbone, self._sites, rows, skip_first=self._skip_first)
        return activations if self._cache is None else self._cache.put(rows, activations)


class ThreadedReader(ActivationReader):
    """Reads ahead in a thread while the caller trains; gives exactly what ActivationReader gives.

    A lane's passes are the same whenever they are read, so the order in which the thread serves the lanes is free: the
    lane that the caller waits for first, then the one with the fewest passes ready.
    """

    def __init__(
        self,
        backbone: Backbone,
        sites: Sequence[Site],
        lanes: RowLanes,
        *,
        skip_first: bool,
        cache: ActivationCache | None = None,
        names: Sequence[int],
        ahead: int,
    ) -> None:
        """`names`: the lanes that are read; `ahead`: passes of each that may be ready at once."""
        super().__init__(backbone, sites, lanes, skip_first=skip_first, cache=cache)
        self._ahead = ahead
        # Everything below, and the RowLanes, are touched under the lock only; the backbone runs outside of it.
        self._changed = threading.Condition()
        self._ready: dict[int, deque[tuple[Pass, dict[Site, Tensor]]]] = {name: deque() for name in names}
        self._reading: tuple[int, Pass] | None = None
        self._waiting: int | None = None
        self._error: BaseException | None = None
        self._restarts = 0  # what was begun before a load is dropped
        self._closed = False
        self._thread: threading.Thread | None = None

    def next_pass(self, lane: int) -> dict[Site, Tensor]:
        with self._changed:
            if self._closed:
                raise ValueError("the reader of activations is closed")
            self._waiting = lane
            try:
                while not self._ready[lane]:
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error
                    self._start()
                    self._changed.notify_all()
                    self._changed.wait()
                return self._ready[lane].popleft()[1]
            finally:
                self._waiting = None
                self._changed.notify_all()

    def state_of(self, lane: int) -> dict[str, Any]:
        with self._changed:
            again = [rows for rows, _ in self._ready[lane]]
            if self._reading is not None and self._reading[0] == lane:
                again.append(self._reading[1])
            return self._lanes.state_of(lane, again)

    def load(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        with self._changed:
            self._restarts += 1
            for ready in self._ready.values():
                ready.clear()
            self._reading = self._error = None
            self._lanes.load(states)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            # daemon: a caller that was ended without `close` must not wait for it
            self._thread = threading.Thread(target=self._work, name="activations", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._error is None and self._choose() is None:
                    self._changed.wait()
                lane = self._choose()
                if self._closed or self._error is not None or lane is None:
                    self._thread = None
                    return
                try:
                    rows = self._lanes.next_pass(lane)
                except BaseException as error:
                    self._fail(error)
                    return
                self._reading, restarts = (lane, rows), self._restarts
            try:
                activations = self._read(rows)
            except BaseException as error:
                with self._changed:
                    if restarts == self._restarts:
                        self._lanes.give_back(lane, rows)
                        self._fail(error)
                        return
                continue
            with self._changed:
                if restarts == self._restarts:
                    self._reading = None
                    self._ready[lane].append((rows, activations))
                    self._changed.notify_all()

    def _choose(self) -> int | None:
        """The lane to read next, None if enough is ready."""
        if self._waiting is not None and not self._ready[self._waiting]:
            return self._waiting
        lane = min(self._ready, key=lambda name: len(self._ready[name]))
        return lane if len(self._ready[lane]) < self._ahead else None

    def _fail(self, error: BaseException) -> None:
        """Leaves the error for the caller's next pass and ends the thread; the pass after it starts a new one."""
        self._error, self._reading, self._thread = error, None, None
        self._changed.notify_all()
