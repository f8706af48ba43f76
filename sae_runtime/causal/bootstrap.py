"""Percentile bootstrap over texts: an interval for the mean over all texts of a kind, from a sample of them."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2_000


def mean_interval(
    sums: Tensor, counts: Tensor | None = None, *, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Interval of sum(sums) / sum(counts) when the texts are drawn again with replacement (Efron and Tibshirani 1993).

    Args:
        sums: [n], one a text.
        counts: [n] number of values in each text's sum; 1 each if not given.

    Returns:
        The (1 - level) / 2 and (1 + level) / 2 quantiles over `resamples` draws; (mean, mean) for a single text.

    Raises:
        ValueError: no text, or counts that sum to 0.
    """
    sums = sums.double().cpu()
    counts = torch.ones_like(sums) if counts is None else counts.double().cpu()
    n = len(sums)
    if n == 0 or not float(counts.sum()) > 0:
        raise ValueError(f"an interval needs at least one value, found {n} texts with {float(counts.sum()):g} values")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    weight = counts[drawn].sum(1)
    ratios = (sums[drawn].sum(1) / weight)[weight > 0]
    low, high = ratios.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high
