"""Scores, ablations, attributions and contrasts: what the calls take, the messages they send, and what they return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from service.client.edits import Edit
from service.client.messages import (
    Input,
    Inputs,
    OverflowName,
    as_list,
    named_value,
    read_timing,
    read_tokens,
    text_input,
)
from service.client.results import FloatArray, Timing, Tokens
from service.edits.messages import edit_message, read_edit
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import common_pb2, edits_pb2, feature_service_pb2

Token = int | str
"""A token id, or a text that is exactly one token, such as " Paris"."""
Feature = tuple[str, int]
"""A dictionary's name and a feature number."""
AblationName = Literal["zero", "mean"]
RankingName = Literal["kl", "loss", "accuracy", "logit"]

_OVERFLOWS = {"error": common_pb2.OVERFLOW_ERROR, "truncate": common_pb2.OVERFLOW_TRUNCATE}
_ABLATIONS: dict[str, edits_pb2.Ablation.ValueType] = {
    "zero": edits_pb2.ABLATION_ZERO,
    "mean": edits_pb2.ABLATION_MEAN,
}
_RANKINGS = {
    "kl": pb.ABLATION_RANKING_KL,
    "loss": pb.ABLATION_RANKING_LOSS,
    "accuracy": pb.ABLATION_RANKING_ACCURACY,
    "logit": pb.ABLATION_RANKING_LOGIT,
}
_AGGREGATIONS = {"max": feature_service_pb2.AGGREGATION_MAX, "mean": feature_service_pb2.AGGREGATION_MEAN}


# Options


class ScoreOptions(TypedDict, total=False):
    """Options of score."""

    presets: Sequence[str]
    """Names of edit presets of the server, whose edits come before the others."""
    logit_tokens: Sequence[Token]
    """Tokens whose logits are returned after every token."""
    tokens: bool
    """Also return the tokens with their offsets."""
    overflow: OverflowName
    """What happens to inputs that are too long: "error" (the default) or "truncate"."""
    request_id: str | None
    """Comes back in the reply and in errors; the server makes one up if it is not given."""


class AblateOptions(TypedDict, total=False):
    """Options of ablate_features."""

    ablations: Sequence[AblationName]
    """With what the features are replaced: "zero" (the default), "mean", or both."""
    logit_tokens: Sequence[Token]
    """Tokens whose logits are followed."""
    single_tokens: int
    """So many tokens of each text on which a feature is strongest are also changed alone (by_distance)."""
    rank_by: RankingName
    """The figure that sorts the features; "kl" if not given."""
    overflow: OverflowName
    request_id: str | None


class AttributeOptions(TypedDict, total=False):
    """Options of attribute_features."""

    target: Token | None
    """The token whose logit is explained; None: the likeliest."""
    foil: Token | None
    """A token whose logit is taken off."""
    position: int | None
    """The logits after this token are meant; None: the last."""
    count: int | None
    """How many pairs of a feature and a token to return; None: the server's default."""
    tokens: bool
    overflow: OverflowName
    request_id: str | None


class ContrastOptions(TypedDict, total=False):
    """Options of contrast_features."""

    aggregation: Literal["max", "mean"]
    """How the tokens of a text are combined; "max" if not given."""
    count: int | None
    """Return at most so many features; None: the server's default."""
    false_discovery_rate: float
    """Return only features with at most this q-value; 0: all."""
    suggest: int
    """Suggest an edit towards set a that uses so many features."""
    validate: bool
    """Score the suggestion at several strengths on both sets."""
    overflow: OverflowName
    request_id: str | None


# Results


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What the model predicts on a text of n tokens; entry i is about the prediction made after token i."""

    loss: FloatArray
    """[n - 1] nats: -log p(token i + 1)."""
    correct: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """[n - 1] whether token i + 1 is the likeliest."""
    target_logits: FloatArray
    """[n - 1] logit of token i + 1."""
    token_logits: FloatArray
    """[n, m] logits of the chosen tokens."""
    mean_loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class InputScore:
    """The scores of one input."""

    unedited: TokenScores
    edited: TokenScores | None
    """None without edits."""
    kl: FloatArray | None
    """[n] KL(unedited || edited) in nats, with edits."""
    n_tokens: int
    truncated_tokens: int
    tokens: Tokens | None
    """The tokens, if asked for."""

    @property
    def delta_loss(self) -> FloatArray | None:
        """[n - 1] edited - unedited, nats; above 0: the edits made the token less likely."""
        return None if self.edited is None else self.edited.loss - self.unedited.loss


@dataclass(frozen=True, eq=False)
class Scores:
    """Reply of score."""

    inputs: tuple[InputScore, ...]
    logit_token_ids: tuple[int, ...]
    request_id: str
    timing: Timing

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> InputScore:
        return self.inputs[i]


@dataclass(frozen=True)
class EffectFigures:
    """Means over predictions; changes are ablated - unedited."""

    n_tokens: int
    n_targets: int
    delta_loss: float
    delta_accuracy: float
    kl: float
    delta_target_logit: float
    delta_logits: tuple[float, ...]
    """Of the chosen tokens."""


@dataclass(frozen=True)
class DistanceEffect:
    """Effect on predictions that are made `first` to `last` tokens behind the changed token."""

    first: int
    last: int
    figures: EffectFigures


@dataclass(frozen=True)
class FeatureEffect:
    """What ablating one feature does."""

    feature: Feature
    ablation: AblationName
    active_tokens: int
    active_texts: int
    mean_activation: float
    everywhere: EffectFigures
    """Over all predictions of all texts."""
    at_active: EffectFigures
    """Over those made on tokens where the feature is active."""
    delta_loss_interval: tuple[float, float]
    """95 % bootstrap interval of everywhere.delta_loss over texts."""
    text_delta_loss: tuple[float, ...]
    text_kl: tuple[float, ...]
    by_distance: tuple[DistanceEffect, ...]


@dataclass(frozen=True)
class AblationStudy:
    """Reply of ablate_features."""

    effects: tuple[FeatureEffect, ...]
    """The largest first."""
    n_texts: int
    n_targets: int
    loss: float
    accuracy: float
    logit_token_ids: tuple[int, ...]
    truncated_tokens: tuple[int, ...]
    n_variants: int
    request_id: str
    timing: Timing


@dataclass(frozen=True)
class FeatureAttribution:
    """One feature on one token."""

    feature: Feature
    position: int
    activation: float
    gradient: float
    attribution: float
    """activation x gradient: to first order, how far the metric falls without the feature."""
    effect: float
    """How far it does fall."""


@dataclass(frozen=True, eq=False)
class Attributions:
    """Reply of attribute_features."""

    metric: float
    """The target's logit, less the foil's if there is one."""
    attributions: tuple[FeatureAttribution, ...]
    """The largest in size first."""
    n_active: int
    totals: Mapping[str, float]
    pearson: float | None
    spearman: float | None
    target_id: int
    foil_id: int | None
    position: int
    tokens: Tokens | None
    truncated_tokens: int
    request_id: str
    timing: Timing


@dataclass(frozen=True)
class FeatureContrast:
    """One feature in two sets of texts."""

    feature: Feature
    mean_a: float
    mean_b: float
    active_a: int
    active_b: int
    effect_size: float
    auc: float
    p_value: float
    q_value: float


@dataclass(frozen=True)
class SetScore:
    """How edits change the predictions on a set of texts."""

    delta_loss: float
    interval: tuple[float, float]
    kl: float


@dataclass(frozen=True)
class SuggestionTrial:
    """A suggestion at one strength."""

    edits: tuple[Edit, ...]
    a: SetScore
    b: SetScore
    shift: float
    """By how much it favours the texts of a over those of b, nats a token."""


@dataclass(frozen=True)
class Contrast:
    """Reply of contrast_features."""

    features: tuple[FeatureContrast, ...]
    """The surest first."""
    n_tested: int
    n_found: int
    """Features with a q-value of at most 0.05."""
    suggestion: tuple[Edit, ...]
    """Edits towards set a; empty unless asked for."""
    trials: tuple[SuggestionTrial, ...]
    truncated_tokens: tuple[int, ...]
    request_id: str
    timing: Timing


# Requests


def score_request(
    inputs: Inputs,
    edits: Iterable[Edit] = (),
    *,
    presets: Sequence[str] = (),
    logit_tokens: Sequence[Token] = (),
    tokens: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        request_id=request_id or "",
        inputs=[text_input(each) for each in as_list(inputs)],
        edits=[edit_message(edit) for edit in edits],
        presets=[presets] if isinstance(presets, str) else presets,
        logit_tokens=[_token(each) for each in logit_tokens],
        overflow=named_value("overflow", overflow, _OVERFLOWS),
        include_tokens=tokens,
    )


def ablate_request(
    inputs: Inputs,
    features: Iterable[Feature] | int,
    dictionaries: Sequence[str] = (),
    *,
    ablations: Sequence[AblationName] = ("zero",),
    logit_tokens: Sequence[Token] = (),
    single_tokens: int = 0,
    rank_by: RankingName = "kl",
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> pb.AblateFeaturesRequest:
    """`features` is which, or how many of the strongest of `dictionaries`."""
    request = pb.AblateFeaturesRequest(
        request_id=request_id or "",
        inputs=[text_input(each) for each in as_list(inputs)],
        ablations=[named_value("ablations", each, _ABLATIONS) for each in ablations],
        logit_tokens=[_token(each) for each in logit_tokens],
        single_tokens=single_tokens,
        rank_by=named_value("rank_by", rank_by, _RANKINGS),
        overflow=named_value("overflow", overflow, _OVERFLOWS),
    )
    if isinstance(features, int):
        request.strongest.CopyFrom(pb.StrongestFeatures(count=features, dictionaries=dictionaries))
    else:
        request.features.extend(pb.FeatureKey(dictionary=name, feature=feature) for name, feature in features)
    return request


def attribute_request(
    text: Input,
    dictionaries: Sequence[str],
    *,
    target: Token | None = None,
    foil: Token | None = None,
    position: int | None = None,
    count: int | None = None,
    tokens: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> pb.AttributeFeaturesRequest:
    return pb.AttributeFeaturesRequest(
        request_id=request_id or "",
        input=text_input(text),
        dictionaries=dictionaries,
        target=None if target is None else _token(target),
        foil=None if foil is None else _token(foil),
        position=position,
        count=count or 0,
        overflow=named_value("overflow", overflow, _OVERFLOWS),
        include_tokens=tokens,
    )


def contrast_request(
    a: Sequence[Input],
    b: Sequence[Input],
    dictionaries: Sequence[str],
    *,
    aggregation: Literal["max", "mean"] = "max",
    count: int | None = None,
    false_discovery_rate: float = 0.0,
    suggest: int = 0,
    validate: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> pb.ContrastFeaturesRequest:
    return pb.ContrastFeaturesRequest(
        request_id=request_id or "",
        a=[text_input(each) for each in as_list(a)],
        b=[text_input(each) for each in as_list(b)],
        dictionaries=dictionaries,
        aggregation=named_value("aggregation", aggregation, _AGGREGATIONS),
        count=count or 0,
        false_discovery_rate=false_discovery_rate,
        suggest=suggest,
        validate=validate,
        overflow=named_value("overflow", overflow, _OVERFLOWS),
    )


def _token(token: Token) -> pb.TokenChoice:
    return pb.TokenChoice(text=token) if isinstance(token, str) else pb.TokenChoice(id=int(token))


# Replies


def read_scores(reply: pb.ScoreResponse) -> Scores:
    m = len(reply.logit_token_ids)
    return Scores(
        inputs=tuple(
            InputScore(
                unedited=_read_token_scores(each.unedited, each.n_tokens, m),
                edited=_read_token_scores(each.edited, each.n_tokens, m) if each.HasField("edited") else None,
                kl=np.array(each.kl, np.float32) if each.HasField("edited") else None,
                n_tokens=each.n_tokens,
                truncated_tokens=each.truncated_tokens,
                tokens=read_tokens(each.tokens) if each.HasField("tokens") else None,
            )
            for each in reply.results
        ),
        logit_token_ids=tuple(reply.logit_token_ids),
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def _read_token_scores(message: pb.TokenScores, n: int, m: int) -> TokenScores:
    return TokenScores(
        loss=np.array(message.loss, np.float32),
        correct=np.array(message.correct, np.bool_),
        target_logits=np.array(message.target_logits, np.float32),
        token_logits=np.array(message.token_logits, np.float32).reshape(n, m),
        mean_loss=message.mean_loss,
        accuracy=message.accuracy,
    )


def read_ablation(reply: pb.AblateFeaturesResponse) -> AblationStudy:
    return AblationStudy(
        effects=tuple(_read_effect(each) for each in reply.effects),
        n_texts=reply.n_texts,
        n_targets=reply.n_targets,
        loss=reply.loss,
        accuracy=reply.accuracy,
        logit_token_ids=tuple(reply.logit_token_ids),
        truncated_tokens=tuple(reply.truncated_tokens),
        n_variants=reply.n_variants,
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def _read_effect(message: pb.FeatureEffect) -> FeatureEffect:
    return FeatureEffect(
        feature=_read_feature(message.feature),
        ablation="mean" if message.ablation == edits_pb2.ABLATION_MEAN else "zero",
        active_tokens=message.active_tokens,
        active_texts=message.active_texts,
        mean_activation=message.mean_activation,
        everywhere=_read_figures(message.everywhere),
        at_active=_read_figures(message.at_active),
        delta_loss_interval=(message.delta_loss_low, message.delta_loss_high),
        text_delta_loss=tuple(message.text_delta_loss),
        text_kl=tuple(message.text_kl),
        by_distance=tuple(
            DistanceEffect(each.first, each.last, _read_figures(each.figures)) for each in message.by_distance
        ),
    )


def _read_figures(message: pb.EffectFigures) -> EffectFigures:
    return EffectFigures(
        n_tokens=message.n_tokens,
        n_targets=message.n_targets,
        delta_loss=message.delta_loss,
        delta_accuracy=message.delta_accuracy,
        kl=message.kl,
        delta_target_logit=message.delta_target_logit,
        delta_logits=tuple(message.delta_logits),
    )


def read_attributions(reply: pb.AttributeFeaturesResponse) -> Attributions:
    return Attributions(
        metric=reply.metric,
        attributions=tuple(
            FeatureAttribution(
                _read_feature(each.feature),
                each.position,
                each.activation,
                each.gradient,
                each.attribution,
                each.effect,
            )
            for each in reply.attributions
        ),
        n_active=reply.n_active,
        totals=dict(reply.totals),
        pearson=reply.pearson if reply.HasField("pearson") else None,
        spearman=reply.spearman if reply.HasField("spearman") else None,
        target_id=reply.target_id,
        foil_id=reply.foil_id if reply.HasField("foil_id") else None,
        position=reply.position,
        tokens=read_tokens(reply.tokens) if reply.HasField("tokens") else None,
        truncated_tokens=reply.truncated_tokens,
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def read_contrast(reply: pb.ContrastFeaturesResponse) -> Contrast:
    return Contrast(
        features=tuple(
            FeatureContrast(
                _read_feature(each.feature),
                each.mean_a,
                each.mean_b,
                each.active_a,
                each.active_b,
                each.effect_size,
                each.auc,
                each.p_value,
                each.q_value,
            )
            for each in reply.features
        ),
        n_tested=reply.n_tested,
        n_found=reply.n_found,
        suggestion=tuple(read_edit(each) for each in reply.suggestion),
        trials=tuple(
            SuggestionTrial(
                tuple(read_edit(edit) for edit in each.edits), _read_set(each.a), _read_set(each.b), each.shift
            )
            for each in reply.trials
        ),
        truncated_tokens=tuple(reply.truncated_tokens),
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def _read_set(message: pb.SetScore) -> SetScore:
    return SetScore(message.delta_loss, (message.delta_loss_low, message.delta_loss_high), message.kl)


def _read_feature(message: pb.FeatureKey) -> Feature:
    return message.dictionary, message.feature
