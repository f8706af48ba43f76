"""What is known about each latent of a dictionary from the tokens it was measured on, and how it is gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sae_runtime.dictionary.features import SparseFeatures

QUANTILE_LEVELS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

_LOWEST_OCTAVE = -16  # activations below 2^-16 share the first bin
_OCTAVES = 32
_BINS_PER_OCTAVE = 16


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Per-latent figures over `n_tokens` tokens, in latent activation units; float32 on the host.

    `mean` and `mean_square` are over all tokens, zeros included; `quantiles` are over the tokens on which the latent is
    active (0 for a latent that never was), so that a rare latent's strength can be read off them.
    """

    firing_rate: Tensor  # [n_latents], share of tokens on which the latent is active, 0..1
    mean: Tensor  # [n_latents]; what ablate_mean sets
    mean_square: Tensor  # [n_latents]
    max: Tensor  # [n_latents], largest activation seen; the unit "max" of an edit
    quantiles: Tensor  # [n_latents, q]
    quantile_levels: Tensor  # [q], ascending, 0..1
    n_tokens: int

    def __post_init__(self) -> None:
        n_latents = self.firing_rate.numel()
        expected = {
            "firing_rate": (n_latents,),
            "mean": (n_latents,),
            "mean_square": (n_latents,),
            "max": (n_latents,),
            "quantiles": (n_latents, self.quantile_levels.numel()),
            "quantile_levels": (self.quantile_levels.numel(),),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"statistics: {name} has shape {list(found)}, expected {list(shape)}")
        if self.n_tokens < 1:
            raise ValueError(f"statistics: n_tokens is {self.n_tokens}, expected 1 or more")

    @property
    def n_latents(self) -> int:
        return self.firing_rate.shape[0]

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors of `stats.safetensors`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "n_tokens"}
        stored = {name: tensor.to(torch.float32).cpu().contiguous() for name, tensor in tensors.items()}
        return stored | {"n_tokens": torch.tensor([self.n_tokens], dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LatentStatistics:
        """Inverse of `to_tensors`; ValueError names missing, unknown, misshapen or non-finite tensors."""
        names = {f.name for f in fields(cls)}
        if set(tensors) != names:
            raise ValueError(f"statistics: found tensors {sorted(tensors)}, expected {sorted(names)}")
        stored = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name != "n_tokens"}
        for name, tensor in stored.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"statistics: {name} holds NaN or infinite values")
        for name in ("firing_rate", "quantile_levels"):
            if not bool(((stored[name] >= 0) & (stored[name] <= 1)).all()):
                raise ValueError(f"statistics: {name} is not between 0 and 1")
        n_tokens = tensors["n_tokens"]
        if n_tokens.dtype != torch.int64 or n_tokens.numel() != 1:
            raise ValueError(f"statistics: n_tokens is {n_tokens.dtype} {list(n_tokens.shape)}, expected one int64")
        return cls(**stored, n_tokens=int(n_tokens.item()))

    def __getitem__(self, latents: slice | Tensor) -> LatentStatistics:
        """The same figures for some of the latents."""
        kept = ("firing_rate", "mean", "mean_square", "max", "quantiles")
        return replace(self, **{name: getattr(self, name)[latents] for name in kept})


class LatentStatisticsBuilder:
    """Statistics of a stream of features, in memory that does not grow with the number of tokens.

    Holds counts, sums, maxima and a histogram of each latent's positive activations.

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
