"""A whole replica without Ray: tiny random models behind a plain grpc.aio server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import grpc
import pytest

from sae_runtime import Backbone, Dictionary
from service.engine.settings import EngineSettings
from service.pb.saeserve.v1 import (
    catalog_service_pb2_grpc,
    feature_service_pb2_grpc,
    intervention_service_pb2_grpc,
    server_service_pb2_grpc,
)
from service.replica import ReplicaSettings, ServiceRuntime
from service.rpc.limits import Limits
from service.rpc.register import add_to_grpc_server, build_handlers
from tests.builders import small_backbone, small_dictionaries

LIMITS = Limits(
    max_inputs=80, max_tokens_per_request=4000, max_text_bytes=600, max_activation_rows=64, max_dictionaries=5,
    max_selected_features=50, max_new_tokens=40, max_edits=6, max_stop_strings=4, max_stop_bytes=20,
)  # fmt: skip


@dataclass
class Served:
    """A running server and ways to call it."""

    runtime: ServiceRuntime
    channel: grpc.aio.Channel
    address: str

    @property
    def backbone(self) -> Backbone:
        return self.runtime.model.backbone

    @property
    def dictionaries(self) -> dict[str, Dictionary]:
        return dict(self.runtime.model.dictionaries)

    @property
    def features(self) -> feature_service_pb2_grpc.FeatureServiceAsyncStub:
        return feature_service_pb2_grpc.FeatureServiceStub(self.channel)

    @property
    def interventions(self) -> intervention_service_pb2_grpc.InterventionServiceAsyncStub:
        return intervention_service_pb2_grpc.InterventionServiceStub(self.channel)

    @property
    def catalog(self) -> catalog_service_pb2_grpc.CatalogServiceAsyncStub:
        return catalog_service_pb2_grpc.CatalogServiceStub(self.channel)

    @property
    def server(self) -> server_service_pb2_grpc.ServerServiceAsyncStub:
        return server_service_pb2_grpc.ServerServiceStub(self.channel)


def served_dictionaries() -> dict[str, Dictionary]:
    """ReLU and TopK, normalising or not, over three sites; "plain" has no statistics."""
    dictionaries = small_dictionaries()
    plain = replace(dictionaries["mid"], statistics=None)
    return {name: replace(d, name=name) for name, d in (dictionaries | {"plain": plain}).items()}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async for server in serve(ReplicaSettings(limits=LIMITS)):
        yield server


async def serve(
    settings: ReplicaSettings,
    *,
    open_now: bool = True,
    dictionaries: dict[str, Dictionary] | None = None,
    backbone: Backbone | None = None,
) -> AsyncIterator[Served]:
    """One running server; yields once."""
    runtime = ServiceRuntime(backbone or small_backbone(), dictionaries or served_dictionaries(), settings)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    add_to_grpc_server(build_handlers(runtime), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    if open_now:
        await runtime.open()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(runtime, channel, f"127.0.0.1:{port}")
    finally:
        await runtime.stop()
        await server.stop(0)


def tight_settings() -> ReplicaSettings:
    """A queue that holds next to nothing."""
    return ReplicaSettings(
        limits=LIMITS,
        engine=EngineSettings(max_queued_tokens=1, max_concurrent_generations=1, max_queued_generations=0),
    )
