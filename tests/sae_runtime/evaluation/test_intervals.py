"""Bootstrap intervals against the normal approximation, and their reproducibility."""

import numpy as np
import pytest

from sae_runtime.evaluation.intervals import bootstrap_interval, generator, with_interval


def test_it_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values, seed=1, purpose="x", resamples=4000)
    half = 1.96 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_ratios_resample_numerator_and_denominator_together() -> None:
    size = np.random.default_rng(0).integers(1, 100, 50)
    assert bootstrap_interval(3.0 * size, size, seed=0, purpose="x") == pytest.approx((3.0, 3.0))
    low, high = bootstrap_interval(3.0 * size, seed=0, purpose="x")
    assert high - low > 1


def test_the_seed_and_the_purpose_decide() -> None:
    draws = [generator(seed, purpose).random() for seed, purpose in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert with_interval("x", [1.0, 2.0], seed=0, resamples=99) == with_interval("x", [1.0, 2.0], seed=0, resamples=99)
    assert with_interval("x", [], seed=0, resamples=99) == {}
    assert np.isnan(bootstrap_interval([], seed=0, purpose="x")).all()
