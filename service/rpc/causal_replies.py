"""Results of causal measurements as messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.arrays import pack_tokens
from service.edits.messages import edit_message
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import common_pb2, edits_pb2

if TYPE_CHECKING:
    from sae_runtime.causal.ablation import FeatureId
    from sae_runtime.causal.ablation_report import EffectFigures, FeatureEffect
    from sae_runtime.causal.attribution import Attribution
    from sae_runtime.causal.contrast import FeatureContrast
    from sae_runtime.causal.suggestion import SetScores, Trial
    from sae_runtime.edits import Edit
    from service.engine.measure_work import ScoreArrays, ScoredRow
    from service.rpc.text_inputs import TextInputReader, TokenRow

_ABLATIONS = {"zero": edits_pb2.ABLATION_ZERO, "mean": edits_pb2.ABLATION_MEAN}


def tokens(reader: TextInputReader, row: TokenRow) -> common_pb2.Tokens:
    return pack_tokens(*reader.describe(row))


def feature_key(feature: FeatureId) -> pb.FeatureKey:
    return pb.FeatureKey(dictionary=feature.dictionary, feature=feature.feature)


def input_score(row: ScoredRow) -> pb.InputScore:
    """Without the fields about the input itself."""
    return pb.InputScore(
        unedited=_token_scores(row.unedited),
        edited=None if row.edited is None else _token_scores(row.edited),
        kl=None if row.kl is None else row.kl.tolist(),
    )


def _token_scores(scores: ScoreArrays) -> pb.TokenScores:
    return pb.TokenScores(
        loss=scores.loss.tolist(),
        correct=scores.correct.tolist(),
        target_logits=scores.target_logits.tolist(),
        token_logits=scores.token_logits.ravel().tolist(),
        mean_loss=float(scores.loss.mean(dtype=float)),
        accuracy=float(scores.correct.mean()),
    )


def feature_effect(effect: FeatureEffect) -> pb.FeatureEffect:
    low, high = effect.delta_loss_interval
    return pb.FeatureEffect(
        feature=feature_key(effect.feature),
        ablation=_ABLATIONS[effect.replacement],
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
            pb.DistanceEffect(first=each.first, last=each.last, figures=_figures(each.figures))
            for each in effect.by_distance
        ],
    )


def _figures(figures: EffectFigures) -> pb.EffectFigures:
    return pb.EffectFigures(
        n_tokens=figures.n_tokens,
        n_targets=figures.n_targets,
        delta_loss=figures.delta_loss,
        delta_accuracy=figures.delta_accuracy,
        kl=figures.kl,
        delta_target_logit=figures.delta_target_logit,
        delta_logits=figures.delta_logits,
    )


def attribution(each: Attribution) -> pb.FeatureAttribution:
    return pb.FeatureAttribution(
        feature=feature_key(each.feature),
        position=each.position,
        activation=each.activation,
        gradient=each.gradient,
        attribution=each.attribution,
        effect=0.0 if each.effect is None else each.effect,
    )


def contrast(each: FeatureContrast) -> pb.FeatureContrast:
    return pb.FeatureContrast(
        feature=feature_key(each.feature),
        mean_a=each.mean_a,
        mean_b=each.mean_b,
        active_a=each.active_a,
        active_b=each.active_b,
        effect_size=each.effect_size,
        auc=each.auc,
        p_value=each.p_value,
        q_value=each.q_value,
    )


def edit(each: Edit) -> edits_pb2.Edit:
    return edit_message(each)


def trial(each: Trial) -> pb.SuggestionTrial:
    return pb.SuggestionTrial(
        edits=[edit(one) for one in each.edits], a=_set_score(each.a), b=_set_score(each.b), shift=each.shift
    )


def _set_score(scores: SetScores) -> pb.SetScore:
    low, high = scores.interval
    return pb.SetScore(delta_loss=scores.delta_loss, delta_loss_low=low, delta_loss_high=high, kl=scores.kl)
