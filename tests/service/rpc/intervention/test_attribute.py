"""AttributeFeatures equals the library's attributions."""

from __future__ import annotations

import pytest

from sae_runtime.causal.attribution import AttributionStudy, Target
from sae_runtime.dictionary.ranking import Ranking, ranking_table
from service.pb.saeserve.v1 import causal_pb2 as pb
from tests.builders import edited_model
from tests.service.conftest import Served
from tests.service.rpc.intervention.texts import TEXTS, ids, inputs


async def test_attributions_equal_the_librarys(served: Served) -> None:
    row = ids(served, TEXTS[2])
    names = ["early", "mid", "wide", "delta"]
    request = pb.AttributeFeaturesRequest(
        input=inputs(TEXTS[2])[0],
        dictionaries=names,
        target=pb.TokenChoice(text="r"),
        foil=pb.TokenChoice(id=8),
        position=20,
        count=12,
        include_tokens=True,
    )
    reply = await served.interventions.AttributeFeatures(request)
    target = ids(served, "r")[0]
    study = AttributionStudy(
        served.backbone,
        {name: served.dictionaries[name] for name in names},
        row[:21],
        Target(target, 8),
        count=12,
    )
    expected = study.report(study.run(study.attributions))
    assert (reply.target_id, reply.foil_id, reply.position, len(reply.tokens.ids)) == (target, 8, 20, 21)
    assert reply.metric == pytest.approx(expected.metric, abs=1e-4)
    assert reply.n_active == expected.n_active
    assert dict(reply.totals) == pytest.approx(dict(expected.totals), abs=1e-4)
    assert (reply.pearson, reply.spearman) == pytest.approx((expected.pearson, expected.spearman), abs=1e-3)
    for own, theirs in zip(reply.attributions, expected.attributions, strict=True):
        assert (own.feature.dictionary, own.feature.feature, own.position) == (
            theirs.feature.dictionary,
            theirs.feature.feature,
            theirs.position,
        )
        assert own.attribution == pytest.approx(theirs.attribution, abs=1e-5)
        assert own.effect == pytest.approx(theirs.effect, abs=1e-4)

    request.ClearField("target")
    request.ClearField("foil")
    request.ClearField("position")
    likeliest = await served.interventions.AttributeFeatures(request)
    logits = edited_model(served.backbone, served.dictionaries).next_logits(row, len(row), [])
    assert likeliest.target_id == int(logits.argmax())
    assert not likeliest.HasField("foil_id")
    assert likeliest.metric == pytest.approx(float(logits.max()), abs=1e-4)


@pytest.mark.parametrize("ranking", ["surprise", "z_score"])
async def test_the_order_weighs_the_size_of_attributions(served: Served, ranking: Ranking) -> None:
    request = pb.AttributeFeaturesRequest(input=inputs(TEXTS[3])[0], dictionaries=["early"], count=256)
    everything = (await served.interventions.AttributeFeatures(request)).attributions
    assert 6 < len(everything) < 256
    scale = ranking_table(served.dictionaries["early"].statistics, ranking).scale
    expected = sorted(everything, key=lambda a: -abs(a.attribution) * scale[a.feature.feature])[:6]
    request.count, request.rank_by = 6, f"FEATURE_RANKING_{ranking.upper()}"  # type: ignore[assignment]
    found = (await served.interventions.AttributeFeatures(request)).attributions
    assert [(a.feature.feature, a.position) for a in found] == [(a.feature.feature, a.position) for a in expected]
    assert [a.attribution for a in found] == pytest.approx([a.attribution for a in expected], abs=1e-5)
