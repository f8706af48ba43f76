"""Averages the effects of an ablation study's variants into figures of each feature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.causal.ablation import (
    DISTANCE_ENDS,
    N_FIGURES,
    AblationStudy,
    FeatureActivity,
    VariantEffect,
)
from sae_runtime.causal.bootstrap import mean_interval
from sae_runtime.causal.report import (
    Ablation,
    AblationReport,
    DistanceEffect,
    EffectFigures,
    FeatureEffect,
    FeatureId,
    RankBy,
)


@dataclass(frozen=True, eq=False)
class StudyResult:
    """The results of one study that `summarize` needs, all on the host."""

    lengths: tuple[int, ...]
    unedited: tuple[Tensor, Tensor, Tensor]
    activity: Sequence[FeatureActivity]
    effects: Sequence[VariantEffect]

    @classmethod
    def of(cls, study: AblationStudy, effects: Sequence[VariantEffect]) -> StudyResult:
        return cls(study.lengths, study.unedited, study.activity, effects)


def summarize(
    features: Sequence[FeatureId],
    ablations: Sequence[Ablation],
    results: Sequence[StudyResult],
    *,
    n_chosen: int = 0,
    rank_by: RankBy = "kl",
    seed: int = 0,
) -> AblationReport:
    """One report over the rows of several studies of the same features, in their order.

    Args:
        n_chosen: number of chosen tokens.
        rank_by: the features are sorted by the size of this figure over all predictions. "logit" is that of the first
            chosen token, or of the token that follows if none is chosen.
        seed: of the bootstrap.
    """
    targets = torch.cat([result.unedited[0] for result in results])  # [R]
    lengths = torch.tensor([length for result in results for length in result.lengths], dtype=torch.float64)
    first_row = [0]
    for result in results:
        first_row.append(first_row[-1] + len(result.lengths))
    n_figures, n_rows, n_buckets = N_FIGURES + n_chosen, len(lengths), len(DISTANCE_ENDS)
    by_text: dict[tuple[int, Ablation], Tensor] = {}
    at_active: dict[tuple[int, Ablation], Tensor] = {}
    by_distance: dict[tuple[int, Ablation], Tensor] = {}
    for feature in range(len(features)):
        for ablation in ablations:
            by_text[feature, ablation] = torch.zeros(n_rows, n_figures, dtype=torch.float64)
            at_active[feature, ablation] = torch.zeros(n_figures, dtype=torch.float64)
            by_distance[feature, ablation] = torch.zeros(n_buckets, n_figures, dtype=torch.float64)
    for result, offset in zip(results, first_row, strict=False):
        for effect in result.effects:
            variant = effect.variant
            key = (variant.feature, variant.ablation)
            if effect.by_distance is not None:
                by_distance[key] += effect.by_distance
            else:
                by_text[key][offset + variant.row] += effect.total
                at_active[key] += effect.active

    effects = []
    for (feature, ablation), sums in by_text.items():
        active = torch.cat([result.activity[feature].active_tokens for result in results])
        total = float(torch.cat([result.activity[feature].total for result in results]).sum())
        # Tokens that did not run are unchanged. They count with a change of 0.
        everywhere = sums.sum(0)
        everywhere[0], everywhere[1] = lengths.sum(), targets.sum()
        effects.append(
            FeatureEffect(
                feature=features[feature],
                ablation=ablation,
                active_tokens=int(active.sum()),
                active_texts=int((active > 0).sum()),
                mean_activation=total / max(int(active.sum()), 1),
                everywhere=_means(everywhere),
                at_active=_means(at_active[feature, ablation]),
                delta_loss_interval=mean_interval(sums[:, 2], targets, seed=seed),
                text_delta_loss=tuple((sums[:, 2] / targets.clamp_min(1)).tolist()),
                text_kl=tuple((sums[:, 5] / lengths).tolist()),
                by_distance=tuple(_distances(by_distance[feature, ablation])),
            )
        )
    n_targets = int(targets.sum())
    return AblationReport(
        n_texts=n_rows,
        n_targets=n_targets,
        loss=float(torch.cat([result.unedited[1] for result in results]).sum()) / n_targets,
        accuracy=float(torch.cat([result.unedited[2] for result in results]).sum()) / n_targets,
        effects=tuple(sorted(effects, key=lambda effect: -_size(effect.everywhere, rank_by))),
    )


def _means(sums: Tensor) -> EffectFigures:
    """Means from sums [C] of a VariantEffect; 0 where there is nothing to average."""
    n_tokens, n_targets, loss, correct, target_logit, kl, *logits = sums.tolist()
    return EffectFigures(
        n_tokens=round(n_tokens),
        n_targets=round(n_targets),
        delta_loss=loss / max(n_targets, 1),
        delta_accuracy=correct / max(n_targets, 1),
        kl=kl / max(n_tokens, 1),
        delta_target_logit=target_logit / max(n_targets, 1),
        delta_logits=tuple(logit / max(n_tokens, 1) for logit in logits),
    )


def _distances(sums: Tensor) -> list[DistanceEffect]:
    effects = []
    for i, end in enumerate(DISTANCE_ENDS):
        if sums[i, 0] > 0:
            first, last = DISTANCE_ENDS[i - 1] if i else 0, min(end - 1, 2**31 - 1)
            effects.append(DistanceEffect(first, last, _means(sums[i])))
    return effects


def _size(figures: EffectFigures, rank_by: RankBy) -> float:
    match rank_by:
        case "kl":
            size = figures.kl
        case "loss":
            size = figures.delta_loss
        case "accuracy":
            size = figures.delta_accuracy
        case _:
            size = figures.delta_logits[0] if figures.delta_logits else figures.delta_target_logit
    return math.fabs(size)
