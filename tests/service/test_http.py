"""The HTTP side of a replica, without Ray."""

from __future__ import annotations

import httpx

from service.http import build_http
from service.replica import ServiceRuntime
from tests.service.conftest import Served


def client(runtime: ServiceRuntime) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=build_http(runtime, ["saeserve.v1.FeatureService"]))
    return httpx.AsyncClient(transport=transport, base_url="http://replica")


async def test_readiness_follows_the_replica(served: Served) -> None:
    async with client(served.runtime) as http:
        reply = await http.get("/healthz")
        assert (reply.status_code, reply.text) == (200, "SERVING\n")
        served.runtime.begin_drain()
        reply = await http.get("/healthz")
        assert (reply.status_code, reply.text) == (503, "NOT_SERVING\n")


async def test_metrics_and_index(served: Served) -> None:
    async with client(served.runtime) as http:
        metrics = await http.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert f"saeserve_dictionaries {len(served.dictionaries):.1f}" in metrics.text
        assert (await http.get("/")).json()["services"] == ["saeserve.v1.FeatureService"]
