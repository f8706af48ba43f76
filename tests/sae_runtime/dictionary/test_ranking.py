"""Orders of features, against their definitions in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.dictionary.ranking import LEAST_FIRINGS, Ranking, ranking_table
from sae_runtime.dictionary.statistics import LatentStatistics, LatentStatisticsBuilder

pytestmark = pytest.mark.any_cpu

N_TOKENS = 1000


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    """[tokens, 4]: a latent that fires everywhere, one on every tenth token, one on two tokens, one that never does."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(N_TOKENS, 4, generator=generator, dtype=torch.float64) + 0.5
    z[:, 1] *= torch.arange(N_TOKENS) % 10 == 0
    z[2:, 2], z[:, 3] = 0, 0
    return z


@pytest.fixture(scope="module")
def statistics(activations: torch.Tensor) -> LatentStatistics:
    builder = LatentStatisticsBuilder(4)
    indices = torch.arange(4).expand(N_TOKENS, 4)
    builder.add(SparseFeatures(indices.masked_fill(activations == 0, -1), activations.float(), 4))
    return builder.build()


def score(statistics: LatentStatistics, ranking: Ranking, latent: int, z: float) -> float:
    scores = ranking_table(statistics, ranking).scores(np.array([latent]), np.array([z], np.float32))
    return float(scores[0])


def test_surprise_is_activation_times_minus_log10_of_the_rate(statistics: LatentStatistics) -> None:
    assert score(statistics, "surprise", 0, 5.0) == 0
    assert score(statistics, "surprise", 1, 5.0) == pytest.approx(5.0 * 1)
    assert score(statistics, "activation", 1, 5.0) == 5


def test_a_rate_that_rests_on_few_tokens_is_no_surprise_beyond_measure(statistics: LatentStatistics) -> None:
    """Fired twice, or never, while statistics were taken: counts as LEAST_FIRINGS times."""
    floor = LEAST_FIRINGS / N_TOKENS
    for latent in (2, 3):
        assert score(statistics, "surprise", latent, 1.0) == pytest.approx(-math.log10(floor))


@pytest.mark.parametrize("latent", [0, 1])
def test_z_score_of_latents_that_fire_often(
    statistics: LatentStatistics, activations: torch.Tensor, latent: int
) -> None:
    z = activations[:, latent]
    for value in (0.0, 0.7, 2.0):
        expected = (value - float(z.mean())) / float(z.std(unbiased=False))
        assert score(statistics, "z_score", latent, value) == pytest.approx(expected, rel=1e-3)


def test_z_score_of_rare_latents_is_that_of_the_least_rate(
    statistics: LatentStatistics, activations: torch.Tensor
) -> None:
    firing = activations[:2, 2]
    floor = LEAST_FIRINGS / N_TOKENS
    mean = float(firing.mean()) * floor
    deviation = math.sqrt(float(firing.square().mean()) * floor - mean**2)
    assert score(statistics, "z_score", 2, 1.0) == pytest.approx((1.0 - mean) / deviation, rel=1e-3)
    assert 0.5 < score(statistics, "z_score", 3, 1.0) / score(statistics, "z_score", 2, 1.0) < 2


@pytest.mark.parametrize("ranking", ["activation", "surprise", "z_score"])
def test_every_table_is_finite(ranking: Ranking) -> None:
    """Even of a latent that is constant, and of statistics of a single token."""
    n = 3
    single = LatentStatistics(
        firing_rate=torch.tensor([1.0, 1.0, 0.0]),
        mean=torch.tensor([2.0, 0.0, 0.0]),
        mean_square=torch.tensor([4.0, 0.0, 0.0]),
        max=torch.tensor([2.0, 0.0, 0.0]),
        quantiles=torch.zeros(n, 1),
        quantile_levels=torch.tensor([0.5]),
        n_tokens=1,
    )
    table = ranking_table(single, ranking)
    assert np.isfinite(table.scale).all()
    assert np.isfinite(table.shift).all()


def test_without_statistics() -> None:
    with pytest.raises(ValueError, match="ranking by surprise needs statistics"):
        ranking_table(None, "surprise")
