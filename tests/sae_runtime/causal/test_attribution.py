"""Attributions: gradients against finite differences, effects against a hooked model, correlations by hand."""

from __future__ import annotations

import pytest
import torch

from sae_runtime import Backbone, Dictionary
from sae_runtime.causal.attribution import AttributionStudy, Target
from sae_runtime.causal.correlation import pearson, spearman
from tests.sae_runtime.causal.conftest import HookedModel, latents

STEP = 1e-5


def metric(logits: torch.Tensor, target: Target) -> float:
    last = logits[-1]
    return float(last[target.token] - (0 if target.foil is None else last[target.foil]))


@pytest.mark.parametrize("target", [Target(40), Target(40, foil=3)])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_gradients_equal_finite_differences_and_effects_the_hooked_model(
    backbone64: Backbone,
    dictionaries64: dict[str, Dictionary],
    hooked: HookedModel,
    rows: list[list[int]],
    target: Target,
    inference_mode: bool,
) -> None:
    row = rows[0]
    with torch.inference_mode(inference_mode):  # an engine runs under it
        study = AttributionStudy(backbone64, dictionaries64, row, target, count=30)
        found = study.run(study.attributions)
    plain, _ = hooked.logits(row)
    assert study.metric == pytest.approx(metric(plain, target), abs=1e-9)
    assert {each.feature.dictionary for each in found} == set(dictionaries64)
    for each in found:
        name, feature = each.feature.dictionary, each.feature.feature

        def at(change, name=name, feature=feature, position=each.position):
            replace = lambda z, p: torch.where(p == position, change(z), z)  # noqa: E731
            return metric(hooked.logits(row, [(name, feature, replace)])[0], target)

        slope = (at(lambda z: z + STEP) - at(lambda z: z - STEP)) / (2 * STEP)
        assert each.gradient == pytest.approx(slope, abs=1e-7)
        assert each.attribution == pytest.approx(each.activation * each.gradient, rel=1e-12)
        assert each.effect == pytest.approx(study.metric - at(lambda z: 0 * z), abs=1e-8)
    sizes = [abs(each.attribution) for each in found]
    assert sizes == sorted(sizes, reverse=True)

    report = study.report(found)
    estimates = torch.tensor([each.attribution for each in found])
    effects = torch.tensor([each.effect for each in found])
    assert report.pearson == pytest.approx(float(torch.corrcoef(torch.stack([estimates, effects]))[0, 1]), abs=1e-6)
    assert report.spearman is not None


def test_totals_and_counts_are_over_every_active_pair(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]
) -> None:
    row = rows[3]
    everything = AttributionStudy(backbone64, dictionaries64, row, Target(9), count=10_000)
    few = AttributionStudy(backbone64, dictionaries64, row, Target(9), count=4)
    n_active = 0
    for dictionary in dictionaries64.values():
        x = backbone64.activations(torch.tensor([row]), sites=[dictionary.site])[dictionary.site][0]
        n_active += int((latents(dictionary, x)[0] > 0).sum())
    assert everything.n_active == few.n_active == n_active == len(everything.attributions)
    assert few.attributions == everything.attributions[:4]
    for name, total in few.totals.items():
        own = [each.attribution for each in everything.attributions if each.feature.dictionary == name]
        assert total == pytest.approx(sum(own), abs=1e-10)


def test_correlations() -> None:
    x, y = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0.0, 4.0, -1.0, 9.0])
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    ranks = torch.tensor([[1, 2.5, 2.5, 4], [2, 3, 1, 4]])
    assert spearman(x, y) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert pearson(x, -3 * x + 1) == pytest.approx(-1)
    assert pearson(x, torch.ones(4)) is None
    assert pearson(x[:1], y[:1]) is None
