"""Bootstrap intervals against resampling with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_runtime.causal.bootstrap import mean_interval


def test_bootstrap_interval_is_that_of_resampled_texts() -> None:
    sums, counts = torch.tensor([3.0, -1.0, 0.5, 8.0, 2.0]), torch.tensor([2.0, 1.0, 4.0, 3.0, 2.0])
    rng = np.random.default_rng(0)
    drawn = rng.integers(5, size=(200_000, 5))
    ratios = sums.numpy()[drawn].sum(1) / counts.numpy()[drawn].sum(1)
    interval = mean_interval(sums, counts, resamples=200_000)
    assert interval == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.01)
    assert mean_interval(sums, counts) == mean_interval(sums, counts)
    assert mean_interval(torch.tensor([4.0]), torch.tensor([2.0])) == (2.0, 2.0)
    with pytest.raises(ValueError, match="0 texts"):
        mean_interval(torch.zeros(0))
