"""Ablation studies against Hugging Face's GPT-2 with one forward hook a variant, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_runtime import Backbone, Dictionary
from sae_runtime.causal.ablation import (
    AblationStudy,
    in_batches,
    strongest_features,
    total_activation,
)
from sae_runtime.causal.ablation_report import StudyResult, summarize
from sae_runtime.causal.bootstrap import mean_interval
from sae_runtime.causal.report import AblationReport, FeatureEffect, FeatureId
from tests.sae_runtime.causal.conftest import HookedModel, latents

TOKENS = (50, 8)
ABLATIONS = ("zero", "mean")


@pytest.fixture(scope="module")
def features(backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]) -> list[FeatureId]:
    totals = total_activation(backbone64, dictionaries64, rows)
    return [feature for name in totals for feature in strongest_features({name: totals[name]}, 3)]


@pytest.fixture(scope="module")
def report(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]], features: list[FeatureId]
) -> AblationReport:
    results = []
    for part in (rows[:3], rows[3:]):  # two studies, as an engine cuts a long request
        study = AblationStudy(backbone64, dictionaries64, part, features, ABLATIONS, tokens=TOKENS, single_tokens=2)
        effects = [effect for batch in in_batches(study.variants, 64) for effect in study.run(batch)]
        results.append(StudyResult.of(study, effects))
    return summarize(features, ABLATIONS, results, n_chosen=len(TOKENS))


class Reference:
    """One variant, run alone."""

    def __init__(self, hooked: HookedModel, row: list[int], effect: FeatureEffect, position: int | None = None) -> None:
        name, feature = effect.feature.dictionary, effect.feature.feature
        statistics = hooked.dictionaries[name].statistics
        new = 0.0 if effect.ablation == "zero" else float(statistics.mean[feature])
        plain, _ = hooked.logits(row)

        def replace(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            return torch.full_like(z, new) if position is None else torch.where(p == position, new, z)

        changed, (z,) = hooked.logits(row, [(name, feature, replace)])
        p, q = plain.log_softmax(-1), changed.log_softmax(-1)
        targets = torch.tensor(row[1:])[:, None]
        self.z = z
        self.loss = (p - q)[:-1].gather(1, targets)[:, 0]
        self.right = (q[:-1].argmax(-1) == targets[:, 0]).double() - (p[:-1].argmax(-1) == targets[:, 0]).double()
        self.kl = (p.exp() * (p - q)).sum(-1)
        self.target_logit = (changed - plain)[:-1].gather(1, targets)[:, 0]
        self.logits = (changed - plain)[:, list(TOKENS)]


def test_effects_over_all_and_over_active_tokens(
    hooked: HookedModel, rows: list[list[int]], report: AblationReport
) -> None:
    assert len(report.effects) == 18
    assert {effect.feature.dictionary for effect in report.effects} == {"stream", "neurons", "attention"}
    for effect in report.effects:
        runs = [Reference(hooked, row, effect) for row in rows]
        z = torch.cat([run.z for run in runs])
        assert effect.active_tokens == int((z > 0).sum())
        assert effect.active_texts == sum(bool((run.z > 0).any()) for run in runs)
        assert effect.mean_activation == pytest.approx(float(z[z > 0].mean()), rel=1e-6)
        everywhere, at_active = effect.everywhere, effect.at_active
        n_targets = sum(len(row) - 1 for row in rows)
        assert (everywhere.n_tokens, everywhere.n_targets) == (sum(map(len, rows)), n_targets)
        for figures, masks in (
            (everywhere, [torch.ones(len(row), dtype=torch.bool) for row in rows]),
            (at_active, [run.z > 0 for run in runs]),
        ):
            targets = [mask[:-1] for mask in masks]
            loss = torch.cat([run.loss[mask] for run, mask in zip(runs, targets, strict=True)])
            right = torch.cat([run.right[mask] for run, mask in zip(runs, targets, strict=True)])
            target_logit = torch.cat([run.target_logit[mask] for run, mask in zip(runs, targets, strict=True)])
            kl = torch.cat([run.kl[mask] for run, mask in zip(runs, masks, strict=True)])
            logits = torch.cat([run.logits[mask] for run, mask in zip(runs, masks, strict=True)])
            assert (figures.n_tokens, figures.n_targets) == (len(kl), len(loss))
            assert figures.delta_loss == pytest.approx(float(loss.mean()), abs=1e-8)
            assert figures.delta_accuracy == pytest.approx(float(right.mean()), abs=1e-12)
            assert figures.kl == pytest.approx(float(kl.mean()), abs=1e-8)
            assert figures.delta_target_logit == pytest.approx(float(target_logit.mean()), abs=1e-8)
            assert figures.delta_logits == pytest.approx(logits.mean(0).tolist(), abs=1e-8)
        assert effect.text_delta_loss == pytest.approx([float(run.loss.mean()) for run in runs], abs=1e-8)
        assert effect.text_kl == pytest.approx([float(run.kl.mean()) for run in runs], abs=1e-8)
        low, high = effect.delta_loss_interval
        assert low <= everywhere.delta_loss <= high
    sizes = [effect.everywhere.kl for effect in report.effects]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1e-3


def test_effects_by_distance_from_the_changed_token(
    hooked: HookedModel, rows: list[list[int]], report: AblationReport
) -> None:
    for effect in report.effects:
        figures: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            z = Reference(hooked, row, effect).z
            strongest = [int(i) for i in z.argsort(descending=True)[:2] if z[i] > 0]
            for position in strongest:
                run = Reference(hooked, row, effect, position)
                for at in range(position, len(row)):
                    loss = float(run.loss[at]) if at < len(row) - 1 else float("nan")
                    figures.setdefault(at - position, []).append((loss, float(run.kl[at])))
        assert effect.by_distance[0].first == 0
        for each in effect.by_distance:
            pairs = [pair for distance in range(each.first, each.last + 1) for pair in figures.pop(distance, [])]
            assert each.figures.n_tokens == len(pairs)
            assert each.figures.kl == pytest.approx(np.mean([kl for _, kl in pairs]), abs=1e-8)
            losses = [loss for loss, _ in pairs if loss == loss]
            assert each.figures.delta_loss == pytest.approx(np.mean(losses) if losses else 0, abs=1e-8)
        assert not figures
    assert [(each.first, each.last) for each in report.effects[0].by_distance][:5] == [
        (0, 0), (1, 1), (2, 2), (3, 4), (5, 8),
    ]  # fmt: skip


def test_unedited_figures(hooked: HookedModel, rows: list[list[int]], report: AblationReport) -> None:
    losses, right = [], []
    for row in rows:
        logits, _ = hooked.logits(row)
        targets = torch.tensor(row[1:])
        losses += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none").tolist()
        right += (logits[:-1].argmax(-1) == targets).tolist()
    assert (report.n_texts, report.n_targets) == (len(rows), len(losses))
    assert report.loss == pytest.approx(np.mean(losses))
    assert report.accuracy == pytest.approx(np.mean(right))


def test_silent_features_do_not_run(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]
) -> None:
    site = "0.resid_post_mlp"
    x = [backbone64.activations(torch.tensor([row]), sites=[site])[site][0] for row in rows]
    z = [latents(dictionaries64["stream"], each)[0] for each in x]
    on = torch.stack([(part > 0).any(0) for part in z])  # [rows, latents]
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
    found = strongest_features(totals, 100)
    n_active = sum(value > 0 for value in expected.values())
    assert [(each.dictionary, each.feature) for each in found] == best[: len(found)]
    assert len(found) == min(100, n_active)


def test_batches_keep_to_the_budget(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]], features: list[FeatureId]
) -> None:
    study = AblationStudy(backbone64, dictionaries64, rows, features)
    batches = in_batches(study.variants, 15)
    assert sorted(v for batch in batches for v in map(study.variants.index, batch)) == list(range(len(study.variants)))
    for batch in batches:
        assert len(batch) == 1 or sum(variant.length for variant in batch) <= 15
        assert len({variant.site for variant in batch}) == 1


def test_bootstrap_interval_is_that_of_resampled_texts() -> None:
    sums, counts = torch.tensor([3.0, -1.0, 0.5, 8.0, 2.0]), torch.tensor([2.0, 1.0, 4.0, 3.0, 2.0])
    rng = np.random.default_rng(0)
    drawn = rng.integers(5, size=(200_000, 5))
    ratios = sums.numpy()[drawn].sum(1) / counts.numpy()[drawn].sum(1)
    found = mean_interval(sums, counts, resamples=200_000)
    assert found == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.01)
    assert mean_interval(sums, counts) == mean_interval(sums, counts)
    assert mean_interval(torch.tensor([4.0]), torch.tensor([2.0])) == (2.0, 2.0)
    with pytest.raises(ValueError, match="0 texts"):
        mean_interval(torch.zeros(0))
