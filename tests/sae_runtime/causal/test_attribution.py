"""Attributions: gradients against finite differences, effects against a hooked model."""

from __future__ import annotations

import pytest
import torch

from sae_runtime import Backbone, Dictionary
from sae_runtime.causal.attribution import AttributionStudy, Target
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
        attributions = study.run(study.attributions)
    plain, _ = hooked.logits(row)
    assert study.metric == pytest.approx(metric(plain, target), abs=1e-9)
    assert {pair.feature.dictionary for pair in attributions} == set(dictionaries64)
    for pair in attributions:
        name, feature = pair.feature.dictionary, pair.feature.feature

        def at(change, name=name, feature=feature, position=pair.position):
            replace = lambda z, p: torch.where(p == position, change(z), z)  # noqa: E731
            return metric(hooked.logits(row, [(name, feature, replace)])[0], target)

        slope = (at(lambda z: z + STEP) - at(lambda z: z - STEP)) / (2 * STEP)
        assert pair.gradient == pytest.approx(slope, abs=1e-7)
        assert pair.attribution == pytest.approx(pair.activation * pair.gradient, rel=1e-12)
        assert pair.effect == pytest.approx(study.metric - at(lambda z: 0 * z), abs=1e-8)
    sizes = [abs(pair.attribution) for pair in attributions]
    assert sizes == sorted(sizes, reverse=True)

    report = study.report(attributions)
    estimates = torch.tensor([pair.attribution for pair in attributions])
    effects = torch.tensor([pair.effect for pair in attributions])
    assert report.pearson == pytest.approx(float(torch.corrcoef(torch.stack([estimates, effects]))[0, 1]), abs=1e-6)
    assert report.spearman is not None


def test_totals_and_counts_are_over_every_active_pair(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]
) -> None:
    row = rows[3]
    complete = AttributionStudy(backbone64, dictionaries64, row, Target(9), count=10_000)
    largest = AttributionStudy(backbone64, dictionaries64, row, Target(9), count=4)
    n_active = 0
    for dictionary in dictionaries64.values():
        x = backbone64.activations(torch.tensor([row]), sites=[dictionary.site])[dictionary.site][0]
        n_active += int((latents(dictionary, x)[0] > 0).sum())
    assert complete.n_active == largest.n_active == n_active == len(complete.attributions)
    assert largest.attributions == complete.attributions[:4]
    for name, total in largest.totals.items():
        of_dictionary = [pair.attribution for pair in complete.attributions if pair.feature.dictionary == name]
        assert total == pytest.approx(sum(of_dictionary), abs=1e-10)
