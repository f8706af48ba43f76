"""What calls return is what the messages of the server say."""

from __future__ import annotations

from typing import Any

import numpy as np

from service.client import (
    AblationStudy,
    DistanceEffect,
    EffectFigures,
    FeatureAttribution,
    FeatureContrast,
    FeatureEffect,
    FeatureId,
    SetScore,
    SuggestionTrial,
    Timing,
    ablate_feature,
    replies,
)
from service.edits.messages import edit_message
from service.pb.saeserve.v1 import causal_pb2, edits_pb2
from tests.service.client.both_clients import Run, value
from tests.service.client.fake_server import TIMING, FakeServer


def test_extract_features(run: Run, fake: FakeServer):
    reply = run(
        lambda client: value(
            client.extract_features(
                ["a bc", [7]],
                ["resid-mid", "resid-late"],
                top_k=2,
                tokens=True,
                reconstruction_error=True,
                overflow="truncate",
                request_id="mine",
            )
        )
    )
    (sent,) = fake.requests("ExtractFeatures")
    assert list(sent.dictionaries) == ["resid-mid", "resid-late"]
    assert sent.selection.top_k == 2
    assert reply.request_id == "mine"
    assert (reply.timing.queue_ms, reply.timing.compute_ms, reply.timing.total_ms) == (1.5, 4.0, 6.25)
    assert len(reply) == 2
    first = reply[0]
    assert (first.n_tokens, first.truncated_tokens) == (2, 3)
    assert list(first.dictionaries) == ["resid-mid", "resid-late"]
    indices, values = first["resid-late"].row(1)
    np.testing.assert_array_equal(indices, [1, 63])
    np.testing.assert_array_equal(values, [2.0, 1.0])
    assert (indices.dtype, values.dtype) == (np.uint32, np.float32)
    np.testing.assert_array_equal(first.dictionaries["resid-mid"].reconstruction_error, [0.25, 0.25])
    assert first.tokens.pieces == (b"a", b" bc")
    np.testing.assert_array_equal(first.tokens.byte_starts, [0, 1])
    np.testing.assert_array_equal(first.tokens.char_ends, [1, 4])
    np.testing.assert_array_equal(first.tokens.ids, [100, 101])


def test_what_was_not_asked_for_is_none(run: Run):
    reply = run(lambda client: value(client.extract_features("a", "resid-mid", aggregation="max")))
    assert reply.request_id == "made-up"
    assert reply[0].tokens is None
    assert reply[0].dictionaries["resid-mid"].reconstruction_error is None
    assert len(reply[0]["resid-mid"]) == 1


def test_encode_and_decode(run: Run, fake: FakeServer):
    async def script(client: Any) -> tuple[Any, Any, Any]:
        encoding = await value(client.encode_activations("resid-mid", np.ones((3, 4)), top_k=1, request_id="e"))
        plain = await value(client.encode_activations("resid-late", np.ones((3, 4))))
        decoding = await value(
            client.decode_features("resid-mid", encoding.features, encoding.input_statistics, request_id="d")
        )
        return encoding, plain, decoding

    encoding, plain, decoding = run(script)
    np.testing.assert_array_equal(encoding.features.row_splits, [0, 1, 2, 3])
    np.testing.assert_array_equal(encoding.features.values, [2.0, 2.0, 2.0])
    np.testing.assert_array_equal(encoding.input_statistics.mean, [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(encoding.input_statistics.std, [3.0, 3.0, 3.0])
    assert plain.input_statistics is None
    np.testing.assert_array_equal(decoding.activations, np.ones((3, 4), np.float32))
    assert (encoding.request_id, decoding.request_id) == ("e", "d")
    (sent,) = fake.requests("DecodeFeatures")
    assert list(sent.features.indices) == [0, 1, 2]
    assert list(sent.input_statistics.std) == [3.0, 3.0, 3.0]


def test_dictionaries(run: Run):
    async def script(client: Any) -> tuple[Any, Any, Any]:
        listed = await value(client.list_dictionaries())
        return listed, await value(client.get_dictionary("resid-mid")), await value(client.get_dictionary("resid-late"))

    listed, mid, late = run(script)
    assert [(dictionary.name, dictionary.k, dictionary.context_length) for dictionary in listed] == [
        ("resid-late", None, None),
        ("resid-mid", 8, 32),
    ]
    assert mid.evaluation == {"nmse": 0.125, "loss_recovered": 0.9375}
    assert mid.provenance.created.isoformat() == "2026-11-22T01:02:03+00:00"
    assert mid.provenance.config == {"k": 8, "prepend_bos": True}
    assert late.provenance is None


def test_server_info(run: Run):
    info = run(lambda client: value(client.server_info()))
    assert info.library_versions["ray"] == "2.60.0"
    assert info.backbone.sites == ("2.resid_post_mlp", "3.resid_post_mlp")
    assert (info.limits.max_inputs, info.limits.max_edit_strength) == (2, 10.0)
    assert info.device == "cpu"


def test_scores():
    unedited = causal_pb2.TokenScores(
        loss=[1.0, 3.0], correct=[True, False], target_logits=[5.0, 6.0], token_logits=[1, 2, 3, 4, 5, 6],
        mean_loss=2.0, accuracy=0.5,
    )  # fmt: skip
    edited = causal_pb2.TokenScores(loss=[1.5, 2.0], token_logits=[0] * 6)
    reply = causal_pb2.ScoreResponse(
        request_id="s", logit_token_ids=[7, 9], timing=TIMING,
        results=[
            causal_pb2.InputScore(n_tokens=3, unedited=unedited, edited=edited, kl=[0.0, 0.5, 0.25]),
            causal_pb2.InputScore(n_tokens=3, truncated_tokens=4, unedited=unedited),
        ],
    )  # fmt: skip
    scores = replies.read_scores(reply)
    assert (len(scores), scores.logit_token_ids, scores.request_id) == (2, (7, 9), "s")
    first, second = scores[0], scores[1]
    np.testing.assert_array_equal(first.unedited.token_logits, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(first.delta_loss, [0.5, -1.0])
    np.testing.assert_array_equal(first.kl, [0.0, 0.5, 0.25])
    assert first.unedited.correct.tolist() == [True, False]
    assert (first.unedited.mean_loss, first.unedited.accuracy) == (2.0, 0.5)
    assert (second.edited, second.kl, second.delta_loss, second.tokens) == (None, None, None, None)
    assert second.truncated_tokens == 4


def test_ablations():
    figures = causal_pb2.EffectFigures(
        n_tokens=5, n_targets=4, delta_loss=0.5, delta_accuracy=-0.25, kl=0.75, delta_target_logit=-1.5,
        delta_logits=[2.0, 3.0],
    )  # fmt: skip
    effect = causal_pb2.FeatureEffect(
        feature=causal_pb2.FeatureKey(dictionary="d", feature=3), ablation=edits_pb2.ABLATION_MEAN, active_tokens=2,
        active_texts=1, mean_activation=1.25, everywhere=figures, at_active=causal_pb2.EffectFigures(kl=9.0),
        delta_loss_low=0.25, delta_loss_high=1.0, text_delta_loss=[0.5], text_kl=[0.75],
        by_distance=[causal_pb2.DistanceEffect(first=3, last=4, figures=figures)],
    )  # fmt: skip
    study = replies.read_ablation(
        causal_pb2.AblateFeaturesResponse(
            request_id="a", n_texts=1, n_targets=4, loss=2.5, accuracy=0.5, effects=[effect], logit_token_ids=[7, 9],
            truncated_tokens=[0, 2], n_variants=6, timing=TIMING,
        )
    )  # fmt: skip
    expected = EffectFigures(5, 4, 0.5, -0.25, 0.75, -1.5, (2.0, 3.0))
    silent = EffectFigures(0, 0, 0.0, 0.0, 9.0, 0.0, ())
    assert study == AblationStudy(
        effects=(
            FeatureEffect(
                ("d", 3), "mean", 2, 1, 1.25, expected, silent, (0.25, 1.0), (0.5,), (0.75,),
                (DistanceEffect(3, 4, expected),),
            ),
        ),
        n_texts=1, n_targets=4, loss=2.5, accuracy=0.5, logit_token_ids=(7, 9), truncated_tokens=(0, 2), n_variants=6,
        request_id="a", timing=Timing(1.5, 4.0, 6.25),
    )  # fmt: skip


def test_attributions():
    attribution = causal_pb2.FeatureAttribution(
        feature=causal_pb2.FeatureKey(dictionary="d", feature=3), position=2, activation=4.0, gradient=0.5,
        attribution=2.0, effect=1.5,
    )  # fmt: skip
    reply = causal_pb2.AttributeFeaturesResponse(
        metric=3.0, attributions=[attribution], n_active=8, totals={"d": 2.5}, target_id=11, position=2, timing=TIMING
    )
    result = replies.read_attributions(reply)
    assert result.attributions == (FeatureAttribution(FeatureId("d", 3), 2, 4.0, 0.5, 2.0, 1.5),)
    assert (result.metric, result.n_active, result.totals, result.target_id, result.position) == (
        3.0,
        8,
        {"d": 2.5},
        11,
        2,
    )
    assert (result.pearson, result.spearman, result.foil_id, result.tokens) == (None, None, None, None)
    reply.pearson, reply.spearman, reply.foil_id = 0.0, 0.5, 0
    result = replies.read_attributions(reply)
    assert (result.pearson, result.spearman, result.foil_id) == (0.0, 0.5, 0)


def test_contrasts():
    edit = ablate_feature("d", 3)
    score = causal_pb2.SetScore(delta_loss=0.5, delta_loss_low=0.25, delta_loss_high=0.75, kl=0.125)
    contrast = replies.read_contrast(
        causal_pb2.ContrastFeaturesResponse(
            features=[
                causal_pb2.FeatureContrast(
                    feature=causal_pb2.FeatureKey(dictionary="d", feature=3), mean_a=1.0, mean_b=2.0, active_a=3,
                    active_b=4, effect_size=-0.5, auc=0.25, p_value=0.01, q_value=0.02,
                )
            ],
            n_tested=10, n_found=1, suggestion=[edit_message(edit)], truncated_tokens=[0, 0], timing=TIMING,
            trials=[causal_pb2.SuggestionTrial(edits=[edit_message(edit)], a=score, b=score, shift=0.0)],
        )
    )  # fmt: skip
    assert contrast.features == (FeatureContrast(FeatureId("d", 3), 1.0, 2.0, 3, 4, -0.5, 0.25, 0.01, 0.02),)
    assert (contrast.n_tested, contrast.n_found, contrast.suggestion) == (10, 1, (edit,))
    on_both = SetScore(0.5, (0.25, 0.75), 0.125)
    assert contrast.trials == (SuggestionTrial((edit,), on_both, on_both, 0.0),)
