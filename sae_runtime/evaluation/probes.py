"""Probe losses: how well the best single latent answers a binary question about text it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.evaluation.logistic_probes import SparseExamples, fit_probes, probe_loss
from sae_runtime.evaluation.probe_tasks import Task
from sae_runtime.progress import ProgressMeter

Integers = npt.NDArray[np.int64]


class ExampleBuilder:
    """Averages features (or dense rows) over the tokens of each example, batch by batch, kept sparse.

    Every example's tokens must lie in one batch.
    """

    def __init__(self, n_examples: int, n_columns: int, tokens_per_example: int) -> None:
        self._shape = n_examples, n_columns
        self._weight = 1.0 / tokens_per_example
        self._keys: list[Integers] = []
        self._values: list[npt.NDArray[np.float64]] = []

    def add(self, features: SparseFeatures, example: Tensor) -> None:
        """example: int64 [n], the example of each row of the features; -1 for none."""
        listed = (features.indices >= 0) & (example[:, None] >= 0)
        keys = (example[:, None] * self._shape[1] + features.indices)[listed].cpu().numpy()
        values = features.values[listed].double().cpu().numpy() * self._weight
        keys, group = np.unique(keys, return_inverse=True)
        self._keys.append(keys)
        self._values.append(np.bincount(group, values, minlength=len(keys)).astype(np.float64))

    def add_dense(self, x: Tensor, example: Tensor) -> None:
        """The same for rows x [n, n_columns] of few columns."""
        kept = example >= 0
        rows = torch.arange(x.shape[1], device=x.device).expand(int(kept.sum()), -1)
        self.add(SparseFeatures(rows, x[kept], x.shape[1]), example[kept])

    def build(self) -> SparseExamples:
        """All examples so far; one without an active latent is a row of zeros."""
        keys = np.concatenate(self._keys) if self._keys else np.zeros(0, np.int64)
        values = np.concatenate(self._values) if self._values else np.zeros(0)
        return SparseExamples(keys // self._shape[1], keys % self._shape[1], values, *self._shape)


@dataclass(frozen=True)
class BestProbe:
    """The column whose probe fits best, and its loss and accuracy on the other split."""

    column: int
    fit_loss: float
    loss: float
    """Nats on the split not used for fitting; ln 2 is chance, as the classes are balanced."""
    accuracy: float


def best_probe(examples: SparseExamples, task: Task) -> BestProbe:
    """Fits every column, chooses by the loss on the `fit` split (the first of equals), scores on the other."""
    probes = fit_probes(examples[task.fit], task.fit_labels)
    best = int(np.argmin(probes.loss))
    values = examples.of_column(best)[task.score]
    loss, accuracy = probe_loss(values, task.score_labels, float(probes.weight[best]), float(probes.bias[best]))
    return BestProbe(best, float(probes.loss[best]), loss, accuracy)


def probe_figures(
    tasks: Sequence[Task], examples: dict[str, dict[str, SparseExamples]], progress: ProgressMeter | None = None
) -> dict[str, Any]:
    """`probe_<task>_...` for every task, and means over tasks.

    examples: by source ("latent", "neuron", "random_latent"), then by the level of the task ("chunk", "token").
    """
    figures: dict[str, Any] = {}
    losses: dict[str, list[float]] = {source: [] for source in examples}
    for number, task in enumerate(tasks, 1):
        probes = {source: best_probe(of_level[task.level], task) for source, of_level in examples.items()}
        best = probes["latent"]
        figures |= {
            f"probe_{task.name}_latent": best.column,
            f"probe_{task.name}_loss": best.loss,
            f"probe_{task.name}_accuracy": best.accuracy,
            f"probe_{task.name}_fit_loss": best.fit_loss,
            f"probe_{task.name}_n_examples": len(task.score),
            **{
                f"probe_{task.name}_{source}_loss": probe.loss for source, probe in probes.items() if source != "latent"
            },
        }
        for source, probe in probes.items():
            losses[source].append(probe.loss)
        if progress is not None:
            progress.reach(number)
    if tasks:
        figures |= {
            "probe_tasks": [task.name for task in tasks],
            "probe_loss_mean": float(np.mean(losses["latent"])),
            **{
                f"probe_{source}_loss_mean": float(np.mean(of_tasks))
                for source, of_tasks in losses.items()
                if source != "latent"
            },
        }
    return figures
