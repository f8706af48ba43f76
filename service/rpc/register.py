"""All RPCs of a replica by name, and how a gRPC server learns of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from service.pb.saeserve.v1 import (
    catalog_service_pb2,
    feature_service_pb2,
    intervention_service_pb2,
    server_service_pb2,
)
from service.rpc.call import CallWrapper, StreamHandler, UnaryHandler, tolerant_deserializer

if TYPE_CHECKING:
    from service.replica import ServiceRuntime

HEALTH_SERVICE = "grpc.health.v1.Health"

_SERVICES = (
    feature_service_pb2.DESCRIPTOR.services_by_name["FeatureService"],
    intervention_service_pb2.DESCRIPTOR.services_by_name["InterventionService"],
    catalog_service_pb2.DESCRIPTOR.services_by_name["CatalogService"],
    server_service_pb2.DESCRIPTOR.services_by_name["ServerService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)


@dataclass(frozen=True)
class Rpc:
    """One RPC, as its .proto says."""

    service: str
    """Full name, such as "saeserve.v1.FeatureService"."""
    name: str
    """Method name; unique over all services, because Ray Serve routes by it alone."""
    request_class: type[Message]
    reply_class: type[Message]
    streams_requests: bool
    streams_replies: bool

    @classmethod
    def of(cls, method: MethodDescriptor) -> Rpc:
        return cls(
            service=method.containing_service.full_name,
            name=method.name,
            request_class=GetMessageClass(method.input_type),
            reply_class=GetMessageClass(method.output_type),
            streams_requests=method.client_streaming,
            streams_replies=method.server_streaming,
        )


RPCS: Mapping[str, Rpc] = {method.name: Rpc.of(method) for service in _SERVICES for method in service.methods}
"""Every RPC of the server by method name, health included."""

Handlers = Mapping[str, UnaryHandler | StreamHandler]
"""By method name: `async (request, context) -> reply`, or an async generator function `(request, context)`."""


def build_handlers(runtime: ServiceRuntime) -> Handlers:
    """A handler for every RPC in RPCS, for one replica."""
    # Here, because they bring torch, which the processes that only register services (Ray Serve's proxies) do not need.
    from service.rpc.catalog import CatalogRpc
    from service.rpc.catalogue.features import CatalogueRpc
    from service.rpc.catalogue.label import LabelRpc
    from service.rpc.catalogue.search import SearchRpc
    from service.rpc.feature import FeatureRpc
    from service.rpc.health import HealthRpc
    from service.rpc.intervention.ablate import AblateRpc
    from service.rpc.intervention.attribute import AttributeRpc
    from service.rpc.intervention.contrast import ContrastRpc
    from service.rpc.intervention.generate import GenerateRpc
    from service.rpc.intervention.score import ScoreRpc
    from service.rpc.server import ServerRpc

    with_model = (FeatureRpc, GenerateRpc, ScoreRpc, AblateRpc, AttributeRpc, ContrastRpc, SearchRpc)
    services = {rpc.service for rpc in RPCS.values()} - {HEALTH_SERVICE}
    objects: list[Any] = [
        *(made(runtime.engine, runtime.model, runtime.limits, runtime.text_reader) for made in with_model),
        CatalogRpc(runtime.model),
        CatalogueRpc(runtime.model, runtime.limits),
        LabelRpc(runtime.model, runtime.limits),
        ServerRpc(runtime.model, runtime.limits, runtime.settings.engine),
        HealthRpc(runtime.readiness, lambda: runtime.ready, services),
    ]
    wrapper = CallWrapper(runtime.readiness, runtime.metrics, runtime.note_load)
    handlers: dict[str, UnaryHandler | StreamHandler] = {}
    for rpc in RPCS.values():
        (method,) = (getattr(service, rpc.name) for service in objects if hasattr(service, rpc.name))
        always = rpc.service == HEALTH_SERVICE
        if rpc.streams_replies:
            handlers[rpc.name] = wrapper.stream(rpc.name, method, always=always)
        else:
            handlers[rpc.name] = wrapper.unary(rpc.name, method, rpc.reply_class, always=always)
    return handlers


def add_services(servicer: object, server: Any) -> None:
    """Registers every RPC of RPCS, as the generated add_…Servicer_to_server functions do; `servicer` has the methods.

    Ray Serve calls this by its import path (gRPCOptions.grpc_servicer_functions). Unlike the generated functions it
    parses requests so that undecodable bytes reach the handler, which answers INVALID_ARGUMENT.
    """
    for service in _SERVICES:
        methods = {
            name: _method_handler(rpc, getattr(servicer, name))
            for name, rpc in RPCS.items()
            if rpc.service == service.full_name
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, methods),))
        server.add_registered_method_handlers(service.full_name, methods)


def add_to_grpc_server(handlers: Handlers, server: grpc.aio.Server) -> None:
    """Serves the handlers on a plain grpc.aio server."""
    add_services(SimpleNamespace(**handlers), server)


def _method_handler(rpc: Rpc, handler: Callable[..., Any]) -> Any:
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return kinds[rpc.streams_requests, rpc.streams_replies](
        handler,
        request_deserializer=tolerant_deserializer(rpc.request_class),
        response_serializer=rpc.reply_class.SerializeToString,
    )
