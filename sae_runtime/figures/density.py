"""How many latents fire on a token, and how often each latent fires."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runtime.dictionary.features import SparseFeatures

BINS_PER_DECADE = 4
_L0_BINS = 64
DENSE = 0.1
"""A latent is dense when it fires on more than this share of the tokens."""


class DensityCounter:
    """Counts over a stream of features, in memory for the latents and one small number a token."""

    def __init__(self, n_latents: int) -> None:
        self.n_tokens = 0
        self._fired = torch.zeros(n_latents, dtype=torch.int64)
        self._l0: list[Tensor] = []

    def add(self, features: SparseFeatures) -> None:
        listed = features.indices[features.indices >= 0].cpu()
        self._fired += torch.bincount(listed, minlength=len(self._fired))
        self._l0.append(features.l0.cpu())
        self.n_tokens += len(features)

    @property
    def fired(self) -> npt.NDArray[np.int64]:
        """[n_latents], tokens on which each latent fires."""
        return self._fired.numpy()

    @property
    def l0(self) -> npt.NDArray[np.int64]:
        """[n_tokens], latents that fire on each token."""
        return torch.cat(self._l0).numpy()

    def figures(self) -> dict[str, Any]:
        """L0 and density figures over all tokens seen."""
        l0 = self.l0
        low, middle, high = np.quantile(l0, [0.05, 0.5, 0.95], method="inverted_cdf")
        width = max(1, -(-(int(l0.max()) + 1) // _L0_BINS))  # whole numbers a bin, so that no bin is empty by rounding
        edges = np.arange(0, int(l0.max()) + width + 1, width)
        return {
            "feature_tokens": self.n_tokens,
            "feature_l0_mean": float(l0.mean()),
            "feature_l0_std": float(l0.std()),
            "feature_l0_p05": int(low),
            "feature_l0_p50": int(middle),
            "feature_l0_p95": int(high),
            "l0_histogram_edges": edges.tolist(),
            "l0_histogram_counts": np.histogram(l0, edges)[0].tolist(),
            **density_figures(self.fired, self.n_tokens),
        }


def density_figures(fired: npt.NDArray[np.int64], n_tokens: int) -> dict[str, Any]:
    """Dead and dense shares, and a histogram of log10 density in bins of a quarter decade.

    fired: [n_latents], tokens of n_tokens on which each latent fires.
    """
    alive = fired[fired > 0] / n_tokens
    lowest = int(np.floor(np.log10(1 / n_tokens) * BINS_PER_DECADE))
    edges = np.arange(lowest, 1) / BINS_PER_DECADE
    # A density of exactly 1 belongs to the last bin, as numpy's histogram has it.
    counts = np.histogram(np.log10(alive), edges)[0]
    return {
        "feature_dead_fraction": float((fired == 0).mean()),
        "feature_dense_fraction": float((fired > DENSE * n_tokens).mean()),
        "density_never": int((fired == 0).sum()),
        "density_log10_edges": edges.tolist(),
        "density_counts": counts.tolist(),
    }
