"""Sparse features: what a dictionary's encoder returns and its decoder reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Mean and scale that the encoder took out of each input row; the decoder restores them as mean + std * y.

    They travel with the features and are never stored on the dictionary, so concurrent calls cannot mix them up.
    """

    mean: Tensor  # float32 (float64 for a float64 dictionary) [n, 1]; 0 with constant_norm
    std: Tensor  # same dtype [n, 1]; unbiased, without the encoder's eps; centred: 1; constant_norm: root mean square


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """The active latents of n rows, padded to the same length.

    Each row is sorted by value, descending; equal values by latent, ascending. Only active latents are listed: those
    with a positive value, or, for a TopK dictionary without ReLU, the k largest of either sign.
    """

    indices: Tensor  # int64 [n, k], latents, -1 where a row has fewer than k active ones
    values: Tensor  # [n, k] in the dictionary's dtype, 0 at the padding
    n_latents: int
    input_statistics: InputStatistics | None = None  # None where the dictionary does not normalise its input
    skip_input: Tensor | None = None  # [n, d_in], the encoder's raw input, where the dictionary has a skip connection

    def __len__(self) -> int:
        return self.indices.shape[0]

    @property
    def l0(self) -> Tensor:
        """Number of listed latents per row, int64 [n]."""
        return (self.indices >= 0).sum(dim=-1)

    def to_dense(self) -> Tensor:
        """All latents of every row, [n, n_latents]."""
        dense = self.values.new_zeros(len(self), self.n_latents)
        # The padding adds its zero to latent 0, which changes nothing.
        return dense.scatter_add_(1, self.indices.clamp_min(0), self.values)

    def select(self, latents: Tensor) -> Tensor:
        """Values of the given latents, [n, m] for `latents` int64 [m]; 0 where a latent is not active."""
        unique, column = torch.unique(latents, return_inverse=True)
        return self.select_ascending(unique)[:, column]

    def select_ascending(self, latents: Tensor) -> Tensor:
        """`select` for latents in ascending order without repeats."""
        selected = self.values.new_zeros(len(self), latents.numel())
        if latents.numel() == 0:
            return selected
        # Every listed latent is added to the column where it would stand; its value counts only if it stands there.
        column = torch.searchsorted(latents, self.indices).clamp_max_(latents.numel() - 1)  # [n, k]
        return selected.scatter_add_(1, column, self.values * (latents[column] == self.indices))

    def to_csr(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]:
        """Compressed rows on the host: row_splits uint32 [n + 1], indices uint32 [nnz], values float32 [nnz]."""
        indices = self.indices.cpu().numpy()
        values = self.values.to(torch.float32).cpu().numpy()
        listed = indices >= 0
        row_splits = np.zeros(len(self) + 1, dtype=np.uint32)
        np.cumsum(listed.sum(axis=1), out=row_splits[1:])
        return row_splits, indices[listed].astype(np.uint32), values[listed]

    def __getitem__(self, rows: slice | Tensor) -> SparseFeatures:
        """The given rows (a slice, or an index or boolean tensor), with everything that decoding them needs."""
        statistics = self.input_statistics
        if statistics is not None:
            statistics = InputStatistics(statistics.mean[rows], statistics.std[rows])
        return replace(
            self,
            indices=self.indices[rows],
            values=self.values[rows],
            input_statistics=statistics,
            skip_input=None if self.skip_input is None else self.skip_input[rows],
        )


def all_finite(x: Tensor) -> bool:
    """Whether all of x (any shape, floating) is finite; quicker than testing each number."""
    # A sum over an infinity or NaN is not finite. A sum of finite numbers may overflow, so then each number is tested.
    return math.isfinite(float(x.sum())) or bool(x.isfinite().all())
