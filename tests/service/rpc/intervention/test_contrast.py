"""ContrastFeatures equals the library's contrasts, and its trials what Score gives."""

from __future__ import annotations

import numpy as np
import pytest

from sae_runtime.causal.contrast import active_columns, aggregate_texts, contrast_features
from sae_runtime.causal.report import FeatureId
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import feature_service_pb2
from tests.service.conftest import Served
from tests.service.rpc.intervention.texts import ids, inputs


@pytest.mark.parametrize("aggregation", ["max", "mean"])
async def test_contrasts_equal_the_librarys(served: Served, aggregation: str) -> None:
    # No two begin alike: their first tokens would have equal activations, and rounding would decide whether these tie.
    a = ["the cat sat", "my dog sat on it", "cats and dogs", "a cat"]
    b = ["1 + 1 = 2", "3 * 4 = 12", "7 - 5 = 2"]
    names = ["mid", "wide"]
    request = pb.ContrastFeaturesRequest(
        a=inputs(*a),
        b=inputs(*b),
        dictionaries=names,
        aggregation=feature_service_pb2.AGGREGATION_MEAN if aggregation == "mean" else 0,
        count=30,
        suggest=2,
        validate=True,
    )
    reply = await served.interventions.ContrastFeatures(request)
    dictionaries = {name: served.dictionaries[name] for name in names}
    rows_a, rows_b = ([ids(served, text) for text in texts] for texts in (a, b))
    of_a, of_b = (aggregate_texts(served.backbone, dictionaries, rows, aggregation) for rows in (rows_a, rows_b))
    expected = contrast_features({name: active_columns(of_a[name], of_b[name]) for name in names})
    assert reply.n_tested == len(expected)
    assert reply.n_found == sum(each.q_value <= 0.05 for each in expected)
    by_feature = {each.feature: each for each in expected}
    for found in reply.features:
        theirs = by_feature[FeatureId(found.feature.dictionary, found.feature.feature)]
        for name in ("mean_a", "mean_b", "active_a", "active_b", "effect_size", "auc", "p_value", "q_value"):
            assert getattr(found, name) == pytest.approx(getattr(theirs, name), rel=1e-3, abs=1e-5)
    assert [each.p_value for each in reply.features] == pytest.approx([each.p_value for each in expected[:30]])

    assert len(reply.suggestion) == 2
    best = max(reply.trials, key=lambda trial: trial.shift)
    assert list(best.edits) == list(reply.suggestion)
    for trial in reply.trials:
        for texts, score in ((a, trial.a), (b, trial.b)):
            scored = await served.interventions.Score(pb.ScoreRequest(inputs=inputs(*texts), edits=trial.edits))
            change = [np.array(r.edited.loss, float) - np.array(r.unedited.loss) for r in scored.results]
            assert score.delta_loss == pytest.approx(np.concatenate(change).mean(), abs=1e-5)
            assert score.delta_loss_low <= score.delta_loss <= score.delta_loss_high
            assert score.kl == pytest.approx(np.concatenate([r.kl for r in scored.results]).mean(), abs=1e-5)
        assert trial.shift == pytest.approx(trial.b.delta_loss - trial.a.delta_loss)

    request.false_discovery_rate = 1e-9
    assert not (await served.interventions.ContrastFeatures(request)).features
