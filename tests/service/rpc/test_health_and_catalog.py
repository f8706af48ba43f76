"""Health, catalogue and server information."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sae_runtime.model.sites import LOCATIONS
from service.pb.saeserve.v1 import catalog_service_pb2, server_service_pb2
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve

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


async def test_catalog(served: Served) -> None:
    listed = await served.catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest(request_id="c-1"))
    assert listed.request_id == "c-1"
    assert [d.name for d in listed.dictionaries] == sorted(served.dictionaries)
    reply = await served.catalog.GetDictionary(catalog_service_pb2.GetDictionaryRequest(name="mid"))
    mid = reply.dictionary
    assert (mid.site, mid.architecture, mid.d_in, mid.n_latents, mid.k) == ("1.resid_post_mlp", "topk", 32, 96, 8)
    assert mid.normalizes_input
    assert mid.has_statistics
    assert not next(d for d in listed.dictionaries if d.name == "plain").has_statistics
    assert not reply.HasField("provenance")


async def test_server_info(served: Served) -> None:
    info = await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert info.request_id
    assert info.backbone.fingerprint == served.backbone.fingerprint
    assert list(info.dictionaries) == sorted(served.dictionaries)
    assert len(info.backbone.sites) == served.backbone.n_layers * len(LOCATIONS)
    assert info.library_versions["torch"]
    assert info.device == "cpu"
    limits = served.runtime.limits
    assert info.limits.max_tokens_per_input == served.backbone.context_length
    assert info.limits.max_text_bytes == limits.max_text_bytes == LIMITS.max_text_bytes
    assert info.limits.max_queued_tokens == served.runtime.settings.engine.max_queued_tokens
    assert info.limits.max_concurrent_generations == served.runtime.settings.engine.max_concurrent_generations
