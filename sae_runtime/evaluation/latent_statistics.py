"""Per-latent statistics over a stream of features, in memory that does not grow with the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.dictionary.statistics import LatentStatistics

QUANTILE_LEVELS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

_LOWEST_OCTAVE = -16  # activations below 2^-16 share the first bin
_OCTAVES = 32
_BINS_PER_OCTAVE = 16


class LatentStatisticsBuilder:
    """Counts, sums, maxima and a histogram of each latent's positive activations.

    Quantiles are read from histogram bins that are 1/16 octave wide (in between by interpolation), so they are within
    about 4.4 % of the exact ones for activations between 2^-16 and 2^16.
    """

    def __init__(self, n_latents: int) -> None:
        self.n_latents = n_latents
        self.n_tokens = 0
        self._count = torch.zeros(n_latents, dtype=torch.int64)
        self._sum = torch.zeros(n_latents, dtype=torch.float64)
        self._sum_of_squares = torch.zeros(n_latents, dtype=torch.float64)
        self._max = torch.zeros(n_latents)
        self._n_bins = _OCTAVES * _BINS_PER_OCTAVE
        self._histogram = torch.zeros(n_latents * self._n_bins, dtype=torch.int32)

    def add(self, features: SparseFeatures) -> None:
        """Counts the features of some tokens."""
        positive = features.values > 0
        latents = features.indices[positive].cpu()
        values = features.values[positive].float().cpu()
        self.n_tokens += len(features)
        self._count += torch.bincount(latents, minlength=self.n_latents)
        self._sum.index_add_(0, latents, values.double())
        self._sum_of_squares.index_add_(0, latents, values.double().square())
        self._max.scatter_reduce_(0, latents, values, reduce="amax")
        bins = ((values.log2() - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE).long().clamp(0, self._n_bins - 1)
        self._histogram.index_add_(0, latents * self._n_bins + bins, torch.ones(len(bins), dtype=torch.int32))

    def build(self, levels: tuple[float, ...] = QUANTILE_LEVELS) -> LatentStatistics:
        """The statistics so far.

        Raises:
            ValueError: no token was added.
        """
        if self.n_tokens == 0:
            raise ValueError("statistics need at least one token")
        quantile_levels = torch.tensor(levels)
        return LatentStatistics(
            firing_rate=(self._count.double() / self.n_tokens).float(),
            mean=(self._sum / self.n_tokens).float(),
            mean_square=(self._sum_of_squares / self.n_tokens).float(),
            max=self._max.clone(),
            quantiles=self._quantiles(quantile_levels),
            quantile_levels=quantile_levels,
            n_tokens=self.n_tokens,
        )

    def _quantiles(self, levels: Tensor) -> Tensor:
        counts = self._histogram.view(self.n_latents, self._n_bins)
        cumulative = counts.cumsum(1)  # int64 (n, bins)
        ranks = levels * (cumulative[:, -1:] - 1).clamp_min(0)  # (n, q), rank of each quantile from 0
        bins = torch.searchsorted(cumulative, ranks.floor().long() + 1).clamp_max(self._n_bins - 1)
        inside = counts.gather(1, bins).clamp_min(1)
        share = (ranks - (cumulative.gather(1, bins) - inside) + 0.5) / inside  # place within the bin, 0..1
        octave = (bins + share.clamp(0, 1)) / _BINS_PER_OCTAVE + _LOWEST_OCTAVE
        quantiles = torch.minimum(octave.exp2(), self._max[:, None])
        return torch.where(self._count[:, None] > 0, quantiles, 0.0)
