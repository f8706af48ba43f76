"""Between Python values and the API's messages: builds requests, reads replies. No calls, no channels.

Both clients use it. It rejects only what a message cannot express (two selections at once, an unknown name of an
option); everything else is the server's to check, which knows its limits and names the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC
from typing import Any, Literal, TypedDict, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from service.arrays import (
    pack_input_statistics,
    pack_sparse_rows,
    unpack_input_statistics,
    unpack_reconstruction_error,
    unpack_sparse_rows,
    unpack_tensor,
)
from service.client import results
from service.client.edits import Edit
from service.edits.messages import edit_message, read_edit
from service.pb.saeserve.v1 import (
    catalog_service_pb2,
    common_pb2,
    feature_service_pb2,
    intervention_service_pb2,
    server_service_pb2,
)

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
Input = str | TokenIds
Inputs = Input | Sequence[Input]
AggregationName = Literal["none", "max", "mean", "sum", "last"]
OverflowName = Literal["error", "truncate"]
Value = TypeVar("Value")
Result = TypeVar("Result")


class SelectionOptions(TypedDict, total=False):
    """Which features of each token or row to return; at most one of the first three. None given: all that fire."""

    top_k: int | None
    """The strongest k."""
    features: Iterable[int] | None
    """These features, where they fire."""
    threshold: float | None
    """Those whose activation is larger."""
    request_id: str | None
    """Comes back in the reply and in errors; the server makes one up if it is not given."""


class ExtractOptions(SelectionOptions, total=False):
    """Options of extract_features."""

    aggregation: AggregationName
    """How the tokens of an input are combined; "none" (the default) gives one row a token."""
    tokens: bool
    """Also return the tokens with their offsets."""
    reconstruction_error: bool
    """Also return each token's reconstruction error."""
    overflow: OverflowName
    """What happens to inputs that are too long: "error" (the default) or "truncate"."""


class GenerateOptions(TypedDict, total=False):
    """Options of generate."""

    max_new_tokens: int | None
    """None: the server's default."""
    temperature: float
    """0 (the default) takes the likeliest token."""
    top_k: int | None
    """Only the k likeliest tokens can be chosen."""
    top_p: float | None
    """Only the smallest set of tokens with at least this probability can be chosen."""
    seed: int | None
    """None: the server draws one; the result tells it."""
    stop: str | Sequence[str]
    """Generation ends before the first of these strings."""
    ignore_end_of_text: bool
    """Go on after an end-of-text token."""
    repetition_penalty: float | None
    """Makes tokens that the sequence has already less likely; 1 (the default) does nothing."""
    samples: int | None
    """How many sequences to generate (1 if not given); see Generation.all_results."""
    compare: bool
    """Also generate every sample without edits and presets, from the same seed."""
    top_logprobs: int | None
    """How many of the likeliest tokens to return at each place."""
    features: str | Sequence[str] | None
    """Names of dictionaries whose features to return with the tokens."""
    features_top_k: int | None
    """How many of them on each token; the server's default if not given."""
    prompt_features: bool
    """Also those of the prompt's tokens."""
    presets: Sequence[str]
    """Names of edit presets of the server, whose edits come before the others."""
    overflow: OverflowName
    """What happens to a prompt that is too long: "error" (the default) or "truncate", which drops its start."""
    request_id: str | None
    """Comes back in the result and in errors; the server makes one up if it is not given."""


_AGGREGATIONS = {
    "none": feature_service_pb2.AGGREGATION_NONE,
    "max": feature_service_pb2.AGGREGATION_MAX,
    "mean": feature_service_pb2.AGGREGATION_MEAN,
    "sum": feature_service_pb2.AGGREGATION_SUM,
    "last": feature_service_pb2.AGGREGATION_LAST,
}
_OVERFLOWS = {
    "error": common_pb2.OVERFLOW_ERROR,
    "truncate": common_pb2.OVERFLOW_TRUNCATE,
}
_FINISH_REASONS: dict[int, results.FinishReason] = {
    intervention_service_pb2.FINISH_REASON_LENGTH: "length",
    intervention_service_pb2.FINISH_REASON_STOP: "stop",
    intervention_service_pb2.FINISH_REASON_END_OF_TEXT: "end_of_text",
}


# Requests


def extract_features_request(
    inputs: Inputs,
    dictionaries: Sequence[str],
    *,
    top_k: int | None = None,
    features: Iterable[int] | None = None,
    threshold: float | None = None,
    aggregation: AggregationName = "none",
    tokens: bool = False,
    reconstruction_error: bool = False,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> feature_service_pb2.ExtractFeaturesRequest:
    """Raises ValueError for more than one selection and unknown names of options, TypeError for other inputs."""
    return feature_service_pb2.ExtractFeaturesRequest(
        request_id=request_id or "",
        inputs=[text_input(each) for each in as_list(inputs)],
        dictionaries=dictionaries,
        selection=_selection(top_k, features, threshold),
        aggregation=named_value("aggregation", aggregation, _AGGREGATIONS),
        include_tokens=tokens,
        include_reconstruction_error=reconstruction_error,
        overflow=named_value("overflow", overflow, _OVERFLOWS),
    )


def encode_activations_request(
    dictionary: str,
    activations: Any,
    *,
    top_k: int | None = None,
    features: Iterable[int] | None = None,
    threshold: float | None = None,
    request_id: str | None = None,
) -> feature_service_pb2.EncodeActivationsRequest:
    """`activations` [n, d_in]: float16 travels as it is, all else as float32."""
    return feature_service_pb2.EncodeActivationsRequest(
        request_id=request_id or "",
        dictionary=dictionary,
        activations=_tensor(np.asarray(activations)),
        selection=_selection(top_k, features, threshold),
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
    prompt_features: bool = False,
    presets: Sequence[str] = (),
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> intervention_service_pb2.GenerateRequest:
    return intervention_service_pb2.GenerateRequest(
        request_id=request_id or "",
        prompt=text_input(prompt),
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
        features=_watched(features, features_top_k, prompt_features),
        presets=[presets] if isinstance(presets, str) else presets,
        overflow=named_value("overflow", overflow, _OVERFLOWS),
    )


def as_list(inputs: Inputs) -> list[Input]:
    """One input (a text, or integers) as a list of one; several as they are."""
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, np.ndarray):
        return [inputs] if inputs.ndim == 1 else list(inputs)
    inputs = list(cast("Sequence[Input]", inputs))
    return [cast(Input, inputs)] if inputs and isinstance(inputs[0], int | np.integer) else inputs


def text_input(value: Input) -> common_pb2.TextInput:
    if isinstance(value, str):
        return common_pb2.TextInput(text=value)
    if isinstance(value, bytes):
        raise TypeError("an input is bytes, expected str or token ids")
    return common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[int(token) for token in value]))


def _selection(
    top_k: int | None, features: Iterable[int] | None, threshold: float | None
) -> feature_service_pb2.FeatureSelection | None:
    given = [name for name, v in (("top_k", top_k), ("features", features), ("threshold", threshold)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other")
    if top_k is not None:
        return feature_service_pb2.FeatureSelection(top_k=top_k)
    if features is not None:
        ids = [int(feature) for feature in features]
        return feature_service_pb2.FeatureSelection(features=feature_service_pb2.FeatureIds(ids=ids))
    if threshold is not None:
        return feature_service_pb2.FeatureSelection(threshold=threshold)
    return None


def _watched(
    names: str | Sequence[str] | None, top_k: int | None, prompt: bool
) -> intervention_service_pb2.WatchedFeatures | None:
    if names is None:
        if top_k is not None or prompt:
            raise ValueError("features_top_k and prompt_features belong to features, which names dictionaries")
        return None
    dictionaries = [names] if isinstance(names, str) else names
    return intervention_service_pb2.WatchedFeatures(dictionaries=dictionaries, top_k=top_k or 0, prompt=prompt)


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


# Replies


def read_extraction(reply: feature_service_pb2.ExtractFeaturesResponse) -> results.Extraction:
    return results.Extraction(
        inputs=tuple(_read_input(each) for each in reply.results),
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def _read_input(message: feature_service_pb2.InputFeatures) -> results.InputFeatures:
    return results.InputFeatures(
        dictionaries={each.dictionary: _read_dictionary_features(each) for each in message.dictionaries},
        n_tokens=message.n_tokens,
        truncated_tokens=message.truncated_tokens,
        tokens=read_tokens(message.tokens) if message.HasField("tokens") else None,
    )


def _read_dictionary_features(message: feature_service_pb2.DictionaryFeatures) -> results.DictionaryFeatures:
    return results.DictionaryFeatures(
        dictionary=message.dictionary,
        features=_read_sparse_rows(message.features),
        reconstruction_error=unpack_reconstruction_error(message) if message.reconstruction_error else None,
    )


def _read_sparse_rows(message: common_pb2.SparseRows) -> results.SparseRows:
    return results.SparseRows(*unpack_sparse_rows(message))


def read_tokens(message: common_pb2.Tokens) -> results.Tokens:
    def offsets(values: Sequence[int]) -> results.UintArray:
        return np.array(values, np.uint32)

    return results.Tokens(
        ids=offsets(message.ids),
        pieces=tuple(message.pieces),
        byte_starts=offsets(message.byte_starts),
        byte_ends=offsets(message.byte_ends),
        char_starts=offsets(message.char_starts),
        char_ends=offsets(message.char_ends),
    )


def read_encoding(reply: feature_service_pb2.EncodeActivationsResponse) -> results.Encoding:
    statistics = reply.input_statistics
    return results.Encoding(
        features=_read_sparse_rows(reply.features),
        input_statistics=results.InputStatistics(*unpack_input_statistics(statistics)) if statistics.mean else None,
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def read_decoding(reply: feature_service_pb2.DecodeFeaturesResponse) -> results.Decoding:
    return results.Decoding(
        activations=unpack_tensor(reply.activations), request_id=reply.request_id, timing=read_timing(reply.timing)
    )


class GenerationReader:
    """Reads the messages of one Generate stream, in order."""

    def __init__(self, request: intervention_service_pb2.GenerateRequest) -> None:
        self._n_sequences = max(request.samples, 1) * (2 if request.compare else 1)
        self._chunks: dict[tuple[bool, int], list[results.GeneratedChunk]] = {}
        self._finished: dict[tuple[bool, int], results.GenerationResult] = {}

    @property
    def complete(self) -> bool:
        """Whether the ends of all sequences have been read."""
        return len(self._finished) == self._n_sequences

    @property
    def ended(self) -> tuple[results.GenerationResult, ...]:
        """All of the sequences whose end was read: the edited ones by sample, then the unedited ones."""
        return tuple(self._finished[key] for key in sorted(self._finished))

    def read(self, message: intervention_service_pb2.GenerateResponse) -> results.GeneratedChunk | None:
        """The message's chunk, or None if it is an end."""
        key = (message.unedited, message.sample)
        if message.HasField("chunk"):
            chunk = results.GeneratedChunk(
                text=message.chunk.text,
                token_ids=np.array(message.chunk.token_ids, np.uint32),
                logprobs=np.array(message.chunk.logprobs, np.float32),
                top=tuple(_read_top_tokens(each) for each in message.chunk.top),
                features=tuple(_read_token_features(each) for each in message.chunk.features),
                sample=message.sample,
                unedited=message.unedited,
            )
            self._chunks.setdefault(key, []).append(chunk)
            return chunk
        if message.HasField("finish"):
            self._finished[key] = self._finish(message, self._chunks.pop(key, []))
        return None

    @staticmethod
    def _finish(
        message: intervention_service_pb2.GenerateResponse, chunks: Sequence[results.GeneratedChunk]
    ) -> results.GenerationResult:
        finish = message.finish
        return results.GenerationResult(
            text="".join(chunk.text for chunk in chunks),
            token_ids=np.concatenate([np.zeros(0, np.uint32), *(chunk.token_ids for chunk in chunks)]),
            logprobs=np.concatenate([np.zeros(0, np.float32), *(chunk.logprobs for chunk in chunks)]),
            finish_reason=_FINISH_REASONS.get(finish.reason, "unknown"),
            stop=finish.stop,
            prompt_tokens=finish.prompt_tokens,
            generated_tokens=finish.generated_tokens,
            truncated_tokens=finish.truncated_tokens,
            seed=finish.seed,
            request_id=message.request_id,
            timing=read_timing(finish.timing),
            top=tuple(each for chunk in chunks for each in chunk.top),
            features=tuple(each for chunk in chunks for each in chunk.features),
            sample=message.sample,
            unedited=message.unedited,
        )


def _read_top_tokens(message: intervention_service_pb2.TopTokens) -> results.TopTokens:
    return results.TopTokens(
        token_ids=np.array(message.token_ids, np.uint32),
        logprobs=np.array(message.logprobs, np.float32),
        pieces=tuple(message.pieces),
    )


def _read_token_features(message: intervention_service_pb2.TokenFeatures) -> results.TokenFeatures:
    return results.TokenFeatures(
        first_position=message.first_position,
        token_ids=np.array(message.token_ids, np.uint32),
        pieces=tuple(message.pieces),
        dictionaries={each.dictionary: _read_sparse_rows(each.features) for each in message.dictionaries},
    )


def read_dictionaries(reply: catalog_service_pb2.ListDictionariesResponse) -> tuple[results.DictionaryInfo, ...]:
    return tuple(_read_dictionary(each) for each in reply.dictionaries)


def read_dictionary_details(reply: catalog_service_pb2.GetDictionaryResponse) -> results.DictionaryDetails:
    return results.DictionaryDetails(
        dictionary=_read_dictionary(reply.dictionary),
        provenance=_read_provenance(reply.provenance) if reply.HasField("provenance") else None,
        evaluation=dict(reply.evaluation),
    )


def _read_dictionary(message: catalog_service_pb2.Dictionary) -> results.DictionaryInfo:
    return results.DictionaryInfo(
        name=message.name,
        site=message.site,
        architecture=message.architecture,
        d_in=message.d_in,
        n_latents=message.n_latents,
        k=message.k or None,
        normalizes_input=message.normalizes_input,
        has_statistics=message.has_statistics,
        context_length=message.context_length or None,
        normalization=message.normalization,
        has_skip_connection=message.has_skip_connection,
        transcoder=message.transcoder,
    )


def _read_provenance(message: catalog_service_pb2.Provenance) -> results.Provenance:
    return results.Provenance(
        code_version=message.code_version,
        seed=message.seed,
        tokens=message.tokens,
        data=message.data,
        created=message.created.ToDatetime(UTC) if message.HasField("created") else None,
        config=json.loads(message.config_json or "{}"),
    )


def read_server_info(reply: server_service_pb2.GetServerInfoResponse) -> results.ServerInfo:
    return results.ServerInfo(
        version=reply.version,
        library_versions=dict(reply.library_versions),
        backbone=_same_fields(results.BackboneInfo, reply.backbone, sites=tuple(reply.backbone.sites)),
        dictionaries=tuple(reply.dictionaries),
        limits=_same_fields(results.Limits, reply.limits),
        device=reply.device,
        edit_presets=tuple(
            results.EditPreset(preset.name, preset.description, tuple(read_edit(edit) for edit in preset.edits))
            for preset in reply.edit_presets
        ),
        cache_bytes=reply.cache_bytes,
    )


def _same_fields(kind: type[Result], message: Any, **others: Any) -> Result:
    """A dataclass whose fields are named as the message's."""
    names = [field.name for field in fields(cast(Any, kind)) if field.name not in others]
    return kind(**{name: getattr(message, name) for name in names}, **others)


def read_timing(message: common_pb2.Timing) -> results.Timing:
    return results.Timing(queue_ms=message.queue_ms, compute_ms=message.compute_ms, total_ms=message.total_ms)
