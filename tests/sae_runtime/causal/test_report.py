"""Results of measurements: what they derive, and that they need no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from sae_runtime.causal.report import FeatureId, TextScore, TokenScores


def scores(*loss: float) -> TokenScores:
    n = len(loss)
    return TokenScores(
        loss=np.array(loss, np.float32),
        correct=np.zeros(n, np.bool_),
        target_logits=np.zeros(n, np.float32),
        token_logits=np.zeros((n + 1, 0), np.float32),
        mean_loss=float(np.mean(loss)),
        accuracy=0.0,
    )


def test_the_change_of_the_loss_is_edited_less_unedited() -> None:
    kl = np.zeros(3, np.float32)
    np.testing.assert_array_equal(TextScore(scores(1.0, 2.0), scores(1.5, 0.5), kl).delta_loss, [0.5, -1.5])
    assert TextScore(scores(1.0, 2.0), None, None).delta_loss is None


def test_a_feature_is_a_pair() -> None:
    feature = FeatureId("resid-mid", 7)
    assert feature == ("resid-mid", 7)
    dictionary, number = feature
    assert (dictionary, number) == (feature.dictionary, feature.feature)


def test_results_need_no_torch() -> None:
    script = "import sae_runtime.causal.report, sys; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"
