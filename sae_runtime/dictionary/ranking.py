"""Orders of features: by activation, by surprise, by z-score.

With raw activations the top of every list is taken by latents that fire nearly everywhere. The other orders set an
activation z against what the dictionary's statistics say of its latent (rate, mean and deviation over all tokens):

    activation    z
    surprise      z * -log10(rate)
    z_score       (z - mean) / deviation

All three are lines in z, so that one table of two numbers a latent ranks any features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # it needs torch, which clients do without
    from sae_runtime.dictionary.statistics import LatentStatistics

Ranking = Literal["activation", "surprise", "z_score"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)

LEAST_FIRINGS = 10
"""A latent that fired less often while statistics were taken counts as one that fired so often: a rate that rests on
two tokens would win every list."""


@dataclass(frozen=True, eq=False)
class RankingTable:
    """score = scale[latent] * activation + shift[latent]; float32 [n_latents] each."""

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]

    def scores(self, latents: NDArray[np.integer], activations: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores of activations of latents, of any one shape."""
        scores: NDArray[np.float32] = self.scale[latents] * activations + self.shift[latents]
        return scores


@lru_cache(maxsize=64)
def ranking_table(statistics: LatentStatistics | None, ranking: Ranking) -> RankingTable:
    """The table of an order, from a dictionary's statistics. ValueError: it has none."""
    if statistics is None:
        raise ValueError(f"ranking by {ranking} needs statistics, which the dictionary lacks")
    rate = statistics.firing_rate.double().numpy()
    if ranking == "activation":
        return RankingTable(np.ones(len(rate), np.float32), np.zeros(len(rate), np.float32))
    floored = np.clip(rate, min(1.0, LEAST_FIRINGS / statistics.n_tokens), 1)
    if ranking == "surprise":
        return RankingTable(_stored(-np.log10(floored)), np.zeros(len(rate), np.float32))
    # Figures given that the latent fires, times the rate. A latent that never fired is taken to fire as the others do.
    fired = (rate > 0) & (statistics.mean_square.numpy() > 0)
    firings = np.where(fired, rate, 1)
    square = statistics.mean_square.double().numpy() / firings
    square = np.where(fired, square, np.median(square[fired]) if fired.any() else 1.0)
    mean = np.where(fired, statistics.mean.double().numpy() / firings, np.sqrt(square)) * floored
    deviation = np.sqrt(np.maximum(square * floored - mean**2, square * floored * 1e-6))
    return RankingTable(_stored(1 / deviation), _stored(-mean / deviation))


def _stored(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)
