"""Results of causal measurements as messages, which have the fields of the classes in sae_runtime.causal.report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_runtime.causal.report import (
    EffectFigures,
    FeatureAttribution,
    FeatureContrast,
    FeatureEffect,
    FeatureId,
    SetScore,
    SuggestionTrial,
    TextScore,
    TokenScores,
)
from service.arrays import pack_tokens
from service.edits.messages import edit_message
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import common_pb2, edits_pb2

if TYPE_CHECKING:
    from service.rpc.text_inputs import TextInputReader, TokenRow

_ABLATIONS = {"zero": edits_pb2.ABLATION_ZERO, "mean": edits_pb2.ABLATION_MEAN}


def tokens(reader: TextInputReader, row: TokenRow) -> common_pb2.Tokens:
    return pack_tokens(*reader.describe(row))


def input_score(score: TextScore) -> pb.InputScore:
    """Without the fields about the input itself."""
    return pb.InputScore(
        unedited=_token_scores(score.unedited),
        edited=None if score.edited is None else _token_scores(score.edited),
        kl=None if score.kl is None else score.kl.tolist(),
    )


def _token_scores(scores: TokenScores) -> pb.TokenScores:
    return pb.TokenScores(
        loss=scores.loss.tolist(),
        correct=scores.correct.tolist(),
        target_logits=scores.target_logits.tolist(),
        token_logits=scores.token_logits.ravel().tolist(),
        mean_loss=scores.mean_loss,
        accuracy=scores.accuracy,
    )


def feature_effect(effect: FeatureEffect) -> pb.FeatureEffect:
    low, high = effect.delta_loss_interval
    return pb.FeatureEffect(
        feature=_feature_key(effect.feature),
        ablation=_ABLATIONS[effect.ablation],
        active_tokens=effect.active_tokens,
        active_texts=effect.active_texts,
        mean_activation=effect.mean_activation,
        everywhere=_figures(effect.everywhere),
        at_active=_figures(effect.at_active),
        delta_loss_low=low,
        delta_loss_high=high,
        text_delta_loss=effect.text_delta_loss,
        text_kl=effect.text_kl,
        by_distance=[
            pb.DistanceEffect(first=distance.first, last=distance.last, figures=_figures(distance.figures))
            for distance in effect.by_distance
        ],
    )


def _figures(figures: EffectFigures) -> pb.EffectFigures:
    return pb.EffectFigures(**vars(figures))


def attribution(attribution: FeatureAttribution) -> pb.FeatureAttribution:
    return pb.FeatureAttribution(**vars(attribution) | {"feature": _feature_key(attribution.feature)})


def contrast(contrast: FeatureContrast) -> pb.FeatureContrast:
    return pb.FeatureContrast(**vars(contrast) | {"feature": _feature_key(contrast.feature)})


def trial(trial: SuggestionTrial) -> pb.SuggestionTrial:
    return pb.SuggestionTrial(
        edits=[edit_message(edit) for edit in trial.edits],
        a=_set_score(trial.a),
        b=_set_score(trial.b),
        shift=trial.shift,
    )


def _set_score(score: SetScore) -> pb.SetScore:
    low, high = score.interval
    return pb.SetScore(delta_loss=score.delta_loss, delta_loss_low=low, delta_loss_high=high, kl=score.kl)


def _feature_key(feature: FeatureId) -> pb.FeatureKey:
    return pb.FeatureKey(**feature._asdict())
