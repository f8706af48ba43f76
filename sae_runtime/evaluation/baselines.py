"""What a dictionary is compared with: the mean, principal components, and a dictionary of random directions.

Where the dictionary normalises its input, the baselines get the same normalisation, that is the same mean and standard
deviation of every token for nothing: they replace the dictionary, not what comes before it. All are fitted on the very
tokens that they are measured on, which favours them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.dictionary.features import InputStatistics, SparseFeatures
from sae_runtime.kernels.decode import sparse_decode
from sae_runtime.kernels.topk import tiled_topk

_TINY = 1e-12


def to_inner(x: Tensor, statistics: InputStatistics | None) -> Tensor:
    """x [n, d] as the dictionary normalises it, float32; x itself where it does not."""
    x = x.float()
    return x if statistics is None else ((x - statistics.mean) / statistics.std.clamp_min(_TINY)).float()


def to_outer(inner: Tensor, statistics: InputStatistics | None) -> Tensor:
    """Undoes `to_inner`."""
    return inner if statistics is None else (inner * statistics.std + statistics.mean).float()


class Moments:
    """Sums of rows [n, d] and of their outer products, in float64 on the host."""

    def __init__(self, width: int, outer: bool = False) -> None:
        self.n = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64) if outer else None

    def add(self, x: Tensor) -> None:
        wide = x.double().cpu()
        self.n += len(x)
        self.sum += wide.sum(0)
        if self.outer is not None:
            self.outer += wide.T @ wide

    @property
    def mean(self) -> Tensor:
        """[d] float64."""
        return self.sum / self.n

    def covariance(self) -> Tensor:
        """[d, d] float64, of the population (divided by n)."""
        assert self.outer is not None
        return self.outer / self.n - torch.outer(self.mean, self.mean)


@dataclass(frozen=True, eq=False)
class Baselines:
    """Fitted baselines. Reconstructions are in the units of x."""

    raw_mean: Tensor
    """[d], of the activations."""
    inner_mean: Tensor
    """[d], of the activations as the dictionary normalises them."""
    components: Tensor
    """[d, d], principal directions of the normalised activations as rows, the strongest first."""
    explained: Tensor
    """[d] float64, their variances, descending."""
    k: int
    """Components kept, and active latents of the random dictionary: the dictionary's own L0, rounded."""
    directions: Tensor
    """[n_latents, d], random unit rows; encoder and decoder of the random dictionary."""
    scale: float
    """Factor of the random dictionary's latents: least squares on the reconstruction."""

    def mean(self, x: Tensor, statistics: InputStatistics | None) -> Tensor:
        """The mean activation in place of every row."""
        return self.raw_mean.expand_as(x)

    def pca(self, x: Tensor, statistics: InputStatistics | None) -> Tensor:
        """Rows on the k strongest principal components."""
        top = self.components[: min(self.k, len(self.components))]
        inner = self.inner_mean + (to_inner(x, statistics) - self.inner_mean) @ top.T @ top
        return to_outer(inner, statistics)

    def random_features(self, x: Tensor, statistics: InputStatistics | None) -> SparseFeatures:
        """Top-k latents of the random dictionary."""
        return _random_features(to_inner(x, statistics) - self.inner_mean, self.directions, self.k, statistics)

    def random(self, x: Tensor, statistics: InputStatistics | None) -> Tensor:
        """Reconstruction by the random dictionary."""
        features = self.random_features(x, statistics)
        decoded = sparse_decode(features.indices, features.values, self.directions)
        return to_outer(decoded * self.scale + self.inner_mean, statistics)

    def components_for(self, nmse: float) -> int:
        """Fewest principal components that reach an NMSE (of normalised activations); at most d."""
        left = 1 - self.explained.cumsum(0) / self.explained.sum()
        return min(int((left > nmse).sum()) + 1, len(self.explained))


def fit_baselines(
    batches: Iterable[tuple[Tensor, InputStatistics | None, SparseFeatures]], n_latents: int, seed: int
) -> Baselines:
    """Fits all of them on activations.

    Args:
        batches: activations x [n, d], the dictionary's input statistics of them, and its features (for their L0).

    Raises:
        ValueError: there is no batch.
    """
    raw: Moments | None = None
    inner: Moments | None = None
    kept: list[Tensor] = []
    active = 0
    for x, statistics, features in batches:
        if raw is None or inner is None:
            raw, inner = Moments(x.shape[1]), Moments(x.shape[1], outer=True)
        normalized = to_inner(x, statistics)
        raw.add(x)
        inner.add(normalized)
        active += int(features.l0.sum())
        kept.append(normalized[::8].clone())  # an eighth is plenty for one factor
    if raw is None or inner is None:
        raise ValueError("baselines need at least one batch of activations")
    variances, vectors = torch.linalg.eigh(inner.covariance())
    k = max(1, round(active / raw.n))
    device = kept[0].device
    directions = F.normalize(
        torch.randn(n_latents, len(raw.sum), generator=torch.Generator().manual_seed(seed)), dim=1
    ).to(device)
    inner_mean = inner.mean.float().to(device)
    dot = square = 0.0
    for rows in kept:
        centred = rows - inner_mean
        features = _random_features(centred, directions, k, None)
        decoded = sparse_decode(features.indices, features.values, directions).double()
        dot += float((decoded * centred).sum())
        square += float(decoded.square().sum())
    return Baselines(
        raw_mean=raw.mean.float().to(device),
        inner_mean=inner_mean,
        components=vectors.flip(1).T.float().contiguous().to(device),
        explained=variances.flip(0).clamp_min(0),
        k=k,
        directions=directions,
        scale=dot / square if square else 0.0,
    )


def _random_features(centred: Tensor, directions: Tensor, k: int, statistics: InputStatistics | None) -> SparseFeatures:
    values, indices = tiled_topk(
        centred, directions, directions.new_zeros(len(directions)), min(k, len(directions)), relu=True
    )
    return SparseFeatures(indices, values, len(directions), statistics)
