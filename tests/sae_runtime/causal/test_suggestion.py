"""Edits suggested from contrasts, and their scores, by hand."""

from __future__ import annotations

import pytest

from sae_runtime import Edit
from sae_runtime.causal.report import FeatureContrast, FeatureId
from sae_runtime.causal.suggestion import at_strength, set_score, suggest_edit


def test_suggestions() -> None:
    def contrast(auc: float) -> FeatureContrast:
        return FeatureContrast(FeatureId("d", 4), 2.0, 0.5, 3, 1, 1.2, auc, 0.01, 0.02)

    towards = suggest_edit(contrast(0.9), [0.0, 2.0, 6.0, 3.0], recorded_maximum=12.0)
    assert towards == Edit("d", 4, "set", value=0.25, unit="max")
    away = suggest_edit(contrast(0.1), [0.0], recorded_maximum=12.0)
    assert away == Edit("d", 4, "ablate_zero")
    assert at_strength([towards, away], 0.5) == (Edit("d", 4, "set", value=0.125, unit="max"), away)
    with pytest.raises(ValueError, match="no recorded maximum"):
        suggest_edit(contrast(0.9), [1.0], recorded_maximum=0.0)

    score = set_score([(1.0, 0.3, 4, 5), (-3.0, 0.9, 6, 7)])
    assert score.delta_loss == pytest.approx(-0.2)
    assert score.interval == pytest.approx((-0.5, 0.25))
    assert score.kl == pytest.approx(0.1)
