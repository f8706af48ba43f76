"""AblateFeatures equals the library's study, in batches beside other work; what it refuses."""

from __future__ import annotations

import asyncio
import math

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from sae_runtime.causal.ablation import AblationStudy, strongest_features, total_activation
from sae_runtime.causal.ablation_summary import StudyResult, summarize
from sae_runtime.causal.report import FeatureId
from service.engine.settings import EngineSettings
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import edits_pb2, feature_service_pb2
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve
from tests.service.rpc.intervention.texts import TEXTS, ids, inputs
from tests.service.rpc.reading import failure


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


async def test_unknown_features_and_dictionaries_are_not_found(served: Served) -> None:
    def ablate(*features: tuple[str, int]) -> object:
        keys = [pb.FeatureKey(dictionary=name, feature=feature) for name, feature in features]
        return served.interventions.AblateFeatures(
            pb.AblateFeaturesRequest(request_id="a-1", inputs=inputs(), features=keys)
        )

    failed = await failure(ablate(("mid", 3), ("mid", 96), ("wide", 2**32 - 1)))
    assert failed.code is grpc.StatusCode.NOT_FOUND
    assert failed.resources == [
        ("saeserve.v1.Feature", "mid:96"),
        ("saeserve.v1.Feature", "wide:4294967295"),
    ]
    assert failed.detail(error_details_pb2.RequestInfo).request_id == "a-1"
    failed = await failure(ablate(("nowhere", 3)))
    assert failed.code is grpc.StatusCode.NOT_FOUND
    assert failed.resources == [("saeserve.v1.Dictionary", "nowhere")]


async def test_the_mean_needs_statistics(served: Served) -> None:
    request = pb.AblateFeaturesRequest(
        inputs=inputs(),
        features=[pb.FeatureKey(dictionary="plain", feature=1)],
        ablations=[edits_pb2.ABLATION_MEAN],
    )
    failed = await failure(served.interventions.AblateFeatures(request))
    assert failed.code is grpc.StatusCode.FAILED_PRECONDITION
    violations = failed.detail(error_details_pb2.PreconditionFailure).violations
    assert [(v.type, v.subject) for v in violations] == [("STATISTICS", "ablations")]


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


async def test_the_strongest_features_by_surprise(served: Served) -> None:
    strongest = pb.StrongestFeatures(count=4, dictionaries=["mid", "early"], rank_by="FEATURE_RANKING_SURPRISE")
    reply = await served.interventions.AblateFeatures(pb.AblateFeaturesRequest(inputs=inputs(), strongest=strongest))
    dictionaries = {name: served.dictionaries[name] for name in ("mid", "early")}
    totals = total_activation(served.backbone, dictionaries, [ids(served, text) for text in TEXTS])
    surprise = {
        (name, latent): float(total) * -math.log10(max(float(dictionaries[name].statistics.firing_rate[latent]), 0.01))
        for name in totals
        for latent, total in enumerate(totals[name])
    }  # the statistics are of 1,000 tokens, of which a latent counts as firing on 10 at least
    expected = sorted(surprise, key=lambda feature: -surprise[feature])[:4]
    assert {(effect.feature.dictionary, effect.feature.feature) for effect in reply.effects} == {*expected}


async def test_ranking_the_strongest_needs_statistics(served: Served) -> None:
    strongest = pb.StrongestFeatures(count=4, dictionaries=["plain"], rank_by="FEATURE_RANKING_Z_SCORE")
    request = pb.AblateFeaturesRequest(inputs=inputs(), strongest=strongest)
    refused = await failure(served.interventions.AblateFeatures(request))
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "strongest.rank_by" in refused.message
