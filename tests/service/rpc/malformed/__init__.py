"""Malformed requests over all RPCs, for any server of this API: `malformed_requests` makes them, `send` sends one.

They are made from what the server says of itself (GetServerInfo, ListDictionaries): a valid request of an RPC with one
defect, or bytes that are no message at all. The same seed makes the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from service.pb.saeserve.v1 import catalog_service_pb2 as catalog_pb
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from service.pb.saeserve.v1 import server_service_pb2 as server_pb
from service.rpc.register import RPCS
from tests.service.rpc.malformed import catalogue, feature, generate, measures
from tests.service.rpc.malformed.common import INVALID, NOT_FOUND, Facts, Service, request_id_defects, set_fields


@dataclass(frozen=True)
class MalformedRequest:
    """Bytes to send to an RPC, and the status that must come back."""

    rpc: str
    data: bytes
    codes: frozenset[grpc.StatusCode]
    defect: str


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


def _services(facts: Facts) -> Iterator[Service]:
    ids = request_id_defects()
    for module in (catalogue, feature, generate, measures):
        for rpc, make, defects in module.services(facts):
            yield rpc, make, defects | ids
    yield "ListDictionaries", lambda rng, d: catalog_pb.ListDictionariesRequest(), ids
    yield "GetServerInfo", lambda rng, d: server_pb.GetServerInfoRequest(), ids
    yield (
        "GetDictionary",
        lambda rng, d: catalog_pb.GetDictionaryRequest(name=d.name),
        ids
        | {
            "no name": (INVALID, lambda r: r.ClearField("name")),
            "unknown name": (NOT_FOUND, lambda r: set_fields(r, name="no such")),
            "long name": (NOT_FOUND, lambda r: set_fields(r, name="ü\n" * 50_000)),
        },
    )
    yield (
        "Check",
        lambda rng, d: health_pb2.HealthCheckRequest(),
        {"unknown service": (NOT_FOUND, lambda r: set_fields(r, service="no.such.Service"))},
    )
