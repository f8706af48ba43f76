"""The HTTP side of a replica: metrics, readiness, and an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from fastapi.concurrency import run_in_threadpool

if TYPE_CHECKING:
    from service.replica import ServiceRuntime


def build_http(runtime: ServiceRuntime, services: Sequence[str]) -> FastAPI:
    """The ASGI application of one replica; `services` are the names of its gRPC services."""
    from service.metrics import CONTENT_TYPE  # not above: this import reads PROMETHEUS_MULTIPROC_DIR

    http = FastAPI(title="saeserve", docs_url=None, redoc_url=None, openapi_url=None)

    @http.get("/")
    async def index() -> dict[str, Any]:
        return {
            "name": "saeserve",
            "about": "Features of a language model by sparse autoencoders, over gRPC. Server reflection is on.",
            "services": services,
            "paths": ["/healthz", "/metrics"],
        }

    @http.get("/healthz")
    async def healthz() -> Response:
        if runtime.ready:
            return Response("SERVING\n", media_type="text/plain")
        return Response("NOT_SERVING\n", status_code=503, media_type="text/plain")

    @http.get("/metrics")
    async def metrics() -> Response:
        runtime.note_load()
        text = await run_in_threadpool(
            runtime.metrics.render
        )  # reading the files of many replicas must not block calls
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return http
