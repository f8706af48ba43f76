"""Figures of ablation studies against Hugging Face's GPT-2 with one forward hook a variant, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_runtime import Backbone, Dictionary
from sae_runtime.causal.ablation import (
    AblationStudy,
    in_batches,
)
from sae_runtime.causal.ablation_summary import StudyResult, summarize
from sae_runtime.causal.report import AblationReport, FeatureEffect, FeatureId
from tests.sae_runtime.causal.conftest import HookedModel

TOKENS = (50, 8)
ABLATIONS = ("zero", "mean")


@pytest.fixture(scope="module")
def report(
    backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]], features: list[FeatureId]
) -> AblationReport:
    results = []
    for study_rows in (rows[:3], rows[3:]):  # two studies, as an engine cuts a long request
        study = AblationStudy(
            backbone64, dictionaries64, study_rows, features, ABLATIONS, tokens=TOKENS, single_tokens=2
        )
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
        self.correct = (q[:-1].argmax(-1) == targets[:, 0]).double() - (p[:-1].argmax(-1) == targets[:, 0]).double()
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
            correct = torch.cat([run.correct[mask] for run, mask in zip(runs, targets, strict=True)])
            target_logit = torch.cat([run.target_logit[mask] for run, mask in zip(runs, targets, strict=True)])
            kl = torch.cat([run.kl[mask] for run, mask in zip(runs, masks, strict=True)])
            logits = torch.cat([run.logits[mask] for run, mask in zip(runs, masks, strict=True)])
            assert (figures.n_tokens, figures.n_targets) == (len(kl), len(loss))
            assert figures.delta_loss == pytest.approx(float(loss.mean()), abs=1e-8)
            assert figures.delta_accuracy == pytest.approx(float(correct.mean()), abs=1e-12)
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
        for bucket in effect.by_distance:
            pairs = [pair for distance in range(bucket.first, bucket.last + 1) for pair in figures.pop(distance, [])]
            assert bucket.figures.n_tokens == len(pairs)
            assert bucket.figures.kl == pytest.approx(np.mean([kl for _, kl in pairs]), abs=1e-8)
            losses = [loss for loss, _ in pairs if loss == loss]
            assert bucket.figures.delta_loss == pytest.approx(np.mean(losses) if losses else 0, abs=1e-8)
        assert not figures
    assert [(bucket.first, bucket.last) for bucket in report.effects[0].by_distance][:5] == [
        (0, 0), (1, 1), (2, 2), (3, 4), (5, 8),
    ]  # fmt: skip


def test_unedited_figures(hooked: HookedModel, rows: list[list[int]], report: AblationReport) -> None:
    losses, correct = [], []
    for row in rows:
        logits, _ = hooked.logits(row)
        targets = torch.tensor(row[1:])
        losses += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none").tolist()
        correct += (logits[:-1].argmax(-1) == targets).tolist()
    assert (report.n_texts, report.n_targets) == (len(rows), len(losses))
    assert report.loss == pytest.approx(np.mean(losses))
    assert report.accuracy == pytest.approx(np.mean(correct))
