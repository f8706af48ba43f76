"""Malformed requests over all RPCs, for any server of this API: `malformed_requests` makes them, `send` sends one.

They are made from what the server says of itself (GetServerInfo, ListDictionaries): a valid request of an RPC with one
defect, or bytes that are no message at all. The same seed makes the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from service.arrays import pack_tensor
from service.pb.saeserve.v1 import catalog_service_pb2 as catalog_pb
from service.pb.saeserve.v1 import common_pb2, edits_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from service.pb.saeserve.v1 import intervention_service_pb2 as intervention_pb
from service.pb.saeserve.v1 import server_service_pb2 as server_pb
from service.rpc.register import RPCS
from tests.service.rpc.malformed_causal import causal_services

Code = grpc.StatusCode
INVALID, NOT_FOUND, PRECONDITION = Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION
NAN, INF = float("nan"), float("inf")
MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True)
class MalformedRequest:
    """Bytes to send to an RPC, and the status that must come back."""

    rpc: str
    data: bytes
    codes: frozenset[grpc.StatusCode]
    defect: str


@dataclass(frozen=True)
class Facts:
    """What the requests are made from."""

    info: server_pb.GetServerInfoResponse
    dictionaries: Sequence[catalog_pb.Dictionary]

    @property
    def limits(self) -> server_pb.Limits:
        return self.info.limits

    @property
    def vocab_size(self) -> int:
        return self.info.backbone.vocab_size

    @property
    def context_length(self) -> int:
        return self.info.backbone.context_length


Make = Callable[[random.Random, catalog_pb.Dictionary], Message]
Spoil = Callable[[Any], object]
"""Changes a valid request, in place."""


def malformed_requests(facts: Facts, count: int = 300, seed: int = 0) -> Iterator[MalformedRequest]:
    """`count` requests: every defect at least once if `count` allows, then random ones again on other requests."""
    rng = random.Random(seed)
    cases = [
        (rpc, make, spoil, code, defect)
        for rpc, make, defects in _services(facts)
        for defect, (code, spoil) in defects.items()
    ]
    undecodable = [(rpc, data) for rpc in RPCS for data in (b"\x0a\x7fshort", b"\xff" * 12)]
    # A text field that is not UTF-8; to a message without fields it is an unknown field.
    undecodable += [(name, b"\x0a\x02\xff\xfe") for name, rpc in RPCS.items() if rpc.request_class.DESCRIPTOR.fields]
    rng.shuffle(undecodable)
    order = [*range(len(cases)), *(rng.randrange(len(cases)) for _ in range(count))]
    yield from (MalformedRequest(rpc, data, frozenset({INVALID}), "undecodable") for rpc, data in undecodable)
    for index in order[: max(0, count - len(undecodable))]:
        rpc, make, spoil, code, defect = cases[index]
        message = make(rng, rng.choice(facts.dictionaries))
        spoil(message)
        if rpc == "ExtractFeatures" and rng.random() < 0.3:
            stream = feature_pb.ExtractFeaturesStreamRequest(request=message)
            yield MalformedRequest("ExtractFeaturesStream", stream.SerializeToString(), frozenset({code}), defect)
        else:
            yield MalformedRequest(rpc, message.SerializeToString(), frozenset({code}), defect)


async def send(channel: grpc.aio.Channel, request: MalformedRequest, timeout_s: float = 20) -> grpc.StatusCode:
    """Sends a request as raw bytes; returns the status code."""
    rpc = RPCS[request.rpc]
    path = f"/{rpc.service}/{rpc.name}"
    raw: Any = {"request_serializer": None, "response_deserializer": None}
    if rpc.streams_requests:
        call = channel.stream_stream(path, **raw)(iter([request.data]), timeout=timeout_s)
    elif rpc.streams_replies:
        call = channel.unary_stream(path, **raw)(request.data, timeout=timeout_s)
    else:
        call = channel.unary_unary(path, **raw)(request.data, timeout=timeout_s)
    return await call.code()


def _services(facts: Facts) -> Iterator[tuple[str, Make, dict[str, tuple[grpc.StatusCode, Spoil]]]]:
    ids = _request_id_defects()
    yield "ExtractFeatures", lambda rng, d: _extract(facts, rng, d), _extract_defects(facts) | ids
    yield "EncodeActivations", lambda rng, d: _encode(rng, d), _encode_defects(facts) | ids
    yield "DecodeFeatures", lambda rng, d: _decode(d), _decode_defects(facts) | ids
    yield "Generate", lambda rng, d: _generate(facts, rng, d), _generate_defects(facts) | ids
    for rpc, make, defects in causal_services(facts.info, list(facts.dictionaries)):
        yield rpc, make, defects | ids
    yield "ListDictionaries", lambda rng, d: catalog_pb.ListDictionariesRequest(), ids
    yield "GetServerInfo", lambda rng, d: server_pb.GetServerInfoRequest(), ids
    yield (
        "GetDictionary",
        lambda rng, d: catalog_pb.GetDictionaryRequest(name=d.name),
        ids
        | {
            "no name": (INVALID, lambda r: r.ClearField("name")),
            "unknown name": (NOT_FOUND, lambda r: _set(r, name="no such")),
            "long name": (NOT_FOUND, lambda r: _set(r, name="ü\n" * 50_000)),
        },
    )
    yield (
        "Check",
        lambda rng, d: health_pb2.HealthCheckRequest(),
        {"unknown service": (NOT_FOUND, lambda r: _set(r, service="no.such.Service"))},
    )


def _set(message: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


def _request_id_defects() -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    return {
        "long request id": (INVALID, lambda r: _set(r, request_id="x" * 129)),
        "request id with a line break": (INVALID, lambda r: _set(r, request_id="a\nb")),
        "request id beyond ASCII": (INVALID, lambda r: _set(r, request_id="ü")),
    }


# Valid requests


def _extract(facts: Facts, rng: random.Random, dictionary: catalog_pb.Dictionary) -> feature_pb.ExtractFeaturesRequest:
    ids = [rng.randrange(facts.vocab_size) for _ in range(rng.randint(1, 8))]
    return feature_pb.ExtractFeaturesRequest(
        inputs=[
            common_pb2.TextInput(text="A short text."),
            common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=ids)),
        ],
        dictionaries=[dictionary.name],
        aggregation=rng.randint(0, 5),
        include_tokens=rng.random() < 0.5,
        include_reconstruction_error=rng.random() < 0.5,
        overflow=rng.choice((common_pb2.OVERFLOW_UNSPECIFIED, common_pb2.OVERFLOW_ERROR)),
    )


def _encode(rng: random.Random, dictionary: catalog_pb.Dictionary) -> feature_pb.EncodeActivationsRequest:
    x = np.random.default_rng(rng.randrange(1000)).standard_normal((3, dictionary.d_in))
    return feature_pb.EncodeActivationsRequest(dictionary=dictionary.name, activations=pack_tensor(x))


def _decode(dictionary: catalog_pb.Dictionary) -> feature_pb.DecodeFeaturesRequest:
    request = feature_pb.DecodeFeaturesRequest(
        dictionary=dictionary.name,
        features=common_pb2.SparseRows(row_splits=[0, 2, 3], indices=[1, 0, 2], values=[0.5, 2, 1]),
    )
    if dictionary.normalizes_input:
        request.input_statistics.CopyFrom(common_pb2.InputStatistics(mean=[0, 1], std=[1, 2]))
    return request


def _generate(facts: Facts, rng: random.Random, dictionary: catalog_pb.Dictionary) -> intervention_pb.GenerateRequest:
    return intervention_pb.GenerateRequest(
        prompt=common_pb2.TextInput(text="Once"),
        max_new_tokens=2,
        sampling=intervention_pb.Sampling(temperature=1, seed=rng.randrange(1000)),
        stop=["\n\n"],
        edits=[
            edits_pb2.Edit(
                dictionary=dictionary.name,
                feature=rng.randrange(dictionary.n_latents),
                set=edits_pb2.Amount(value=0.01),
            )
        ],
    )


# Defects


def _selection_defects(facts: Facts) -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    most = facts.limits.max_selected_features
    too_large = max(d.n_latents for d in facts.dictionaries)
    return {
        "selection without a rule": (INVALID, lambda r: r.selection.SetInParent()),
        "top_k 0": (INVALID, lambda r: _set(r.selection, top_k=0)),
        "top_k over the limit": (INVALID, lambda r: _set(r.selection, top_k=most + 1)),
        "top_k huge": (INVALID, lambda r: _set(r.selection, top_k=MAX_UINT32)),
        "no features": (INVALID, lambda r: r.selection.features.SetInParent()),
        "feature twice": (INVALID, lambda r: r.selection.features.ids.extend([1, 2, 1])),
        "feature outside": (INVALID, lambda r: r.selection.features.ids.extend([0, too_large])),
        "feature far outside": (INVALID, lambda r: r.selection.features.ids.append(MAX_UINT32)),
        "too many features": (INVALID, lambda r: r.selection.features.ids.extend(range(most + 1))),
        "threshold NaN": (INVALID, lambda r: _set(r.selection, threshold=NAN)),
        "threshold infinite": (INVALID, lambda r: _set(r.selection, threshold=INF)),
        "threshold negative": (INVALID, lambda r: _set(r.selection, threshold=-0.5)),
    }


def _text_defects(facts: Facts, get: Callable[[Any], Any]) -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    """`get` gives the TextInput of a request."""
    too_many = facts.context_length + 1
    return {
        "input not set": (INVALID, lambda r: get(r).Clear()),
        "empty text": (INVALID, lambda r: _set(get(r), text="")),
        "empty ids": (INVALID, lambda r: get(r).token_ids.CopyFrom(common_pb2.TokenIds())),
        "id outside the vocabulary": (INVALID, lambda r: get(r).token_ids.ids.extend([0, facts.vocab_size])),
        "id huge": (INVALID, lambda r: get(r).token_ids.ids.append(MAX_UINT32)),
        "too many ids": (INVALID, lambda r: get(r).token_ids.ids.extend([1] * too_many)),
        "very many ids": (INVALID, lambda r: get(r).token_ids.ids.extend([1] * 200_000)),
        "long text": (INVALID, lambda r: _set(get(r), text="a b " * (facts.limits.max_text_bytes // 4 + 1))),
        "overflow unknown": (INVALID, lambda r: _set(r, overflow=99)),
        "overflow negative": (INVALID, lambda r: _set(r, overflow=-1)),
    }


def _dictionary_defects() -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    return {
        "dictionary empty": (INVALID, lambda r: _set(r, dictionary="")),
        "dictionary unknown": (NOT_FOUND, lambda r: _set(r, dictionary="nowhere")),
    }


def _extract_defects(facts: Facts) -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    limits = facts.limits
    many = limits.max_tokens_per_request // facts.context_length + 1

    def too_many_tokens(request: Any) -> None:
        for _ in range(many):
            request.inputs.add().token_ids.ids.extend([1] * facts.context_length)

    defects: dict[str, tuple[grpc.StatusCode, Spoil]] = {
        "no inputs": (INVALID, lambda r: r.ClearField("inputs")),
        "too many inputs": (INVALID, lambda r: [r.inputs.add(text="a") for _ in range(limits.max_inputs)]),
        "too many tokens together": (INVALID, too_many_tokens),
        "no dictionaries": (INVALID, lambda r: r.ClearField("dictionaries")),
        "dictionary twice": (INVALID, lambda r: r.dictionaries.append(r.dictionaries[0])),
        "dictionary unknown": (NOT_FOUND, lambda r: r.dictionaries.append("nowhere")),
        "dictionary empty": (INVALID, lambda r: r.dictionaries.append("")),
        "too many dictionaries": (
            INVALID,
            lambda r: r.dictionaries.extend(f"d{i}" for i in range(limits.max_dictionaries)),
        ),
        "aggregation unknown": (INVALID, lambda r: _set(r, aggregation=77)),
        "aggregation negative": (INVALID, lambda r: _set(r, aggregation=-3)),
    }
    return defects | _selection_defects(facts) | _text_defects(facts, lambda r: r.inputs[1])


def _encode_defects(facts: Facts) -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    limits = facts.limits

    def shape(*lengths: int) -> Spoil:
        return lambda r: _set(r.activations, data=b"") or r.activations.shape.__setitem__(slice(None), lengths)

    def value(x: float) -> Spoil:
        def spoil(request: Any) -> None:
            array = np.frombuffer(request.activations.data, "<f4").copy()
            array[-1] = x
            request.activations.data = array.tobytes()

        return spoil

    def too_many_rows(request: Any) -> None:
        width = request.activations.shape[1]
        request.activations.CopyFrom(pack_tensor(np.ones((limits.max_activation_rows + 1, width))))

    defects: dict[str, tuple[grpc.StatusCode, Spoil]] = {
        "no activations": (INVALID, lambda r: r.ClearField("activations")),
        "shape of no axes": (INVALID, shape()),
        "shape of one axis": (INVALID, shape(4)),
        "shape of three axes": (INVALID, shape(1, 1, 4)),
        "no rows": (INVALID, lambda r: shape(0, r.activations.shape[1])(r)),
        "shape that overflows": (INVALID, shape(MAX_UINT32, MAX_UINT32)),
        "rows that overflow": (INVALID, lambda r: shape(MAX_UINT32, r.activations.shape[1])(r)),
        "wrong width": (INVALID, lambda r: r.activations.shape.__setitem__(1, r.activations.shape[1] + 1)),
        "data too short": (INVALID, lambda r: _set(r.activations, data=r.activations.data[:-1])),
        "data too long": (INVALID, lambda r: _set(r.activations, data=r.activations.data + b"\0" * 4)),
        "data of another dtype": (INVALID, lambda r: _set(r.activations, dtype=common_pb2.DATA_TYPE_FLOAT16)),
        "dtype unknown": (INVALID, lambda r: _set(r.activations, dtype=42)),
        "NaN": (INVALID, value(NAN)),
        "infinity": (INVALID, value(-INF)),
        "squares overflow": (INVALID, value(3e38)),
        "too many rows": (INVALID, too_many_rows),
    }
    return defects | _dictionary_defects() | _selection_defects(facts)


def _decode_defects(facts: Facts) -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    def splits(*values: int) -> Spoil:
        return lambda r: r.features.row_splits.__setitem__(slice(None), values)

    def statistics(mean: list[float], std: list[float]) -> Spoil:
        return lambda r: r.input_statistics.CopyFrom(common_pb2.InputStatistics(mean=mean, std=std))

    too_large = max(d.n_latents for d in facts.dictionaries)
    rows = facts.limits.max_activation_rows
    return _dictionary_defects() | {
        "no features": (INVALID, lambda r: r.ClearField("features")),
        "no row splits": (INVALID, splits()),
        "no rows": (INVALID, splits(0)),
        "splits do not start with 0": (INVALID, splits(1, 2, 3)),
        "splits fall": (INVALID, splits(0, 3, 2)),
        "splits beyond the entries": (INVALID, splits(0, 2, 4)),
        "splits far beyond": (INVALID, splits(0, MAX_UINT32, 3)),
        "splits end early": (INVALID, splits(0, 2, 2)),
        "too many rows": (INVALID, splits(*([0] * (rows + 1)), 3)),
        "index outside": (INVALID, lambda r: r.features.indices.__setitem__(1, too_large)),
        "index far outside": (INVALID, lambda r: r.features.indices.__setitem__(1, MAX_UINT32)),
        "index twice": (INVALID, lambda r: r.features.indices.__setitem__(1, r.features.indices[0])),
        "more indices than values": (INVALID, lambda r: r.features.indices.append(0)),
        "more values than indices": (INVALID, lambda r: r.features.values.append(0)),
        "value NaN": (INVALID, lambda r: r.features.values.__setitem__(0, NAN)),
        "value infinite": (INVALID, lambda r: r.features.values.__setitem__(0, INF)),
        # Of a dictionary that does not normalise, any statistics are wrong.
        "statistics of other rows": (INVALID, statistics([0], [1])),
        "mean without std": (INVALID, statistics([0, 0], [])),
        "mean NaN": (INVALID, statistics([0, NAN], [1, 1])),
        "std negative": (INVALID, statistics([0, 0], [1, -1])),
        "std infinite": (INVALID, statistics([0, 0], [1, INF])),
    }


def _generate_defects(facts: Facts) -> dict[str, tuple[grpc.StatusCode, Spoil]]:
    limits = facts.limits
    pb = edits_pb2

    def sampling(**fields: float) -> Spoil:
        return lambda r: _set(r.sampling, **fields)

    def edit(**fields: Any) -> Spoil:
        """Sets fields of the first edit."""
        return lambda r: r.edits[0].MergeFrom(pb.Edit(**fields))

    def conflict(request: Any) -> None:
        request.edits.add().CopyFrom(request.edits[0])
        request.edits[1].positions.explicit.positions.append(0)

    def combined(n: int = 1, **fields: Any) -> edits_pb2.Condition:
        return pb.Condition(any_of=pb.Conditions(conditions=[pb.Condition()] * n), **fields)

    def nested(depth: int) -> edits_pb2.Condition:
        condition = pb.Condition()
        for _ in range(depth):
            condition = pb.Condition(all_of=pb.Conditions(conditions=[condition]))
        return condition

    def reference(ids: list[int], tokens: int = 0) -> edits_pb2.Resample:
        return pb.Resample(reference=common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=ids)), tokens=tokens)

    def replace_twice(request: Any) -> None:
        request.edits[0].CopyFrom(pb.Edit(dictionary=request.edits[0].dictionary, replace=pb.Replace()))
        request.edits.add().CopyFrom(request.edits[0])

    def explicit(*positions: int) -> Spoil:
        return edit(positions=pb.Positions(explicit=pb.ExplicitPositions(positions=positions)))

    outside = max(d.n_latents for d in facts.dictionaries)
    defects: dict[str, tuple[grpc.StatusCode, Spoil]] = {
        "no prompt": (INVALID, lambda r: r.ClearField("prompt")),
        "too many new tokens": (INVALID, lambda r: _set(r, max_new_tokens=limits.max_new_tokens + 1)),
        "very many new tokens": (INVALID, lambda r: _set(r, max_new_tokens=MAX_UINT32)),
        "temperature negative": (INVALID, sampling(temperature=-1)),
        "temperature NaN": (INVALID, sampling(temperature=NAN)),
        "temperature infinite": (INVALID, sampling(temperature=INF)),
        "temperature too large": (INVALID, sampling(temperature=101)),
        "top_p negative": (INVALID, sampling(top_p=-0.1)),
        "top_p over 1": (INVALID, sampling(top_p=1.01)),
        "top_p NaN": (INVALID, sampling(top_p=NAN)),
        "repetition penalty negative": (INVALID, sampling(repetition_penalty=-0.5)),
        "repetition penalty NaN": (INVALID, sampling(repetition_penalty=NAN)),
        "repetition penalty too large": (INVALID, sampling(repetition_penalty=1e6)),
        "too many samples": (INVALID, lambda r: _set(r, samples=limits.max_samples + 1)),
        "very many samples": (INVALID, lambda r: _set(r, samples=MAX_UINT32, compare=True)),
        "too many top logprobs": (INVALID, lambda r: _set(r, top_logprobs=limits.max_top_logprobs + 1)),
        "features of no dictionary": (INVALID, lambda r: r.features.SetInParent()),
        "features of an unknown dictionary": (NOT_FOUND, lambda r: r.features.dictionaries.append("nowhere")),
        "features of a dictionary twice": (
            INVALID,
            lambda r: r.features.dictionaries.extend([r.edits[0].dictionary] * 2),
        ),
        "features of an empty name": (INVALID, lambda r: r.features.dictionaries.append("")),
        "too many features": (
            INVALID,
            lambda r: r.features.MergeFrom(
                intervention_pb.WatchedFeatures(
                    dictionaries=[r.edits[0].dictionary], top_k=limits.max_selected_features + 1
                )
            ),
        ),
        "stop list of megabytes": (INVALID, lambda r: r.stop.extend(["x" * limits.max_stop_bytes] * 10_000)),
        "stop empty": (INVALID, lambda r: r.stop.append("")),
        "stop too long": (INVALID, lambda r: r.stop.append("x" * (limits.max_stop_bytes + 1))),
        "too many stops": (INVALID, lambda r: r.stop.extend(["x"] * limits.max_stop_strings)),
        "too many edits": (INVALID, lambda r: [r.edits.add() for _ in range(limits.max_edits)]),
        "edit without a dictionary": (INVALID, lambda r: r.edits[0].ClearField("dictionary")),
        "edit of an unknown dictionary": (NOT_FOUND, edit(dictionary="nowhere")),
        "edit of a feature outside": (INVALID, edit(feature=outside)),
        "edit of a feature far outside": (INVALID, edit(feature=MAX_UINT32)),
        "edit without an operation": (INVALID, lambda r: r.edits[0].ClearField("set")),
        "value NaN": (INVALID, edit(set=pb.Amount(value=NAN))),
        "value infinite": (INVALID, edit(add=pb.Amount(value=INF))),
        "unit unknown": (INVALID, edit(set=pb.Amount(value=1, unit=9))),
        "scale NaN": (INVALID, edit(scale=NAN)),
        "scale too strong": (INVALID, edit(scale=1.5 * limits.max_edit_strength)),
        "clamp without bounds": (INVALID, edit(clamp=pb.Clamp())),
        "clamp upside down": (INVALID, edit(clamp=pb.Clamp(minimum=0.2, maximum=0.1))),
        "clamp NaN": (INVALID, edit(clamp=pb.Clamp(minimum=NAN))),
        "ablation unknown": (INVALID, edit(ablate=7)),
        "positions without a rule": (INVALID, lambda r: r.edits[0].positions.SetInParent()),
        "range unknown": (INVALID, edit(positions=pb.Positions(range=9))),
        "no explicit positions": (INVALID, explicit()),
        "position twice": (INVALID, explicit(3, 3)),
        "position outside the context": (INVALID, explicit(facts.context_length)),
        "position far outside": (INVALID, explicit(MAX_UINT32)),
        "condition's feature outside": (INVALID, edit(condition=pb.Condition(feature=outside))),
        "condition's threshold NaN": (INVALID, edit(condition=pb.Condition(threshold=NAN))),
        "condition's threshold negative": (INVALID, edit(condition=pb.Condition(threshold=-1))),
        "condition's dictionary unknown": (NOT_FOUND, edit(condition=pb.Condition(dictionary="nowhere"))),
        "condition's comparison unknown": (INVALID, edit(condition=pb.Condition(comparison=9))),
        "condition's unit unknown": (INVALID, edit(condition=pb.Condition(unit=9))),
        "condition of none": (INVALID, edit(condition=pb.Condition(all_of=pb.Conditions()))),
        "condition both single and combined": (INVALID, edit(condition=combined(threshold=1))),
        "condition too deep": (INVALID, edit(condition=nested(5))),
        "condition far too deep": (INVALID, edit(condition=nested(40))),
        "condition of too many": (INVALID, edit(condition=combined(17))),
        "condition of very many": (INVALID, edit(condition=combined(20_000))),
        "after no text": (INVALID, edit(positions=pb.Positions(after=pb.AfterText()))),
        "after a long text": (INVALID, edit(positions=pb.Positions(after=pb.AfterText(text="é" * 129)))),
        "after each without a bound": (
            INVALID,
            edit(positions=pb.Positions(after=pb.AfterText(text="a", occurrence=2))),
        ),
        "occurrence unknown": (INVALID, edit(positions=pb.Positions(after=pb.AfterText(text="a", occurrence=7)))),
        "reference not set": (INVALID, edit(resample=pb.Resample())),
        "reference empty": (INVALID, edit(resample=pb.Resample(reference=common_pb2.TextInput(text="")))),
        "reference too long": (INVALID, edit(resample=reference([1] * (facts.context_length + 1)))),
        "reference outside the vocabulary": (INVALID, edit(resample=reference([facts.vocab_size]))),
        "reference tokens unknown": (INVALID, edit(resample=reference([1], tokens=8))),
        "replacement of a feature": (INVALID, lambda r: (edit(replace=pb.Replace())(r), _set(r.edits[0], feature=1))),
        "two replacements": (INVALID, lambda r: replace_twice(r)),
        "preset unknown": (NOT_FOUND, lambda r: r.presets.append("no such")),
        "presets too many": (INVALID, lambda r: r.presets.extend(["a"] * (limits.max_edits + 1))),
        "edits that conflict": (INVALID, conflict),
    }
    for dictionary in facts.dictionaries:
        if not dictionary.has_statistics:
            lacking = edit(dictionary=dictionary.name, feature=0, ablate=pb.ABLATION_MEAN)
            defects[f"mean of {dictionary.name}, which has no statistics"] = (PRECONDITION, lacking)
    return defects | _text_defects(facts, lambda r: r.prompt)
