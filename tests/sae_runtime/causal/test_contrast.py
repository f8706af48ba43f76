"""Contrasts against counting pairs by hand, false discoveries against the definition, texts against dense rows."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from sae_runtime import Backbone, Dictionary
from sae_runtime.causal.contrast import (
    active_columns,
    aggregate_texts,
    contrast_columns,
    contrast_features,
    false_discovery_rates,
)
from tests.sae_runtime.causal.conftest import latents


def naive(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Cohen's d, AUC and the p-value of one feature, by counting pairs and equal values."""
    pooled = math.sqrt(
        (sum((x - np.mean(a)) ** 2 for x in a) + sum((x - np.mean(b)) ** 2 for x in b)) / (len(a) + len(b) - 2)
    )
    u = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    n = len(a) + len(b)
    together = a + b
    ties = sum(together.count(x) ** 3 - together.count(x) for x in set(together))
    deviation = math.sqrt(len(a) * len(b) / 12 * (n + 1 - ties / (n * (n - 1))))
    if deviation == 0:
        return 0.0, 0.5, 1.0
    z = max(0.0, abs(u - len(a) * len(b) / 2) - 0.5) / deviation
    return (np.mean(a) - np.mean(b)) / pooled, u / (len(a) * len(b)), 2 * NormalDist().cdf(-z)


def test_columns_equal_the_naive_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(7, 60, generator=generator) + torch.linspace(-2, 2, 60)).relu()
    b = torch.randn(11, 60, generator=generator).relu()  # half of them 0: ties
    a[:, :3], b[:, :3] = a[:, :3].round(), b[:, :3].round()
    a[:, 5] = b[:, 5] = 0
    statistics = contrast_columns(a, b)
    for column in range(60):
        effect, auc, p = naive(a[:, column].tolist(), b[:, column].tolist())
        assert float(statistics.effect_size[column]) == pytest.approx(effect, abs=1e-5)
        assert float(statistics.auc[column]) == pytest.approx(auc, abs=1e-12)
        assert float(statistics.p_value[column]) == pytest.approx(p, rel=1e-9)
        assert float(statistics.mean_a[column]) == pytest.approx(a[:, column].mean().item(), abs=1e-6)
    assert float(statistics.p_value[5]) == 1
    with pytest.raises(ValueError, match="1 and 11 texts, expected at least 2 each"):
        contrast_columns(a[:1], b)


def test_p_values_are_near_the_exact_ones_of_all_splits() -> None:
    values = [0.3, 1.1, 1.9, 2.2, 3.1, 3.9, 4.4, 5.2, 6.6, 7.5, 8.1, 9.9]

    def statistic(chosen: tuple[float, ...]) -> float:
        rest = [v for v in values if v not in chosen]
        return abs(sum(x > y for x in chosen for y in rest) - 18)

    every = [statistic(chosen) for chosen in itertools.combinations(values, 6)]
    for chosen in ((1.1, 4.4, 5.2, 6.6, 8.1, 9.9), (3.9, 4.4, 5.2, 6.6, 7.5, 9.9), (0.3, 1.1, 1.9, 2.2, 3.1, 4.4)):
        exact = np.mean([s >= statistic(chosen) for s in every])
        a = torch.tensor(chosen)[:, None]
        b = torch.tensor([v for v in values if v not in chosen])[:, None]
        assert float(contrast_columns(a, b).p_value[0]) == pytest.approx(exact, abs=0.02)


def test_false_discovery_rates_are_those_of_benjamini_and_hochberg() -> None:
    p = torch.tensor([0.01, 0.8, 0.04, 0.02, 0.02, 1.0, 0.0004])
    q = false_discovery_rates(p)
    for level in (0.001, 0.003, 0.02, 0.03, 0.036, 0.05, 0.06, 0.5, 0.94, 1.0):
        # The procedure itself: the largest i with p_(i) <= i level / m, and all up to it.
        ordered = sorted(p.tolist())
        passing = [i for i, value in enumerate(ordered, 1) if value <= i * level / len(p) + 1e-12]
        bound = ordered[max(passing) - 1] if passing else -1
        assert (q <= level + 1e-12).tolist() == [value <= bound for value in p.tolist()], level


def test_few_false_discoveries_and_the_planted_features() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(20, 400, generator=generator), torch.rand(25, 400, generator=generator)
    a[:, [3, 77]] += 1.5
    b[:, 200] += 1.5
    contrasts = contrast_features({"d": (torch.arange(400), a, b)})
    sure = [contrast for contrast in contrasts if contrast.q_value <= 0.05]
    assert {contrast.feature.feature for contrast in sure[:3]} == {3, 77, 200}
    assert len(sure) <= 4
    assert {contrast.feature.feature: contrast.auc for contrast in sure[:3]} == {3: 1.0, 77: 1.0, 200: 0.0}
    assert contrasts == sorted(contrasts, key=lambda contrast: (contrast.p_value, -abs(contrast.effect_size)))


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_texts_become_rows(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]], aggregation: str
) -> None:
    aggregated = aggregate_texts(backbone64, dictionaries64, rows, aggregation, tokens_per_pass=25)
    for name, dictionary in dictionaries64.items():
        for i, row in enumerate(rows):
            x = backbone64.activations(torch.tensor([row]), sites=[dictionary.site])[dictionary.site][0]
            z = latents(dictionary, x)[0]
            expected = z.amax(0) if aggregation == "max" else z.mean(0)
            torch.testing.assert_close(aggregated[name][i], expected.float(), atol=1e-5, rtol=0)
    a, b = aggregated["stream"][:2], aggregated["stream"][2:]
    features, a_active, _ = active_columns(a, b)
    assert features.tolist() == [f for f in range(24) if (aggregated["stream"][:, f] != 0).any()]
    assert torch.equal(a_active, a[:, features])
