"""The smallest p-value of a contrast, against the test itself."""

import pytest
import torch

from sae_runtime.causal.contrast import contrast_columns, false_discovery_rates
from sae_runtime.causal.texts_needed import clearest_p_value, texts_needed


def measured(n_active: int, n_silent: int) -> float:
    """p of a feature that fires on every text of the first set, with different values, and on none of the second."""
    active = torch.arange(1, n_active + 1, dtype=torch.float64)[:, None]
    return float(contrast_columns(active, torch.zeros(n_silent, 1)).p_value)


@pytest.mark.parametrize(("n_a", "n_b"), [(2, 2), (2, 3), (7, 4), (12, 12), (5, 40)])
def test_it_is_the_p_value_of_the_clearest_difference(n_a: int, n_b: int) -> None:
    p = clearest_p_value(n_a, n_b)
    assert p == pytest.approx(min(measured(n_a, n_b), measured(n_b, n_a)), rel=1e-9)
    assert p == clearest_p_value(n_b, n_a)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 500, generator=generator).sub(0.4).clamp_min(0) for n in (n_a, n_b))
    assert float(contrast_columns(a, b).p_value.min()) >= p * (1 - 1e-9), "nothing else is clearer"


@pytest.mark.parametrize(("n_tested", "rate"), [(1, 0.05), (35, 0.05), (8192, 0.05), (8192, 0.2), (200_000, 0.01)])
def test_the_clearest_difference_passes_with_so_many_texts_and_not_with_one_less(n_tested: int, rate: float) -> None:
    n = texts_needed(n_tested, rate)

    def q(texts: int) -> float:
        p = torch.ones(n_tested, dtype=torch.float64)
        p[0] = measured(texts, texts)
        return float(false_discovery_rates(p)[0])

    assert q(n) <= rate
    assert n == 2 or q(n - 1) > rate
