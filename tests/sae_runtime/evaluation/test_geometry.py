"""Tiled nearest neighbours against all pairs in float64."""

import math

import numpy as np
import pytest
import torch

from sae_runtime.evaluation import geometry
from sae_runtime.evaluation.geometry import geometry_figures, nearest_cosines


@pytest.fixture
def decoder() -> torch.Tensor:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    rows[7] = 0  # a latent without a direction
    rows[12] = 3 * rows[30]  # a copy of another length
    return rows


def slow(decoder: torch.Tensor, latent: int) -> float:
    a = decoder[latent].double()
    others = [b.double() for i, b in enumerate(decoder) if i != latent and float(b.norm()) > 0]
    return max(float(a @ b / (a.norm() * b.norm())) for b in others) if float(a.norm()) > 0 else math.nan


@pytest.mark.parametrize("tile", [1, 170, 1 << 20])
def test_all_pairs(decoder: torch.Tensor, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_TILE_ELEMENTS", tile)
    expected = [slow(decoder, i) for i in range(50)]
    np.testing.assert_allclose(nearest_cosines(decoder), expected, atol=1e-6)
    chosen = torch.tensor([3, 12, 7])
    np.testing.assert_allclose(nearest_cosines(decoder, chosen), [expected[i] for i in (3, 12, 7)], atol=1e-6)


def test_figures(decoder: torch.Tensor) -> None:
    figures = geometry_figures(decoder, 1000, seed=0)
    expected = np.array([slow(decoder, i) for i in range(50) if i != 7])
    assert figures["geometry_latents"] == 49
    assert figures["geometry_nearest_cosine_mean"] == pytest.approx(expected.mean(), abs=1e-6)
    assert figures["geometry_nearest_cosine_p50"] == pytest.approx(np.median(expected), abs=1e-6)
    assert figures["geometry_close_fraction"] == pytest.approx((expected > 0.9).mean())
    assert sum(figures["geometry_histogram_counts"]) == 49
    assert sum(figures["geometry_random_histogram_counts"]) == 50
    sampled = geometry_figures(decoder, 10, seed=0)
    assert 9 <= sampled["geometry_latents"] <= 10
    assert geometry_figures(decoder, 10, seed=0) == sampled
    assert geometry_figures(decoder[:1], 10, seed=0) == {}
