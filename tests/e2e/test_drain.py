"""What a stopped service does for calls that run: they end, or are cut after `drain_s` or at the second signal."""

from __future__ import annotations

import os
import signal
import threading
import urllib.error
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from service.pb.saeserve.v1 import intervention_service_pb2 as intervention_pb
from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceStub
from service.pb.saeserve.v1.intervention_service_pb2_grpc import InterventionServiceStub
from tests.e2e.running_service import RunningService, alive, poll, start_service
from tests.e2e.test_api import extract_request, generate_request
from tests.e2e.tiny_model import TinyModel

TOKENS = 1000
HELD_BYTES = 400_000
"""More than all buffers between a replica and a client that does not read hold, with `reader_channel`."""


def start(model: TinyModel, *flags: str) -> RunningService:
    dictionaries = ",".join(map(str, model.dictionaries))
    return start_service(
        f"--backbone={model.backbone}", f"--dictionaries={dictionaries}", f"--limits.max-new-tokens={TOKENS}", *flags
    )


def reader_channel(service: RunningService) -> grpc.Channel:
    """A client whose transport reads only a little ahead of it, so that a stream it does not read stays unfinished."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65535),
    ]
    return grpc.insecure_channel(service.grpc_address, options=options)


def begin_generation(channel: grpc.Channel) -> tuple[Any, intervention_pb.GenerateResponse]:
    """A long stream with large replies, and its first reply."""
    request = generate_request(TOKENS)
    request.top_logprobs = 20
    request.features.dictionaries.extend(["mid", "late"])
    request.features.top_k = 8
    stream = InterventionServiceStub(channel).Generate(request, timeout=300)
    return stream, next(stream)


def idle_requests(end: threading.Event) -> Iterator[feature_pb.ExtractFeaturesStreamRequest]:
    """One request, and then no other until the end."""
    yield feature_pb.ExtractFeaturesStreamRequest(request=extract_request("first"))
    end.wait(300)


def says(service: RunningService, status: int) -> bool:
    with service.channel() as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    return bool(reply.status == status)


def http_status(service: RunningService) -> int:
    try:
        service.get("/healthz")
    except urllib.error.HTTPError as error:
        return error.code
    return 200


@pytest.mark.parametrize(
    ("ingress", "signal_number"), [("haproxy", signal.SIGINT), ("haproxy", signal.SIGTERM), ("serve", signal.SIGINT)]
)
def test_running_streams_end_and_new_calls_are_refused(
    tiny_model: TinyModel, ingress: str, signal_number: signal.Signals
) -> None:
    service = start(tiny_model, f"--ingress={ingress}", "--drain-s=300")
    processes = service.processes()
    with reader_channel(service) as channel, service.channel() as others:
        stream, first = begin_generation(channel)
        watch = health_pb2_grpc.HealthStub(others).Watch(health_pb2.HealthCheckRequest(), timeout=300)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        service.signal(signal_number)

        assert poll(lambda: says(service, health_pb2.HealthCheckResponse.NOT_SERVING))
        assert http_status(service) == 503
        with pytest.raises(grpc.RpcError) as refused:
            FeatureServiceStub(others).ExtractFeatures(extract_request("late"), timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(refused.value)
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert watch.code() == grpc.StatusCode.UNAVAILABLE

        replies = [first, *stream]
        assert stream.code() == grpc.StatusCode.OK
        assert sum(len(reply.chunk.token_ids) for reply in replies) == TOKENS
        assert replies[-1].HasField("finish")
        assert sum(reply.ByteSize() for reply in replies) > HELD_BYTES
    assert service.process.wait(60) == 0
    assert alive(processes) == []
    assert service.process.stderr is not None
    assert service.process.stderr.read() == ""


def test_a_second_signal_cuts_what_runs(tiny_model: TinyModel) -> None:
    service = start(tiny_model, "--drain-s=3000")
    processes = service.processes()
    with reader_channel(service) as channel:
        stream, _ = begin_generation(channel)
        service.signal(signal.SIGINT)
        assert poll(lambda: says(service, health_pb2.HealthCheckResponse.NOT_SERVING))
        service.signal(signal.SIGINT)
        assert service.process.wait(60) == 0
        with pytest.raises(grpc.RpcError):
            list(stream)
    assert alive(processes) == []


def test_a_client_that_does_not_read_is_cut_after_drain_s(tiny_model: TinyModel) -> None:
    service = start(tiny_model, "--drain-s=1")
    processes = service.processes()
    with reader_channel(service) as channel:
        stream, _ = begin_generation(channel)
        assert service.stop() == 0
        with pytest.raises(grpc.RpcError):
            list(stream)
    assert alive(processes) == []


def test_a_replica_that_dies_and_idle_streams_do_not_hold_up_the_drain(tiny_model: TinyModel) -> None:
    service = start(tiny_model, "--drain-s=3000", "--replicas=2")
    processes = service.processes()
    with reader_channel(service) as channel, service.channel() as others:
        stream, _ = begin_generation(channel)
        hold = threading.Event()
        idle = FeatureServiceStub(others).ExtractFeaturesStream(idle_requests(hold), timeout=300)
        next(idle)
        service.signal(signal.SIGINT)
        assert poll(lambda: says(service, health_pb2.HealthCheckResponse.NOT_SERVING))
        for pid in service.replica_pids():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            list(stream)
        assert service.process.wait(120) == 0
        with pytest.raises(grpc.RpcError):
            list(idle)
        hold.set()
        assert idle.code() == grpc.StatusCode.UNAVAILABLE
    assert alive(processes) == []
