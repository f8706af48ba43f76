"""Correlations of two lists of numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Linear correlation of x [n] and y [n] in -1..1; None for fewer than two pairs or a constant list."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    if len(x) < 2 or not (bool((x != 0).any()) and bool((y != 0).any())):
        return None
    size = float(x.norm() * y.norm())
    return max(-1.0, min(1.0, float(x @ y) / size)) if size > 0 else None


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Correlation of the ranks, where equal values share their mean rank; None as for `pearson`."""
    return pearson(average_ranks(x[:, None])[:, 0], average_ranks(y[:, None])[:, 0])


def average_ranks(x: Tensor) -> Tensor:
    """Ranks from 1 within each column of x [n, m], float64; equal values share the mean of their ranks."""
    below, not_above = ties(x)
    return (below + not_above + 1).double() / 2


def ties(x: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of x [n, m], how many entries of its column are smaller, and how many not larger; int64 [n, m]."""
    columns = x.T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns, side="left")
    not_above = torch.searchsorted(ordered, columns, side="right")
    return below.T, not_above.T
