"""The Ray Serve application: one ingress deployment that speaks gRPC and HTTP.

`build_app` is the import path of Serve config files (`service.app:build_app`, see deploy/serve.yaml). The handlers
themselves live in service/rpc and know nothing of Ray.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from service.rpc.register import RPCS
from service.settings import AppSettings

START_FAILURE = "saeserve-start-failure: "
"""Precedes the message of a replica's start-up error in Ray's text of it."""

SERVICER_FUNCTIONS = ("service.rpc.register.add_services",)
"""Import paths for gRPCOptions.grpc_servicer_functions: they make the ingress accept our services and health."""


def _delegates_rpcs(cls: type) -> type:
    """Gives a class one method for each RPC, which passes the call on to the handler of that name."""
    for rpc in RPCS.values():
        setattr(cls, rpc.name, (_stream if rpc.streams_replies else _unary)(rpc.name))
    return cls


def _unary(name: str) -> Callable[..., Awaitable[Any]]:
    async def call(self: Any, request: Any, grpc_context: Any) -> Any:
        return await self.handlers[name](request, grpc_context)

    call.__name__ = name
    return call


def _stream(name: str) -> Callable[..., AsyncIterator[Any]]:
    async def call(self: Any, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async with aclosing(self.handlers[name](request, grpc_context)) as replies:
            async for reply in replies:
                yield reply

    call.__name__ = name
    return call


@serve.deployment
@serve.ingress()
@_delegates_rpcs
class FeatureServer:
    """A replica: loads backbone and dictionaries, then answers the API until it is stopped."""

    async def __init__(self, settings: AppSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        _share_metrics(settings.metrics_dir)
        try:
            # Imported here: they load torch, which the deploying process does not need, and read that folder's name.
            from service.replica import ServiceRuntime
            from service.rpc.register import build_handlers

            self.runtime = await ServiceRuntime.start(settings.replica_settings())
            self.event_loop = asyncio.get_running_loop()
            self.handlers = build_handlers(self.runtime)
        except Exception as error:
            message = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(START_FAILURE + message) from error

    async def check_health(self) -> None:
        """Raises if the replica is broken; Ray Serve then replaces it."""
        if not self.runtime.engine.ready:  # a replica that drains is sound
            raise RuntimeError("the engine does not run")

    def drain(self) -> bool:
        """Refuses new calls from now on. Returns whether no call runs any more. Callable from any thread."""
        self.event_loop.call_soon_threadsafe(self.runtime.begin_drain)
        return self.runtime.readiness.drained

    async def __del__(self) -> None:
        runtime = getattr(self, "runtime", None)
        if runtime is not None:
            await runtime.stop()

    def __serve_build_asgi_app__(self) -> FastAPI:
        from service.http import build_http
        from service.rpc.register import RPCS

        return build_http(self.runtime, sorted({rpc.service for rpc in RPCS.values()}))


def drain_replica(actor: object) -> bool:
    """`FeatureServer.drain` of the replica whose actor runs this function (Ray's `__ray_call__` passes the actor)."""
    server: Any = serve.get_replica_context().servable_object
    return bool(server.drain())


def build_app(args: dict[str, Any] | AppSettings) -> serve.Application:
    """The application. `args` are AppSettings or their values as a mapping (a Serve config's `args`).

    Raises:
        pydantic.ValidationError: a value that does not fit, or an unknown name.
    """
    settings = args if isinstance(args, AppSettings) else AppSettings.model_validate(args)
    settings = settings.share_gpus(ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0)
    deployment: serve.Deployment = FeatureServer  # type: ignore[assignment]  # made one by the decorator
    return deployment.options(**deployment_options(settings)).bind(settings)


def deployment_options(settings: AppSettings) -> Mapping[str, Any]:
    """Options of the deployment; a Serve config's `deployments` section overrides them."""
    return {
        "num_replicas": settings.replicas,
        "ray_actor_options": {"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        "max_ongoing_requests": settings.max_ongoing_requests,
        "max_queued_requests": settings.max_queued_requests,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
    }


def _share_metrics(directory: str) -> None:
    """Names the folder where the replicas of a node share their metrics, for prometheus_client to read when imported.

    Here and not in the node's environment: there, Ray's own processes would write their metrics to it as well.
    """
    session = ray.get_runtime_context().get_session_name()
    default = Path(tempfile.gettempdir()) / f"saeserve-metrics-{session}"
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory or str(default)
