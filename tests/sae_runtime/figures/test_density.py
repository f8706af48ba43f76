"""L0 and densities against counts on dense activations."""

import numpy as np
import pytest
import torch

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.figures.density import DensityCounter, density_figures


def test_figures_equal_dense_counts() -> None:
    rng = np.random.default_rng(0)
    rates = np.concatenate([[0.0, 1.0, 0.1001, 0.0999], 10 ** rng.uniform(-3, -0.5, 40)])
    dense = rng.random((1000, len(rates))) < rates
    counter = DensityCounter(len(rates))
    for start in range(0, 1000, 170):
        part = dense[start : start + 170]
        width = max(row.sum() for row in part)
        indices = np.array([np.pad(np.flatnonzero(row), (0, width - row.sum()), constant_values=-1) for row in part])
        values = (indices >= 0).astype(np.float32)
        counter.add(SparseFeatures(torch.from_numpy(indices), torch.from_numpy(values), len(rates)))
    figures = counter.figures()
    l0 = dense.sum(1)
    assert figures["feature_tokens"] == 1000
    assert figures["feature_l0_mean"] == pytest.approx(l0.mean())
    assert figures["feature_l0_std"] == pytest.approx(l0.std())
    assert figures["feature_l0_p50"] == sorted(l0)[499]
    assert figures["feature_l0_p05"] == sorted(l0)[49]
    edges, counts = figures["l0_histogram_edges"], figures["l0_histogram_counts"]
    for a, b, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(a <= value < b for value in l0)
    assert sum(counts) == 1000

    fired = dense.sum(0)
    assert figures["feature_dead_fraction"] == pytest.approx(np.mean([n == 0 for n in fired]))
    assert figures["feature_dense_fraction"] == pytest.approx(np.mean([n > 100 for n in fired]))
    assert figures["density_never"] == sum(n == 0 for n in fired)
    edges, counts = figures["density_log10_edges"], figures["density_counts"]
    assert edges[-1] == 0
    assert sum(counts) + figures["density_never"] == len(rates)
    for a, b, count in zip(edges, edges[1:], counts, strict=False):
        inside = [n for n in fired if n and a <= np.log10(n / 1000) < b]
        full = sum(n == 1000 for n in fired) if b == 0 else 0  # a density of 1 is in the last bin
        assert count == len(inside) + full


def test_wide_l0_keeps_a_bounded_histogram() -> None:
    indices = torch.arange(1000)[None].repeat(2, 1)
    indices[1, 300:] = -1
    counter = DensityCounter(1000)
    counter.add(SparseFeatures(indices, torch.ones(2, 1000), 1000))
    figures = counter.figures()
    assert len(figures["l0_histogram_counts"]) <= 64
    assert sum(figures["l0_histogram_counts"]) == 2


def test_the_rarest_latent_is_in_the_histogram() -> None:
    figures = density_figures(np.array([1, 0, 262_144]), 262_144)
    assert sum(figures["density_counts"]) == 2
    assert figures["density_counts"][0] + figures["density_counts"][1] == 1
