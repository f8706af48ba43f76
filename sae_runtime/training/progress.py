"""What a training run reports while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Literal

from sae_runtime.model.sites import Site
from sae_runtime.training.trainers.trainer import StepMetrics

Stage = Literal["prepare", "train", "statistics", "evaluate", "publish"]


@dataclass(frozen=True)
class TrainingProgress:
    """A moment of a run. Training figures are averages since the previous event; None outside the training stage."""

    stage: Stage
    tokens: int
    """Tokens done in this stage."""
    total_tokens: int
    """Tokens of this stage."""
    tokens_per_second: float
    """Since the previous event of this stage, backbone included."""
    nmse: float | None = None
    l0: float | None = None
    dead_fraction: float | None = None
    loss: float | None = None


ProgressCallback = Callable[[TrainingProgress], None]


class ProgressMeter:
    """Turns steps into events, at most one in `interval` seconds but the first and last of a stage."""

    def __init__(self, callback: ProgressCallback | None, interval: float) -> None:
        self._callback = callback
        self._interval = interval
        self._stage: Stage = "prepare"
        self._total = self._done = 0
        self._metrics: list[StepMetrics] = []
        self._event_at, self._event_done = time.monotonic(), 0

    def begin(self, stage: Stage, total: int, done: int = 0) -> None:
        self._stage, self._total, self._done = stage, total, done
        self._metrics = []
        self._event_at, self._event_done = time.monotonic(), done
        self._emit()

    def advance(self, tokens: int, metrics: StepMetrics | None = None) -> None:
        if metrics is not None:
            self._metrics.append(metrics)
        self.reach(self._done + tokens)

    def reach(self, done: int) -> None:
        """Says how much of the stage is done."""
        self._done = done
        if self._done >= self._total or time.monotonic() - self._event_at >= self._interval:
            self._emit()

    def _emit(self) -> None:
        now = time.monotonic()
        rate = (self._done - self._event_done) / max(now - self._event_at, 1e-9)
        means = {
            name: fmean(getattr(m, name) for m in self._metrics) if self._metrics else None
            for name in ("nmse", "l0", "dead_fraction", "loss")
        }
        event = TrainingProgress(self._stage, self._done, self._total, rate, **means)
        self._metrics = []
        self._event_at, self._event_done = now, self._done
        if self._callback is not None:
            self._callback(event)


def mean_metrics(metrics: Sequence[StepMetrics]) -> StepMetrics:
    """The mean of each figure over the sites of a run."""
    if len(metrics) == 1:
        return metrics[0]
    return StepMetrics(**{field.name: fmean(getattr(m, field.name) for m in metrics) for field in fields(StepMetrics)})


def figures_by_site(metrics: Mapping[Site, StepMetrics]) -> dict[str, float]:
    """Figures of a step for the run's log: by their names, after "<site>/" where there are several sites."""
    return {
        name if len(metrics) == 1 else f"{site}/{name}": value
        for site, of_site in metrics.items()
        for name, value in vars(of_site).items()
    }
