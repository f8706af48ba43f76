"""What a long job reports while it goes on: the stage it is in, how far that is, and figures on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

INTERVAL = 0.5
"""Least seconds between two events of a stage."""


@dataclass(frozen=True)
class Progress:
    """A moment of a job."""

    stage: str
    """What is being done: prepare, train, statistics, evaluate, publish; baselines, splice, probes, ..."""
    done: int
    total: int
    unit: str = "tokens"
    """What `done` and `total` count."""
    per_second: float = 0.0
    """Since the previous event of this stage."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Averages since the previous event: nmse, l0, dead_fraction, loss and others while training, else none."""


ProgressCallback = Callable[[Progress], None]


class ProgressMeter:
    """Turns work done into events, at most one in INTERVAL seconds but the first and last of a stage.

    Without a callback it does nothing.
    """

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback
        self.begin("", 0)

    def begin(self, stage: str, total: int, unit: str = "tokens", done: int = 0) -> None:
        """Starts a stage."""
        self._stage, self._total, self._unit, self._done = stage, total, unit, done
        self._figures: list[Mapping[str, float]] = []
        self._event_at, self._event_done = time.monotonic(), done
        if stage:
            self._emit()

    def advance(self, n: int, figures: Mapping[str, float]) -> None:
        """Says that `n` more are done, with figures of them: the same names every time."""
        self._figures.append(figures)
        self.reach(self._done + n)

    def reach(self, done: int) -> None:
        """Says how much of the stage is done; never more than the total."""
        self._done = min(done, self._total)
        if self._done == self._total or time.monotonic() - self._event_at >= INTERVAL:
            self._emit()

    def _emit(self) -> None:
        now = time.monotonic()
        rate = (self._done - self._event_done) / max(now - self._event_at, 1e-9)
        names = self._figures[0] if self._figures else ()
        means = {name: fmean(figures[name] for figures in self._figures) for name in names}
        event = Progress(self._stage, self._done, self._total, self._unit, rate, means)
        self._figures = []
        self._event_at, self._event_done = now, self._done
        if self._callback is not None:
            self._callback(event)
