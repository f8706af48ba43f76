"""Streaming statistics against the dense activations they summarise."""

import pytest
import torch

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.dictionary.statistics import LatentStatisticsBuilder


def test_they_equal_the_dense_computation() -> None:
    torch.manual_seed(0)
    n_latents, n_tokens, k = 20, 4000, 4
    indices = torch.stack([torch.randperm(n_latents - 2)[:k] for _ in range(n_tokens)])  # two latents never fire
    values = (torch.randn(n_tokens, k) * 2).exp() * (torch.rand(n_tokens, k) > 0.2)
    features = SparseFeatures(torch.where(values > 0, indices, -1), values, n_latents)
    builder = LatentStatisticsBuilder(n_latents)
    for start in range(0, n_tokens, 300):
        builder.add(features[start : start + 300])
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    statistics = builder.build(levels)
    dense = features.to_dense()
    assert statistics.n_tokens == n_tokens
    torch.testing.assert_close(statistics.firing_rate, (dense > 0).float().mean(0))
    torch.testing.assert_close(statistics.mean, dense.mean(0))
    torch.testing.assert_close(statistics.mean_square, dense.square().mean(0))
    assert torch.equal(statistics.max, dense.amax(0))
    for latent in range(n_latents - 2):
        exact = dense[:, latent][dense[:, latent] > 0].quantile(torch.tensor(levels))
        torch.testing.assert_close(statistics.quantiles[latent], exact, rtol=0.06, atol=0)
    assert torch.count_nonzero(statistics.quantiles[-2:]) == 0


def test_memory_does_not_grow_and_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        LatentStatisticsBuilder(3).build()


def test_extreme_values_stay_in_range() -> None:
    builder = LatentStatisticsBuilder(2)
    builder.add(SparseFeatures(torch.tensor([[0], [1]]), torch.tensor([[1e-9], [1e9]]), 2))
    statistics = builder.build((0.5,))
    assert statistics.quantiles[0, 0] == pytest.approx(1e-9)  # never above the maximum
    assert statistics.quantiles[1, 0] <= 1e9
