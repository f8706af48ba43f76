"""Score, AblateFeatures, AttributeFeatures and ContrastFeatures on a plain gRPC server."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sae_runtime import Edit
from sae_runtime.causal.ablation import AblationStudy, strongest_features, total_activation
from sae_runtime.causal.ablation_report import StudyResult, summarize
from sae_runtime.causal.attribution import AttributionStudy, Target
from sae_runtime.causal.contrast import active_columns, aggregate_texts, contrast_features
from sae_runtime.causal.report import FeatureId
from service.engine.settings import EngineSettings
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import common_pb2, edits_pb2, feature_service_pb2, server_service_pb2
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve
from tests.service.engine.models import SlowGenerator

TEXTS = ["Once upon a time", "x = 1 + 2", "Zwölf Boxkämpfer jagen Viktor", "no"]


def inputs(*texts: str) -> list[common_pb2.TextInput]:
    return [common_pb2.TextInput(text=text) for text in texts or TEXTS]


def ids(served: Served, text: str) -> list[int]:
    return served.backbone.encode_text(text).ids


async def failure(call: object) -> tuple[grpc.StatusCode, list[object]]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    details = rpc_status.from_call(raised.value).details
    kinds = (
        error_details_pb2.BadRequest,
        error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.RequestInfo,
    )
    found = []
    for detail in details:
        for kind in kinds:
            message = kind()
            if detail.Unpack(message):
                found.append(message)
    return raised.value.code(), found


async def test_scores_equal_the_hooked_model(served: Served) -> None:
    reference = SlowGenerator(served.backbone, served.dictionaries)
    messages = [
        edits_pb2.Edit(dictionary="mid", feature=3, set=edits_pb2.Amount(value=6.0)),
        edits_pb2.Edit(
            dictionary="wide",
            feature=5,
            ablate=edits_pb2.ABLATION_MEAN,
            positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_LAST),
        ),
    ]
    choices = [pb.TokenChoice(text="e"), pb.TokenChoice(id=9)]
    plain, edited = await asyncio.gather(
        served.interventions.Score(pb.ScoreRequest(inputs=inputs(), logit_tokens=choices, include_tokens=True)),
        served.interventions.Score(
            pb.ScoreRequest(request_id="s-1", inputs=inputs(), edits=messages, logit_tokens=choices)
        ),
    )
    assert edited.request_id == "s-1"
    assert list(plain.logit_token_ids) == [ids(served, "e")[0], 9]
    for text, without, both in zip(TEXTS, plain.results, edited.results, strict=True):
        row = ids(served, text)
        assert b"".join(without.tokens.pieces).decode() == text
        assert without.n_tokens == both.n_tokens == len(row)
        assert not without.HasField("edited")
        edits = [
            Edit("mid", 3, "set", value=6.0),
            Edit("wide", 5, "ablate_mean", positions=(len(row) - 1,)),
        ]
        before = torch.stack([reference.next_logits(row[: i + 1], len(row), []) for i in range(len(row))])
        after = torch.stack([reference.next_logits(row[: i + 1], len(row), edits) for i in range(len(row))])
        for scores, logits in ((without.unedited, before), (both.unedited, before), (both.edited, after)):
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none")
            np.testing.assert_allclose(scores.loss, loss, atol=1e-4)
            assert scores.mean_loss == pytest.approx(float(loss.mean()), abs=1e-4)
            right = (logits[:-1].argmax(-1) == torch.tensor(row[1:])).tolist()
            assert list(scores.correct) == right
            assert scores.accuracy == pytest.approx(np.mean(right))
            wanted = logits[:, list(plain.logit_token_ids)]
            np.testing.assert_allclose(np.array(scores.token_logits).reshape(-1, 2), wanted, atol=1e-3)
            targets = logits[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            np.testing.assert_allclose(scores.target_logits, targets, atol=1e-3)
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        np.testing.assert_allclose(both.kl, (p.exp() * (p - q)).sum(-1), atol=1e-4)
    assert max(edited.results[0].kl) > 1e-3
    assert edited.timing.total_ms >= edited.timing.compute_ms > 0


async def test_an_ablation_study_equals_the_librarys(served: Served) -> None:
    rows = [ids(served, text) for text in TEXTS]
    features = [FeatureId("mid", 3), FeatureId("early", 7), FeatureId("delta", 1)]
    reply = await served.interventions.AblateFeatures(
        pb.AblateFeaturesRequest(
            inputs=inputs(),
            features=[pb.FeatureKey(dictionary=each.dictionary, feature=each.feature) for each in features],
            ablations=[edits_pb2.ABLATION_MEAN, edits_pb2.ABLATION_ZERO],
            logit_tokens=[pb.TokenChoice(id=4)],
            single_tokens=1,
            rank_by=pb.ABLATION_RANKING_LOSS,
        )
    )
    study = AblationStudy(
        served.backbone, served.dictionaries, rows, features, ("mean", "zero"), tokens=[4], single_tokens=1
    )
    result = StudyResult.of(study, study.run(study.variants))
    expected = summarize(features, ("mean", "zero"), [result], n_chosen=1, rank_by="loss")
    assert (reply.n_texts, reply.n_targets, reply.n_variants) == (4, expected.n_targets, len(study.variants))
    assert reply.loss == pytest.approx(expected.loss, abs=1e-5)
    sizes = [abs(effect.everywhere.delta_loss) for effect in reply.effects]
    assert sizes == sorted(sizes, reverse=True)
    names = {"mean": edits_pb2.ABLATION_MEAN, "zero": edits_pb2.ABLATION_ZERO}
    by_key = {(e.feature.dictionary, e.feature.feature, e.ablation): e for e in reply.effects}
    for effect in expected.effects:
        found = by_key[effect.feature.dictionary, effect.feature.feature, names[effect.ablation]]
        assert (found.active_tokens, found.active_texts) == (effect.active_tokens, effect.active_texts)
        assert found.mean_activation == pytest.approx(effect.mean_activation, rel=1e-5)
        for name in ("n_tokens", "n_targets", "delta_loss", "delta_accuracy", "kl", "delta_target_logit"):
            for part in ("everywhere", "at_active"):
                own, theirs = getattr(getattr(found, part), name), getattr(getattr(effect, part), name)
                assert own == pytest.approx(theirs, abs=1e-5)
        np.testing.assert_allclose(found.everywhere.delta_logits, effect.everywhere.delta_logits, atol=1e-5)
        np.testing.assert_allclose(found.text_delta_loss, effect.text_delta_loss, atol=1e-5)
        np.testing.assert_allclose(found.text_kl, effect.text_kl, atol=1e-5)
        assert (found.delta_loss_low, found.delta_loss_high) == pytest.approx(effect.delta_loss_interval, abs=1e-5)
        assert [(d.first, d.last) for d in found.by_distance] == [(d.first, d.last) for d in effect.by_distance]
        for own, theirs in zip(found.by_distance, effect.by_distance, strict=True):
            assert own.figures.kl == pytest.approx(theirs.figures.kl, abs=1e-5)


async def test_the_strongest_features_in_small_batches_beside_other_work() -> None:
    settings = ReplicaSettings(limits=LIMITS, engine=EngineSettings(max_batch_tokens=24))
    async for served in serve(settings):
        request = pb.AblateFeaturesRequest(
            inputs=inputs(), strongest=pb.StrongestFeatures(count=5, dictionaries=["mid", "wide"])
        )
        extract = feature_service_pb2.ExtractFeaturesRequest(inputs=inputs("beside"), dictionaries=["mid"])
        reply, *others = await asyncio.gather(
            served.interventions.AblateFeatures(request), *(served.features.ExtractFeatures(extract) for _ in range(9))
        )
        assert all(len(other.results) == 1 for other in others)
        dictionaries = {name: served.dictionaries[name] for name in ("mid", "wide")}
        rows = [ids(served, text) for text in TEXTS]
        features = strongest_features(total_activation(served.backbone, dictionaries, rows), 5)
        assert {(e.feature.dictionary, e.feature.feature) for e in reply.effects} == {
            (each.dictionary, each.feature) for each in features
        }
        study = AblationStudy(served.backbone, dictionaries, rows, features)
        expected = summarize(features, ("zero",), [StudyResult.of(study, study.run(study.variants))])
        assert [effect.everywhere.kl for effect in reply.effects] == pytest.approx(
            [effect.everywhere.kl for effect in expected.effects], abs=1e-5
        )
        assert reply.n_variants == len(study.variants)


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
    logits = SlowGenerator(served.backbone, served.dictionaries).next_logits(row, len(row), [])
    assert likeliest.target_id == int(logits.argmax())
    assert not likeliest.HasField("foil_id")
    assert likeliest.metric == pytest.approx(float(logits.max()), abs=1e-4)


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


async def test_unknown_features_and_dictionaries_are_not_found(served: Served) -> None:
    def ablate(*features: tuple[str, int]) -> object:
        keys = [pb.FeatureKey(dictionary=name, feature=feature) for name, feature in features]
        return served.interventions.AblateFeatures(
            pb.AblateFeaturesRequest(request_id="a-1", inputs=inputs(), features=keys)
        )

    code, details = await failure(ablate(("mid", 3), ("mid", 96), ("wide", 2**32 - 1)))
    assert code is grpc.StatusCode.NOT_FOUND
    resources = [d for d in details if isinstance(d, error_details_pb2.ResourceInfo)]
    assert [(r.resource_type, r.resource_name) for r in resources] == [
        ("saeserve.v1.Feature", "mid:96"),
        ("saeserve.v1.Feature", "wide:4294967295"),
    ]
    assert [d.request_id for d in details if isinstance(d, error_details_pb2.RequestInfo)] == ["a-1"]
    code, details = await failure(ablate(("nowhere", 3)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert [d.resource_name for d in details if isinstance(d, error_details_pb2.ResourceInfo)] == ["nowhere"]


async def test_the_mean_needs_statistics(served: Served) -> None:
    request = pb.AblateFeaturesRequest(
        inputs=inputs(),
        features=[pb.FeatureKey(dictionary="plain", feature=1)],
        ablations=[edits_pb2.ABLATION_MEAN],
    )
    code, details = await failure(served.interventions.AblateFeatures(request))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    (found,) = [d for d in details if isinstance(d, error_details_pb2.PreconditionFailure)]
    assert [(v.type, v.subject) for v in found.violations] == [("STATISTICS", "ablations")]


async def test_an_edit_out_of_range_fails_alone(served: Served) -> None:
    wild = edits_pb2.Edit(dictionary="plain", feature=1, set=edits_pb2.Amount(value=3e38))
    fine = edits_pb2.Edit(dictionary="plain", feature=1, set=edits_pb2.Amount(value=1.0))
    calls = [served.interventions.Score(pb.ScoreRequest(inputs=inputs(), edits=[e])) for e in (fine, wild, fine)]
    first, bad, last = await asyncio.gather(calls[0], failure(calls[1]), calls[2])
    assert bad[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for d in bad[1] if isinstance(d, error_details_pb2.BadRequest) for v in d.field_violations] == [
        "edits"
    ]
    np.testing.assert_allclose(first.results[0].edited.loss, last.results[0].edited.loss, atol=1e-5)
    assert np.isfinite(first.results[0].edited.loss).all()


async def test_limits_are_settings_that_the_server_tells() -> None:
    tight = replace_limits(
        max_ablated_features=2, max_variant_tokens=100, max_logit_tokens=1, max_attributions=3, max_contrast_texts=2,
        max_contrast_tokens=30,
    )  # fmt: skip
    async for served in serve(ReplicaSettings(limits=tight)):
        told = (await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())).limits
        assert (told.max_ablated_features, told.max_variant_tokens, told.max_logit_tokens) == (2, 100, 1)
        assert (told.max_attributions, told.max_contrast_texts, told.max_contrast_tokens) == (3, 2, 30)
        keys = [pb.FeatureKey(dictionary="mid", feature=i) for i in range(3)]
        two = [pb.TokenChoice(id=1), pb.TokenChoice(id=2)]
        stub = served.interventions
        cases = {
            "features": stub.AblateFeatures(pb.AblateFeaturesRequest(inputs=inputs(), features=keys)),
            "inputs": stub.AblateFeatures(
                pb.AblateFeaturesRequest(inputs=inputs(*TEXTS[:3]), features=keys[:2], single_tokens=1)
            ),
            "logit_tokens": stub.Score(pb.ScoreRequest(inputs=inputs(), logit_tokens=two)),
            "count": stub.AttributeFeatures(
                pb.AttributeFeaturesRequest(input=inputs("abc")[0], dictionaries=["mid"], count=4)
            ),
            "a": stub.ContrastFeatures(
                pb.ContrastFeaturesRequest(a=inputs("a", "b", "c"), b=inputs("a", "b"), dictionaries=["mid"])
            ),
        }
        for field, call in cases.items():
            code, details = await failure(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, field
            fields = [
                v.field for d in details if isinstance(d, error_details_pb2.BadRequest) for v in d.field_violations
            ]
            assert fields == [field]


def replace_limits(**values: int):
    return LIMITS.model_copy(update=values)


async def test_a_cancelled_study_leaves_the_engine_free(served: Served) -> None:
    request = pb.AblateFeaturesRequest(
        inputs=inputs(*["abcdefgh" * 10] * 20),
        strongest=pb.StrongestFeatures(count=60, dictionaries=["mid", "early", "wide", "delta"]),
        single_tokens=3,
    )
    measurements = served.runtime.engine._measurements
    run_round, begun = measurements.run, asyncio.Event()

    async def run(kind, content, sizes, *, under_way=False):
        begun.set()
        return await run_round(kind, content, sizes, under_way=under_way)

    measurements.run = run
    call = asyncio.ensure_future(served.interventions.AblateFeatures(request))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    reply = await asyncio.wait_for(served.interventions.Score(pb.ScoreRequest(inputs=inputs())), 20)
    assert len(reply.results) == 4
    assert served.runtime.engine.snapshot().queued_items == 0
