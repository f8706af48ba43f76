"""What an evaluation reports while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationProgress:
    """A moment of an evaluation."""

    stage: str
    """What is being measured: baselines, features, splice, probes, n2g, ablation, single splice, geometry."""
    done: int
    total: int
    unit: str
    """What `done` and `total` count: tokens, tasks, latents, positions."""


ProgressCallback = Callable[[EvaluationProgress], None]


class StageProgress:
    """Reports one stage to a callback; does nothing without one."""

    def __init__(self, callback: ProgressCallback | None, stage: str, total: int, unit: str) -> None:
        self._callback, self._stage, self._total, self._unit = callback, stage, total, unit
        self.reach(0)

    def reach(self, done: int) -> None:
        """Says how much is done; never more than the total."""
        if self._callback is not None:
            self._callback(EvaluationProgress(self._stage, min(done, self._total), self._total, self._unit))
