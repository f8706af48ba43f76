"""grpc.health.v1.Health: whether a replica takes calls, for the server ("") and each of its services by name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection

import grpc
from grpc_health.v1 import health_pb2

from service.rpc.call import Call, Readiness
from service.rpc.errors import RpcError, shown, unavailable

_Status = health_pb2.HealthCheckResponse


class HealthRpc:
    """Handlers of Health. All services of a replica are ready or not together."""

    def __init__(self, readiness: Readiness, ready: Callable[[], bool], services: Collection[str]) -> None:
        """`readiness` says when to look again, `ready` also whether the engine is sound."""
        self._readiness = readiness
        self._ready = ready
        self._known = {"", *services}

    async def Check(self, request: health_pb2.HealthCheckRequest, call: Call) -> health_pb2.HealthCheckResponse:
        if request.service not in self._known:
            raise RpcError(grpc.StatusCode.NOT_FOUND, f"no service named {shown(request.service)}")
        return self._now()

    async def List(self, request: health_pb2.HealthListRequest, call: Call) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(statuses={name: self._now() for name in sorted(self._known)})

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, call: Call
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        known = request.service in self._known
        state = self._readiness.state
        yield self._now() if known else _Status(status=_Status.SERVICE_UNKNOWN)
        while state != "draining":
            state = await self._readiness.wait_beyond(state)
            if known:
                yield self._now()
        # An open stream would delay the drain; the client can watch another replica.
        raise unavailable("the server is draining")

    def _now(self) -> health_pb2.HealthCheckResponse:
        return _Status(status=_Status.SERVING if self._ready() else _Status.NOT_SERVING)
