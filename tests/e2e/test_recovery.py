"""A replica that dies takes only its own calls with it."""

from __future__ import annotations

import os
import signal

import grpc
import pytest

from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceStub
from service.pb.saeserve.v1.intervention_service_pb2_grpc import InterventionServiceStub
from tests.e2e.running_service import RunningService, poll
from tests.e2e.test_api import extract_request, generate_request


def test_killed_replica_is_replaced(service: RunningService) -> None:
    [pid] = service.replica_pids()
    with service.channel() as channel:
        FeatureServiceStub(channel).ExtractFeatures(extract_request("counted before it dies"), timeout=20)
        stream = InterventionServiceStub(channel).Generate(generate_request(1000), timeout=120)
        next(stream)
        os.kill(pid, signal.SIGSTOP)  # so that the next call cannot be answered before the replica dies
        unary = FeatureServiceStub(channel).ExtractFeatures.future(extract_request("in flight"), timeout=120)
        os.kill(pid, signal.SIGKILL)
        assert unary.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError):
            for _ in stream:
                pass
        # HAProxy resets a stream that has begun, and gRPC clients read that as CANCELLED.
        assert stream.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)

    assert poll(lambda: service.is_serving() and service.replica_pids() != [pid], timeout_s=120)
    with service.channel() as channel:
        FeatureServiceStub(channel).ExtractFeatures(extract_request("again"), timeout=20)
    # The dead replica's counts are kept, its live values are not.
    assert service.metric("saeserve_active_generations") == 0
    assert service.metric('saeserve_requests_total{code="OK",rpc="ExtractFeatures"}') > 1
