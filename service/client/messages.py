"""Builds the API's messages from Python values.

Refuses only what a message cannot express, such as two selections at once or an unknown name of an option. The server
checks the rest: it knows its limits, and its errors name the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sae_runtime.causal.report import Ablation, RankBy
from sae_runtime.dictionary.ranking import Ranking
from service.arrays import pack_input_statistics, pack_sparse_rows
from service.client import results
from service.client.edits import Edit
from service.client.options import AggregationName, DtypeName, Input, Inputs, OverflowName, Token
from service.edits.messages import edit_message
from service.pb.saeserve.v1 import causal_pb2, common_pb2, edits_pb2, feature_service_pb2, intervention_service_pb2

Value = TypeVar("Value")

_AGGREGATIONS = {
    "none": feature_service_pb2.AGGREGATION_NONE,
    "max": feature_service_pb2.AGGREGATION_MAX,
    "mean": feature_service_pb2.AGGREGATION_MEAN,
    "sum": feature_service_pb2.AGGREGATION_SUM,
    "last": feature_service_pb2.AGGREGATION_LAST,
}
_TEXT_AGGREGATIONS = {name: _AGGREGATIONS[name] for name in ("max", "mean")}
OVERFLOWS = {"error": common_pb2.OVERFLOW_ERROR, "truncate": common_pb2.OVERFLOW_TRUNCATE}
_ABLATIONS = {"zero": edits_pb2.ABLATION_ZERO, "mean": edits_pb2.ABLATION_MEAN}
_DTYPES = {
    "float32": common_pb2.DATA_TYPE_FLOAT32,
    "float16": common_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": common_pb2.DATA_TYPE_BFLOAT16,
}
_FEATURE_RANKINGS = {
    "activation": common_pb2.FEATURE_RANKING_UNSPECIFIED,
    "surprise": common_pb2.FEATURE_RANKING_SURPRISE,
    "z_score": common_pb2.FEATURE_RANKING_Z_SCORE,
}
_RANKINGS = {
    "kl": causal_pb2.ABLATION_RANKING_KL,
    "loss": causal_pb2.ABLATION_RANKING_LOSS,
    "accuracy": causal_pb2.ABLATION_RANKING_ACCURACY,
    "logit": causal_pb2.ABLATION_RANKING_LOGIT,
}


def extract_features_request(
    inputs: Inputs,
    dictionaries: Sequence[str],
    *,
    top_k: int | None = None,
    features: Iterable[int] | None = None,
    threshold: float | None = None,
    rank_by: Ranking = "activation",
    aggregation: AggregationName = "none",
    tokens: bool = False,
    reconstruction_error: bool = False,
    labels: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> feature_service_pb2.ExtractFeaturesRequest:
    """The request of extract_features.

    Raises:
        ValueError: more than one selection, or an unknown name of an option.
        TypeError: an input is neither text nor token ids.
    """
    return feature_service_pb2.ExtractFeaturesRequest(
        request_id=request_id or "",
        inputs=text_inputs(inputs),
        dictionaries=dictionaries,
        selection=_selection(top_k, features, threshold, rank_by),
        aggregation=named_value("aggregation", aggregation, _AGGREGATIONS),
        include_tokens=tokens,
        include_reconstruction_error=reconstruction_error,
        include_labels=labels,
        overflow=named_value("overflow", overflow, OVERFLOWS),
    )


def get_activations_request(
    inputs: Inputs,
    sites: Sequence[str],
    *,
    dtype: DtypeName = "float32",
    tokens: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> feature_service_pb2.GetActivationsRequest:
    """The request of get_activations."""
    return feature_service_pb2.GetActivationsRequest(
        request_id=request_id or "",
        inputs=text_inputs(inputs),
        sites=sites,
        dtype=named_value("dtype", dtype, _DTYPES),
        overflow=named_value("overflow", overflow, OVERFLOWS),
        include_tokens=tokens,
    )


def encode_activations_request(
    dictionary: str,
    activations: Any,
    *,
    top_k: int | None = None,
    features: Iterable[int] | None = None,
    threshold: float | None = None,
    rank_by: Ranking = "activation",
    request_id: str | None = None,
) -> feature_service_pb2.EncodeActivationsRequest:
    """The request of encode_activations. `activations` [n, d_in] are sent as float16 if they are, else as float32."""
    return feature_service_pb2.EncodeActivationsRequest(
        request_id=request_id or "",
        dictionary=dictionary,
        activations=_tensor(np.asarray(activations)),
        selection=_selection(top_k, features, threshold, rank_by),
    )


def decode_features_request(
    dictionary: str,
    features: results.SparseRows,
    input_statistics: results.InputStatistics | None = None,
    *,
    request_id: str | None = None,
) -> feature_service_pb2.DecodeFeaturesRequest:
    statistics = None
    if input_statistics is not None:
        statistics = pack_input_statistics(input_statistics.mean, input_statistics.std)
    return feature_service_pb2.DecodeFeaturesRequest(
        request_id=request_id or "",
        dictionary=dictionary,
        features=pack_sparse_rows(features.row_splits, features.indices, features.values),
        input_statistics=statistics,
    )


def generate_request(
    prompt: Input,
    edits: Iterable[Edit] = (),
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    ignore_end_of_text: bool = False,
    repetition_penalty: float | None = None,
    samples: int | None = None,
    compare: bool = False,
    top_logprobs: int | None = None,
    features: str | Sequence[str] | None = None,
    features_top_k: int | None = None,
    features_rank_by: Ranking = "activation",
    prompt_features: bool = False,
    labels: bool = False,
    presets: Sequence[str] = (),
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> intervention_service_pb2.GenerateRequest:
    return intervention_service_pb2.GenerateRequest(
        request_id=request_id or "",
        prompt=_text_input(prompt),
        max_new_tokens=max_new_tokens or 0,
        sampling=intervention_service_pb2.Sampling(
            temperature=temperature,
            top_k=top_k or 0,
            top_p=top_p or 0.0,
            seed=seed,
            repetition_penalty=repetition_penalty or 0.0,
        ),
        stop=[stop] if isinstance(stop, str) else stop,
        edits=[edit_message(edit) for edit in edits],
        ignore_end_of_text=ignore_end_of_text,
        samples=samples or 0,
        compare=compare,
        top_logprobs=top_logprobs or 0,
        features=_watched(features, features_top_k, prompt_features, features_rank_by, labels),
        presets=[presets] if isinstance(presets, str) else presets,
        overflow=named_value("overflow", overflow, OVERFLOWS),
    )


def score_request(
    inputs: Inputs,
    edits: Iterable[Edit] = (),
    *,
    presets: Sequence[str] = (),
    logit_tokens: Sequence[Token] = (),
    tokens: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> causal_pb2.ScoreRequest:
    return causal_pb2.ScoreRequest(
        request_id=request_id or "",
        inputs=text_inputs(inputs),
        edits=[edit_message(edit) for edit in edits],
        presets=[presets] if isinstance(presets, str) else presets,
        logit_tokens=[_token(token) for token in logit_tokens],
        overflow=named_value("overflow", overflow, OVERFLOWS),
        include_tokens=tokens,
    )


def ablate_request(
    inputs: Inputs,
    features: Iterable[tuple[str, int]] | int,
    dictionaries: Sequence[str] = (),
    *,
    ablations: Sequence[Ablation] = ("zero",),
    logit_tokens: Sequence[Token] = (),
    single_tokens: int = 0,
    rank_by: RankBy = "kl",
    strongest_by: Ranking = "activation",
    labels: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> causal_pb2.AblateFeaturesRequest:
    """`features` is a list of features, or the number of the strongest features of `dictionaries`."""
    request = causal_pb2.AblateFeaturesRequest(
        request_id=request_id or "",
        inputs=text_inputs(inputs),
        ablations=[named_value("ablations", ablation, _ABLATIONS) for ablation in ablations],
        logit_tokens=[_token(token) for token in logit_tokens],
        single_tokens=single_tokens,
        include_labels=labels,
        rank_by=named_value("rank_by", rank_by, _RANKINGS),
        overflow=named_value("overflow", overflow, OVERFLOWS),
    )
    if isinstance(features, int):
        ranking = named_value("strongest_by", strongest_by, _FEATURE_RANKINGS)
        request.strongest.CopyFrom(
            causal_pb2.StrongestFeatures(count=features, dictionaries=dictionaries, rank_by=ranking)
        )
    else:
        request.features.extend(causal_pb2.FeatureKey(dictionary=name, feature=feature) for name, feature in features)
    return request


def attribute_request(
    text: Input,
    dictionaries: Sequence[str],
    *,
    target: Token | None = None,
    foil: Token | None = None,
    position: int | None = None,
    count: int | None = None,
    rank_by: Ranking = "activation",
    labels: bool = False,
    tokens: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> causal_pb2.AttributeFeaturesRequest:
    return causal_pb2.AttributeFeaturesRequest(
        request_id=request_id or "",
        input=_text_input(text),
        dictionaries=dictionaries,
        target=None if target is None else _token(target),
        foil=None if foil is None else _token(foil),
        position=position,
        count=count or 0,
        overflow=named_value("overflow", overflow, OVERFLOWS),
        include_tokens=tokens,
        include_labels=labels,
        rank_by=named_value("rank_by", rank_by, _FEATURE_RANKINGS),
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
    labels: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> causal_pb2.ContrastFeaturesRequest:
    return causal_pb2.ContrastFeaturesRequest(
        request_id=request_id or "",
        a=text_inputs(a),
        b=text_inputs(b),
        dictionaries=dictionaries,
        aggregation=named_value("aggregation", aggregation, _TEXT_AGGREGATIONS),
        count=count or 0,
        false_discovery_rate=false_discovery_rate,
        suggest=suggest,
        validate=validate,
        include_labels=labels,
        overflow=named_value("overflow", overflow, OVERFLOWS),
    )


def text_inputs(inputs: Inputs) -> list[common_pb2.TextInput]:
    """A list of inputs. One input, a text or integers, gives a list of one."""
    if isinstance(inputs, str) or (isinstance(inputs, np.ndarray) and inputs.ndim == 1):
        return [_text_input(inputs)]
    values = list(cast("Sequence[Input]", inputs))
    if values and isinstance(values[0], int | np.integer):
        return [_text_input(cast(Input, values))]
    return [_text_input(value) for value in values]


def _text_input(value: Input) -> common_pb2.TextInput:
    if isinstance(value, str):
        return common_pb2.TextInput(text=value)
    if isinstance(value, bytes):
        raise TypeError("an input is bytes, expected str or token ids")
    return common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[int(token) for token in value]))


def _selection(
    top_k: int | None, features: Iterable[int] | None, threshold: float | None, rank_by: Ranking
) -> feature_service_pb2.FeatureSelection | None:
    selections = {"top_k": top_k, "features": features, "threshold": threshold}
    names = [name for name, value in selections.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} exclude each other")
    selection = feature_service_pb2.FeatureSelection(rank_by=named_value("rank_by", rank_by, _FEATURE_RANKINGS))
    if top_k is not None:
        selection.top_k = top_k
    elif features is not None:
        selection.features.ids.extend(int(feature) for feature in features)
        selection.features.SetInParent()
    elif threshold is not None:
        selection.threshold = threshold
    return selection if names or selection.rank_by else None


def _watched(
    names: str | Sequence[str] | None, top_k: int | None, prompt: bool, rank_by: Ranking, labels: bool
) -> intervention_service_pb2.WatchedFeatures | None:
    if names is None:
        if top_k is not None or prompt or labels or rank_by != "activation":
            raise ValueError(
                "features_top_k, features_rank_by, prompt_features and labels belong to features, which names "
                "dictionaries"
            )
        return None
    dictionaries = [names] if isinstance(names, str) else names
    return intervention_service_pb2.WatchedFeatures(
        dictionaries=dictionaries,
        top_k=top_k or 0,
        prompt=prompt,
        include_labels=labels,
        rank_by=named_value("features_rank_by", rank_by, _FEATURE_RANKINGS),
    )


def _tensor(array: NDArray[Any]) -> common_pb2.Tensor:
    if array.dtype == np.float16:
        dtype, element = common_pb2.DATA_TYPE_FLOAT16, "<f2"
    else:
        dtype, element = common_pb2.DATA_TYPE_FLOAT32, "<f4"
    data = np.ascontiguousarray(array, dtype=element).tobytes()
    return common_pb2.Tensor(shape=array.shape, dtype=dtype, data=data)


def named_value(option: str, name: str, values: Mapping[str, Value]) -> Value:
    if name not in values:
        raise ValueError(f"{option} is {name!r}, expected one of {', '.join(values)}")
    return values[name]


def _token(token: Token) -> causal_pb2.TokenChoice:
    return causal_pb2.TokenChoice(text=token) if isinstance(token, str) else causal_pb2.TokenChoice(id=int(token))
