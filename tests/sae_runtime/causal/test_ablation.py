"""Ablation studies: which variants run, in which batches, and which features are the strongest."""

from __future__ import annotations

import torch

from sae_runtime import Backbone, Dictionary
from sae_runtime.causal.ablation import (
    AblationStudy,
    in_batches,
    strongest_features,
    total_activation,
)
from sae_runtime.causal.report import FeatureId
from tests.sae_runtime.causal.conftest import latents


def test_silent_features_do_not_run(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]
) -> None:
    site = "0.resid_post_mlp"
    x = [backbone64.activations(torch.tensor([row]), sites=[site])[site][0] for row in rows]
    z = [latents(dictionaries64["stream"], activation)[0] for activation in x]
    on = torch.stack([(of_row > 0).any(0) for of_row in z])  # [rows, latents]
    feature = int((on.sum(0) == 2).nonzero()[0])
    active = on[:, feature].tolist()
    study = AblationStudy(backbone64, dictionaries64, rows, [FeatureId("stream", feature)], ("zero", "mean"))
    assert [v.row for v in study.variants if v.ablation == "zero"] == [i for i, on in enumerate(active) if on]
    assert [v.row for v in study.variants if v.ablation == "mean"] == list(range(len(rows)))
    assert [row.item() for row in study.activity[0].active_tokens.gt(0)] == active


def test_totals_and_the_strongest(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]
) -> None:
    totals = total_activation(backbone64, dictionaries64, rows)
    expected = {}
    for name, dictionary in dictionaries64.items():
        total = 0
        for row in rows:
            x = backbone64.activations(torch.tensor([row]), sites=[dictionary.site])[dictionary.site][0]
            z, std = latents(dictionary, x)
            total = total + (z * std).sum(0)
        expected |= {(name, f): float(v) for f, v in enumerate(total * dictionary.decoder.norm(dim=1))}
        torch.testing.assert_close(totals[name], total * dictionary.decoder.norm(dim=1), atol=1e-9, rtol=0)
    best = sorted(expected, key=lambda key: -expected[key])
    strongest = strongest_features(totals, 100)
    n_active = sum(value > 0 for value in expected.values())
    assert strongest == best[: len(strongest)]
    assert len(strongest) == min(100, n_active)


def test_batches_keep_to_the_budget(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]], features: list[FeatureId]
) -> None:
    study = AblationStudy(backbone64, dictionaries64, rows, features)
    batches = in_batches(study.variants, 15)
    assert sorted(v for batch in batches for v in map(study.variants.index, batch)) == list(range(len(study.variants)))
    for batch in batches:
        assert len(batch) == 1 or sum(variant.length for variant in batch) <= 15
        assert len({variant.site for variant in batch}) == 1
