"""Passes of the backbone over the streams of a text, read on demand or ahead in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.cache import ActivationCache
from sae_runtime.training.activations.streams import Pass, RowStreams


def read_activations(
    backbone: Backbone, sites: Sequence[Site], rows: Sequence[Sequence[int]], *, skip_first: bool = False
) -> dict[Site, Tensor]:
    """[n, width] activations of each site in the backbone's dtype, tokens in reading order, of one forward pass.

    Args:
        rows: token ids, each at most the backbone's context length.
        skip_first: leave out every row's first token (a prepended end-of-text).
    """
    packed = PackedTokens.from_rows(rows).to(backbone.device)
    with torch.no_grad():
        captured = backbone.forward(packed, capture=sites).activations
    if skip_first:
        kept = packed.positions > 0
        return {site: captured[site][kept] for site in sites}
    return {site: captured[site] for site in sites}


class ActivationReader:
    """Reads a stream's next pass when it is asked for."""

    def __init__(
        self,
        backbone: Backbone,
        sites: Sequence[Site],
        streams: RowStreams,
        *,
        skip_first: bool,
        cache: ActivationCache | None = None,
    ) -> None:
        self._backbone = backbone
        self._sites = sites
        self._streams = streams
        self._skip_first = skip_first
        self._cache = cache

    def next_pass(self, stream: int) -> dict[Site, Tensor]:
        """[n, width] activations of each site. After an error the same pass comes next."""
        rows = self._streams.next_pass(stream)
        try:
            return self._read(rows)
        except BaseException:
            self._streams.give_back(stream, rows)
            raise

    def state_of(self, stream: int) -> dict[str, Any]:
        """The state from which the stream continues after the last pass it returned."""
        return self._streams.state_of(stream)

    def load(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        self._streams.load(states)

    def close(self) -> None:
        """Stops background work."""

    def _read(self, rows: Pass) -> dict[Site, Tensor]:
        if self._cache is not None and (cached := self._cache.get(rows)) is not None:
            return cached
        activations = read_activations(self._backbone, self._sites, rows, skip_first=self._skip_first)
        return activations if self._cache is None else self._cache.put(rows, activations)


class ThreadedReader(ActivationReader):
    """Reads ahead in a thread while the caller trains; gives exactly what ActivationReader gives.

    A stream's passes are the same whenever they are read, so the order in which the thread serves the streams is free:
    the stream that the caller waits for first, then the one with the fewest passes ready.
    """

    def __init__(
        self,
        backbone: Backbone,
        sites: Sequence[Site],
        streams: RowStreams,
        *,
        skip_first: bool,
        cache: ActivationCache | None = None,
        names: Sequence[int],
        ahead: int,
    ) -> None:
        """`names`: the streams that are read; `ahead`: passes of each that may be ready at once."""
        super().__init__(backbone, sites, streams, skip_first=skip_first, cache=cache)
        self._ahead = ahead
        # Everything below, and the RowStreams, are touched under the lock only; the backbone runs outside of it.
        self._changed = threading.Condition()
        self._ready: dict[int, deque[tuple[Pass, dict[Site, Tensor]]]] = {name: deque() for name in names}
        self._reading: tuple[int, Pass] | None = None
        self._waiting: int | None = None
        self._error: BaseException | None = None
        self._restarts = 0  # what was begun before a load is dropped
        self._closed = False
        self._thread: threading.Thread | None = None

    def next_pass(self, stream: int) -> dict[Site, Tensor]:
        with self._changed:
            if self._closed:
                raise ValueError("the reader of activations is closed")
            self._waiting = stream
            try:
                while not self._ready[stream]:
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error
                    self._start()
                    self._changed.notify_all()
                    self._changed.wait()
                return self._ready[stream].popleft()[1]
            finally:
                self._waiting = None
                self._changed.notify_all()

    def state_of(self, stream: int) -> dict[str, Any]:
        with self._changed:
            again = [rows for rows, _ in self._ready[stream]]
            if self._reading is not None and self._reading[0] == stream:
                again.append(self._reading[1])
            return self._streams.state_of(stream, again)

    def load(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        with self._changed:
            self._restarts += 1
            for ready in self._ready.values():
                ready.clear()
            self._reading = self._error = None
            self._streams.load(states)
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
                stream = self._choose()
                if self._closed or self._error is not None or stream is None:
                    self._thread = None
                    return
                try:
                    rows = self._streams.next_pass(stream)
                except BaseException as error:
                    self._fail(error)
                    return
                self._reading, restarts = (stream, rows), self._restarts
            try:
                activations = self._read(rows)
            except BaseException as error:
                with self._changed:
                    if restarts == self._restarts:
                        self._streams.give_back(stream, rows)
                        self._fail(error)
                        return
                continue
            with self._changed:
                if restarts == self._restarts:
                    self._reading = None
                    self._ready[stream].append((rows, activations))
                    self._changed.notify_all()

    def _choose(self) -> int | None:
        """The stream to read next, None if enough is ready."""
        if self._waiting is not None and not self._ready[self._waiting]:
            return self._waiting
        stream = min(self._ready, key=lambda name: len(self._ready[name]))
        return stream if len(self._ready[stream]) < self._ahead else None

    def _fail(self, error: BaseException) -> None:
        """Leaves the error for the caller's next pass and ends the thread; the pass after it starts a new one."""
        self._error, self._reading, self._thread = error, None, None
        self._changed.notify_all()
