"""Correlations against torch.corrcoef and ranks by hand."""

from __future__ import annotations

import pytest
import torch

from sae_runtime.causal.correlation import pearson, spearman


def test_correlations() -> None:
    x, y = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0.0, 4.0, -1.0, 9.0])
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    ranks = torch.tensor([[1, 2.5, 2.5, 4], [2, 3, 1, 4]])
    assert spearman(x, y) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert pearson(x, -3 * x + 1) == pytest.approx(-1)
    assert pearson(x, torch.ones(4)) is None
    assert pearson(x[:1], y[:1]) is None
