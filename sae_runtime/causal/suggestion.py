"""An edit from examples, which makes text more like one set and less like another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sae_runtime.causal.bootstrap import mean_interval
from sae_runtime.causal.report import FeatureContrast, SetScore
from sae_runtime.edits import Edit

STRENGTH_FACTORS = (0.25, 0.5, 1.0, 2.0)
"""Multiples of a feature's typical activation that are tried when a suggestion is validated."""


def suggest_edit(contrast: FeatureContrast, peaks: Sequence[float], recorded_maximum: float) -> Edit:
    """An edit towards set a.

    A feature that is stronger in a is set to its typical peak in a, in multiples of its recorded maximum. A feature
    that is stronger in b is set to zero.

    Args:
        peaks: the feature's largest activation in each text of a.
        recorded_maximum: the feature's maximum in the dictionary's statistics.

    Raises:
        ValueError: the feature has no recorded maximum.
    """
    feature = contrast.feature
    if contrast.auc < 0.5:
        return Edit(feature.dictionary, feature.feature, "ablate_zero")
    if not recorded_maximum > 0:
        raise ValueError(f"feature {feature.feature} of {feature.dictionary!r} has no recorded maximum")
    active = [peak for peak in peaks if peak > 0]
    typical = float(torch.tensor(active, dtype=torch.float64).median()) if active else 0.0
    return Edit(feature.dictionary, feature.feature, "set", value=round(typical / recorded_maximum, 3), unit="max")


def at_strength(edits: Sequence[Edit], factor: float) -> tuple[Edit, ...]:
    """The edits, with the value of those that set one multiplied by `factor`."""
    return tuple(
        Edit(edit.dictionary, edit.feature, "set", value=round(edit.value * factor, 4), unit="max")
        if edit.operation == "set"
        else edit
        for edit in edits
    )


def set_score(losses: Sequence[tuple[float, float, int, int]], seed: int = 0) -> SetScore:
    """A set's score from its texts: sum of loss changes, sum of KL, predictions with a target, and tokens of each."""
    change = torch.tensor([loss for loss, _, _, _ in losses], dtype=torch.float64)
    targets = torch.tensor([n for _, _, n, _ in losses], dtype=torch.float64)
    kl = sum(kl for _, kl, _, _ in losses) / max(sum(n for _, _, _, n in losses), 1)
    return SetScore(float(change.sum() / targets.sum()), mean_interval(change, targets, seed=seed), kl)
