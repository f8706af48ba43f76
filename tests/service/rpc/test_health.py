"""Health follows the replica."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, serve

pytestmark = pytest.mark.any_cpu


Status = health_pb2.HealthCheckResponse
SERVICES = ["", *(f"saeserve.v1.{name}Service" for name in ("Feature", "Intervention", "Catalog", "Server"))]


async def test_health_follows_the_replica() -> None:
    async for served in serve(ReplicaSettings(limits=LIMITS), open_now=False):
        health = health_pb2_grpc.HealthStub(served.channel)
        watched = health.Watch(health_pb2.HealthCheckRequest())
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="no.such.Service"))
        assert (await watched.read()).status == Status.NOT_SERVING
        assert (await unknown.read()).status == Status.SERVICE_UNKNOWN
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == Status.NOT_SERVING

        await served.runtime.open()
        assert (await watched.read()).status == Status.SERVING
        for service in SERVICES:
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == Status.SERVING
        assert set((await health.List(health_pb2.HealthListRequest())).statuses) == set(SERVICES)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND

        served.runtime.begin_drain()
        assert (await watched.read()).status == Status.NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == Status.NOT_SERVING
        assert await watched.code() == grpc.StatusCode.UNAVAILABLE
        assert await unknown.code() == grpc.StatusCode.UNAVAILABLE
