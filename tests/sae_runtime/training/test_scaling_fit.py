"""The scaling law: known parameters come back, and intervals hold them as often as they say."""

from __future__ import annotations

import math

import pytest
import torch

from sae_runtime.training.scaling_fit import PARAMETERS, ScalingFit, SweepPoint, fit_scaling_law

pytestmark = pytest.mark.any_cpu

# Near the paper's for GPT-4: losses between 0.1 and 0.6 on the grid below.
TRUE = dict(zip(PARAMETERS, (0.5, 0.2, -0.15, -0.02, -2.4, -0.1), strict=True))
GRID = [(n, k) for n in (512, 1024, 2048, 4096, 8192, 16384) for k in (8, 16, 32, 64)]


def law(n: int, k: int) -> float:
    """Written out again, from the paper's formula."""
    t, log_n, log_k = TRUE, math.log(n), math.log(k)
    reducible = math.exp(t["alpha"] + t["beta_k"] * log_k + t["beta_n"] * log_n + t["gamma"] * log_k * log_n)
    return reducible + math.exp(t["zeta"] + t["eta"] * log_k)


def noisy(std: float, seed: int) -> list[SweepPoint]:
    generator = torch.Generator().manual_seed(seed)
    noise = (std * torch.randn(len(GRID), generator=generator, dtype=torch.float64)).exp().tolist()
    return [SweepPoint(n, k, law(n, k) * e) for (n, k), e in zip(GRID, noise, strict=True)]


def test_exact_losses_give_back_the_law() -> None:
    fit = fit_scaling_law(noisy(0.0, 0), resamples=2)
    assert "zeta" in fit.parameters
    assert fit.r_squared > 1 - 1e-9
    for n, k in [*GRID, (32_768, 32), (3000, 20)]:
        assert fit.loss(n, k) == pytest.approx(law(n, k), rel=2e-3)
    for name in ("zeta", "eta", "gamma"):
        assert fit.parameters[name] == pytest.approx(TRUE[name], abs=0.05)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """95 % nominal; a bootstrap of 24 points is somewhat too narrow or wide, but not grossly."""
    held = dict.fromkeys(PARAMETERS, 0)
    runs = 12
    for seed in range(runs):
        fit = fit_scaling_law(noisy(0.01, seed), resamples=40, seed=seed)
        assert fit.residual_std == pytest.approx(0.01, rel=0.6)
        for name, (low, high) in fit.intervals.items():
            held[name] += low <= TRUE[name] <= high
    assert min(held.values()) >= 8
    assert sum(held.values()) >= 0.8 * runs * len(PARAMETERS)


def test_a_small_grid_is_fitted_without_the_irreducible_term() -> None:
    points = [SweepPoint(n, k, 2.0 * n**-0.3 * k**-0.2) for n in (256, 1024) for k in (4, 8, 16)]
    fit: ScalingFit = fit_scaling_law(points, resamples=5)
    assert "zeta" not in fit.parameters
    assert fit.parameters["alpha"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert fit.parameters["beta_n"] == pytest.approx(-0.3, abs=1e-6)
    assert fit.parameters["beta_k"] == pytest.approx(-0.2, abs=1e-6)
    assert fit.parameters["gamma"] == pytest.approx(0.0, abs=1e-6)


def test_the_seed_decides_the_intervals() -> None:
    points = noisy(0.02, 3)
    one, same, other = (fit_scaling_law(points, resamples=10, seed=seed).intervals for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([SweepPoint(256, k, 0.5) for k in (4, 8, 16, 32, 64)], "1 values of n_latents"),
        ([SweepPoint(n, k, 0.5) for n in (256, 512) for k in (4, 8)], "4 runs"),
        ([SweepPoint(n, k, 0.0) for n in (256, 512, 1024) for k in (4, 8)], "positive"),
    ],
)
def test_what_cannot_be_fitted(points: list[SweepPoint], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(points)
