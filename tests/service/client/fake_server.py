"""A gRPC server with canned replies: records the requests it gets, and fails on demand with the errors of the API."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.pb.saeserve.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    common_pb2,
    edits_pb2,
    feature_service_pb2,
    feature_service_pb2_grpc,
    intervention_service_pb2,
    intervention_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)

TIMING = common_pb2.Timing(queue_ms=1.5, compute_ms=4.0, total_ms=6.25)
DICTIONARIES = [
    catalog_service_pb2.Dictionary(
        name="resid-late", site="3.resid_post_mlp", architecture="relu", d_in=4, n_latents=64, normalization="none"
    ),
    catalog_service_pb2.Dictionary(
        name="resid-mid",
        site="2.resid_post_mlp",
        architecture="topk",
        d_in=4,
        n_latents=64,
        k=8,
        normalizes_input=True,
        normalization="layer_norm",
        has_statistics=True,
        context_length=32,
    ),
]


@dataclass
class Failure:
    """What calls of one method fail with, `times` times."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()
    times: int = 1


@dataclass
class FakeServer(
    feature_service_pb2_grpc.FeatureServiceServicer,
    intervention_service_pb2_grpc.InterventionServiceServicer,
    catalog_service_pb2_grpc.CatalogServiceServicer,
    server_service_pb2_grpc.ServerServiceServicer,
):
    """Every method's calls are in `calls` as (method, request, metadata)."""

    calls: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    time_left_s: dict[str, float] = field(default_factory=dict)
    """By method: how long before its deadline the last call came."""
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    """By method: they are used up one after the other."""
    fail_after_chunks: Failure | None = None
    """Generate fails so after its chunks, instead of finishing."""
    end_without_finish: bool = False
    hold: threading.Event = field(default_factory=threading.Event)
    """Generate with the prompt "wait" and extraction of the text "wait" last until this is set."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when a Generate call with the prompt "wait" ended before `hold` was set."""
    edit_presets: list[edits_pb2.EditPreset] = field(default_factory=list)
    address: str = ""

    def requests(self, method: str) -> list[Any]:
        return [request for name, request, _ in self.calls if name == method]

    def _record(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls.append((method, request, dict(context.invocation_metadata())))
        self.time_left_s[method] = context.time_remaining()
        for failure in self.failures.get(method, []):
            if failure.times:
                failure.times -= 1
                fail(context, failure, getattr(request, "request_id", ""))

    # Features

    def ExtractFeatures(self, request: Any, context: Any) -> Any:
        self._record("ExtractFeatures", request, context)
        return self._extract(request)

    def ExtractFeaturesStream(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        self._record("ExtractFeaturesStream", None, context)
        for request in request_iterator:
            self._record("ExtractFeaturesStream", request.request, context)
            yield feature_service_pb2.ExtractFeaturesStreamResponse(response=self._extract(request.request))

    def _extract(self, request: Any) -> Any:
        reply = feature_service_pb2.ExtractFeaturesResponse(request_id=request.request_id or "made-up", timing=TIMING)
        for text_input in request.inputs:
            if text_input.text == "wait":
                self.hold.wait(30)
            pieces = _pieces(text_input)
            entry = reply.results.add(n_tokens=len(pieces), truncated_tokens=3 if request.overflow == 2 else 0)
            if request.include_tokens:
                entry.tokens.CopyFrom(_tokens(pieces))
            one_row = request.aggregation not in (0, feature_service_pb2.AGGREGATION_NONE)
            for name in request.dictionaries:
                features = entry.dictionaries.add(dictionary=name)
                features.features.row_splits.append(0)
                # Token i: feature i with activation i + 1, and feature 63 with half of it.
                for i in [len(pieces) - 1] if one_row else range(len(pieces)):
                    features.features.indices.extend([i, 63])
                    features.features.values.extend([i + 1.0, (i + 1.0) / 2])
                    features.features.row_splits.append(len(features.features.indices))
                if request.include_reconstruction_error:
                    features.reconstruction_error.extend([0.25] * len(pieces))
        return reply

    def EncodeActivations(self, request: Any, context: Any) -> Any:
        self._record("EncodeActivations", request, context)
        n = request.activations.shape[0]
        reply = feature_service_pb2.EncodeActivationsResponse(request_id=request.request_id, timing=TIMING)
        reply.features.row_splits.extend(range(n + 1))
        reply.features.indices.extend(range(n))
        reply.features.values.extend([2.0] * n)
        if request.dictionary == "resid-mid":
            reply.input_statistics.mean.extend([0.5] * n)
            reply.input_statistics.std.extend([3.0] * n)
        return reply

    def DecodeFeatures(self, request: Any, context: Any) -> Any:
        self._record("DecodeFeatures", request, context)
        n = len(request.features.row_splits) - 1
        data = b"\x00\x00\x80\x3f" * (4 * n)  # 1.0 as little-endian float32
        return feature_service_pb2.DecodeFeaturesResponse(
            request_id=request.request_id,
            activations=common_pb2.Tensor(shape=[n, 4], dtype=common_pb2.DATA_TYPE_FLOAT32, data=data),
            timing=TIMING,
        )

    # Generation

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self._record("Generate", request, context)
        if request.prompt.text == "wait":  # before the first chunk: once the client is gone, this does not run on
            context.add_callback(self._wait_ended)
        sequences = [
            (sample, unedited)
            for unedited in ((True, False) if request.compare else (False,))
            for sample in range(max(request.samples, 1))
        ]
        position = 4
        for i in range(3):
            for sample, unedited in sequences:
                text = (" a dog" if unedited or not request.edits else " a cat", "", " é.")[i]
                chunk = intervention_service_pb2.GeneratedChunk(
                    text=text + "!" * sample * (i == 2), token_ids=[i, i + 10], logprobs=[-0.5, -i]
                )
                if request.top_logprobs:
                    for token in (i, i + 10):
                        chunk.top.add(token_ids=[token, 7], logprobs=[-0.5, -3], pieces=[b"<%d>" % token, b" x"])
                if request.HasField("features") and i:
                    features = chunk.features.add(first_position=position, token_ids=[i, i], pieces=[b"a", b" b"])
                    for name in request.features.dictionaries:
                        rows = features.dictionaries.add(dictionary=name).features
                        rows.row_splits.extend([0, 2, 3])
                        rows.indices.extend([5, 9, 5])
                        rows.values.extend([2.5, 1.0, float(i)])
                    position += 2
                yield intervention_service_pb2.GenerateResponse(
                    request_id=request.request_id, chunk=chunk, sample=sample, unedited=unedited
                )
            if request.prompt.text == "wait":
                self.hold.wait(30)
        if self.fail_after_chunks:
            fail(context, self.fail_after_chunks, request.request_id)
        if self.end_without_finish:
            return
        seed = request.sampling.seed if request.sampling.HasField("seed") else 77
        for sample, unedited in sequences:
            yield intervention_service_pb2.GenerateResponse(
                request_id=request.request_id,
                sample=sample,
                unedited=unedited,
                finish=intervention_service_pb2.GenerationFinish(
                    reason=intervention_service_pb2.FINISH_REASON_STOP if request.stop else 1,
                    stop=request.stop[0] if request.stop else "",
                    prompt_tokens=4,
                    generated_tokens=6,
                    seed=seed,
                    timing=TIMING,
                ),
            )

    def _wait_ended(self) -> None:
        if not self.hold.is_set():
            self.cancelled.set()
            self.hold.set()

    # Catalogue and server

    def ListDictionaries(self, request: Any, context: Any) -> Any:
        self._record("ListDictionaries", request, context)
        return catalog_service_pb2.ListDictionariesResponse(request_id=request.request_id, dictionaries=DICTIONARIES)

    def GetDictionary(self, request: Any, context: Any) -> Any:
        self._record("GetDictionary", request, context)
        named = [dictionary for dictionary in DICTIONARIES if dictionary.name == request.name]
        if not named:
            details = (error_details_pb2.ResourceInfo(resource_type="dictionary", resource_name=request.name),)
            message = f"no dictionary named '{request.name}'"
            fail(context, Failure(grpc.StatusCode.NOT_FOUND, message, details), request.request_id)
        reply = catalog_service_pb2.GetDictionaryResponse(
            request_id=request.request_id, dictionary=named[0], evaluation={"nmse": 0.125, "loss_recovered": 0.9375}
        )
        if request.name == "resid-mid":
            reply.provenance.code_version = "0.1.0"
            reply.provenance.seed = 5
            reply.provenance.tokens = 4_000_000
            reply.provenance.data = "corpus"
            reply.provenance.created.FromDatetime(datetime(2026, 11, 22, 1, 2, 3, tzinfo=UTC))
            reply.provenance.config_json = '{"k": 8, "prepend_bos": true}'
        return reply

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        self._record("GetServerInfo", request, context)
        return server_service_pb2.GetServerInfoResponse(
            request_id=request.request_id,
            version="0.1.0",
            library_versions={"torch": "2.13.0", "ray": "2.60.0"},
            backbone=server_service_pb2.Backbone(
                name="builtin",
                fingerprint="ab" * 32,
                n_layers=5,
                d_model=4,
                vocab_size=256,
                context_length=32,
                dtype="float32",
                sites=["2.resid_post_mlp", "3.resid_post_mlp"],
            ),
            dictionaries=[dictionary.name for dictionary in DICTIONARIES],
            limits=server_service_pb2.Limits(
                max_inputs=2, max_tokens_per_input=32, max_tokens_per_request=40, max_edit_strength=10.0
            ),
            device="cpu",
            edit_presets=self.edit_presets,
        )


class Running:
    """A FakeServer that listens on a free local port, with grpc.health.v1 beside it."""

    def __init__(self) -> None:
        self.fake = FakeServer()
        self.health = health.HealthServicer()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        feature_service_pb2_grpc.add_FeatureServiceServicer_to_server(self.fake, self._server)
        intervention_service_pb2_grpc.add_InterventionServiceServicer_to_server(self.fake, self._server)
        catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(self.fake, self._server)
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(self.fake, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.set_serving(True)
        self.fake.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self.health.set("", status.SERVING if serving else status.NOT_SERVING)

    def stop(self) -> None:
        self.fake.hold.set()
        self._server.stop(None).wait()


def fail(context: grpc.ServicerContext, failure: Failure, request_id: str) -> None:
    """Ends the call as the service does: status, message, and google.rpc details in the trailing metadata."""
    status = status_pb2.Status(code=failure.code.value[0], message=failure.message)
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    for detail in failure.details:
        status.details.add().Pack(detail)
    context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    context.abort(failure.code, failure.message)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(round(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _pieces(value: Any) -> list[bytes]:
    """Words are tokens, with the space before them; a snowman is cut in two."""
    if value.WhichOneof("input") == "token_ids":
        return [b"<%d>" % token for token in value.token_ids.ids]
    pieces: list[bytes] = []
    for i, word in enumerate(value.text.split(" ")):
        data = ((" " if i else "") + word).encode()
        cut = data.find("☃".encode())
        pieces += [data] if cut < 0 else [data[: cut + 1], data[cut + 1 :]]
    return pieces


def _tokens(pieces: list[bytes]) -> common_pb2.Tokens:
    tokens = common_pb2.Tokens(pieces=pieces, ids=range(100, 100 + len(pieces)))
    text = b"".join(pieces)
    at = 0
    for piece in pieces:
        tokens.byte_starts.append(at)
        tokens.char_starts.append(len(text[:at].decode(errors="ignore")))
        at += len(piece)
        tokens.byte_ends.append(at)
        tokens.char_ends.append(len((text[:at]).decode(errors="replace")))
    return tokens
