"""Errors of the API: what a handler raises, and the one place where errors become gRPC statuses.

A status carries details as google.rpc messages in the trailing metadata `grpc-status-details-bin`. It is set on the
call's context and the handler then returns an empty reply: on Ray Serve, raising would drop the trailing metadata and
show the exception's text to the client. A plain grpc.aio context takes it the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from sae_runtime.errors import CatalogueError, UnknownDictionary
from service.engine.errors import EngineStopped, NonFiniteActivations, QueueFull

logger = logging.getLogger(__name__)

# Trailing metadata must stay well below the 8 KiB of headers that gRPC clients and HTTP/2 proxies accept by default,
# and the status travels in base64.
_MAX_STATUS_BYTES = 4_096
_MAX_MESSAGE_CHARACTERS = 500


class GrpcContext(Protocol):
    """What handlers use of a call's context: Ray Serve's RayServegRPCContext and grpc.aio's ServicerContext have it."""

    def set_code(self, code: grpc.StatusCode, /) -> None: ...
    def set_details(self, details: str, /) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Any, /) -> None: ...


class Violation(NamedTuple):
    """One thing that is wrong with a request."""

    field: str
    """Path of the field, such as "inputs[2].text"."""
    description: str


class RpcError(Exception):
    """An error sent to the client, with google.rpc messages as details."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


def invalid_argument(violations: Sequence[Violation]) -> RpcError:
    """INVALID_ARGUMENT with BadRequest: all that is wrong with a request."""
    message = "; ".join(f"{field}: {description}" for field, description in violations)
    details = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
            for field, description in violations
        ]
    )
    return RpcError(grpc.StatusCode.INVALID_ARGUMENT, message, details)


def dictionary_not_found(names: Sequence[str], loaded: Sequence[str]) -> RpcError:
    """NOT_FOUND with one ResourceInfo a name."""
    there_are = ", ".join(loaded) or "none"
    message = f"no dictionary named {', '.join(map(shown, names))}; loaded: {there_are}"
    details = [
        error_details_pb2.ResourceInfo(
            resource_type="saeserve.v1.Dictionary", resource_name=shortened(name), description="is not loaded"
        )
        for name in names
    ]
    return RpcError(grpc.StatusCode.NOT_FOUND, message, *details)


def preset_not_found(names: Sequence[str], known: Sequence[str]) -> RpcError:
    """NOT_FOUND with one ResourceInfo a name."""
    message = f"no edit preset named {', '.join(map(shown, names))}; there are: {', '.join(known) or 'none'}"
    details = [
        error_details_pb2.ResourceInfo(
            resource_type="saeserve.v1.EditPreset", resource_name=shortened(name), description="there is none"
        )
        for name in names
    ]
    return RpcError(grpc.StatusCode.NOT_FOUND, message, *details)


def features_not_found(features: Sequence[tuple[str, int, int]]) -> RpcError:
    """NOT_FOUND with one ResourceInfo a feature, given as (dictionary, feature, n_latents)."""
    message = "; ".join(
        f"feature {feature} is outside 0..{n_latents - 1} of {shown(name)}" for name, feature, n_latents in features
    )
    details = [
        error_details_pb2.ResourceInfo(
            resource_type="saeserve.v1.Feature",
            resource_name=f"{shortened(name)}:{feature}",
            description="the dictionary has no such feature",
        )
        for name, feature, _ in features
    ]
    return RpcError(grpc.StatusCode.NOT_FOUND, message, *details)


def not_in_catalogue(dictionary: str, feature: int) -> RpcError:
    """NOT_FOUND with ResourceInfo: the dictionary has the feature, but its catalogue does not."""
    message = f"the catalogue of {shown(dictionary)} has no feature {feature}"
    details = error_details_pb2.ResourceInfo(
        resource_type="saeserve.v1.Feature", resource_name=f"{shortened(dictionary)}:{feature}", description=message
    )
    return RpcError(grpc.StatusCode.NOT_FOUND, message, details)


def failed_precondition(subjects: Sequence[Violation], kind: str) -> RpcError:
    """FAILED_PRECONDITION with PreconditionFailure: the request is well formed, but what it names lacks something."""
    message = "; ".join(f"{field}: {description}" for field, description in subjects)
    details = error_details_pb2.PreconditionFailure(
        violations=[
            error_details_pb2.PreconditionFailure.Violation(type=kind, subject=field, description=description)
            for field, description in subjects
        ]
    )
    return RpcError(grpc.StatusCode.FAILED_PRECONDITION, message, details)


def resource_exhausted(message: str, retry_after_s: float) -> RpcError:
    """RESOURCE_EXHAUSTED with RetryInfo."""
    return RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, _retry_info(retry_after_s))


def unavailable(message: str, retry_after_s: float = 1.0) -> RpcError:
    """UNAVAILABLE with RetryInfo."""
    return RpcError(grpc.StatusCode.UNAVAILABLE, message, _retry_info(retry_after_s))


def as_rpc_error(error: Exception, request_id: str) -> RpcError:
    """Maps errors of the engine and the library. Any other error becomes INTERNAL and is logged."""
    if isinstance(error, RpcError):
        return error
    if isinstance(error, QueueFull):
        return resource_exhausted(str(error), error.retry_after_s)
    if isinstance(error, EngineStopped):
        return unavailable("the replica does not take work")
    if isinstance(error, UnknownDictionary):
        return RpcError(grpc.StatusCode.NOT_FOUND, shortened(str(error), _MAX_MESSAGE_CHARACTERS))
    if isinstance(error, CatalogueError):
        logger.error("request %s failed: %s", request_id, error)
        reason = "the catalogue or the labels of the dictionary are damaged; the server's log says more"
        return failed_precondition([Violation("dictionary", reason)], "CATALOGUE")
    if isinstance(error, NonFiniteActivations):
        return invalid_argument([Violation("", str(error))])
    logger.error("request %s failed", request_id, exc_info=error)
    return RpcError(grpc.StatusCode.INTERNAL, f"internal error; request id {request_id}")


@contextmanager
def out_of_range(field: str) -> Iterator[None]:
    """Turns an error about activations that are not finite into RpcError INVALID_ARGUMENT at `field`."""
    try:
        yield
    except NonFiniteActivations as error:
        raise invalid_argument([Violation(field, str(error))]) from error


def set_error(context: GrpcContext, error: RpcError, request_id: str) -> None:
    """Writes an error to a call's context; the handler then returns an empty reply (a stream just ends)."""
    message = shortened(error.message, _MAX_MESSAGE_CHARACTERS)
    context.set_code(error.code)
    context.set_details(message)
    context.set_trailing_metadata(
        [
            ("request-id", request_id),
            ("grpc-status-details-bin", _status(error, message, request_id).SerializeToString()),
        ]
    )


def _status(error: RpcError, message: str, request_id: str) -> status_pb2.Status:
    status = status_pb2.Status(code=error.code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    for detail in error.details:
        status.details.add().Pack(_fitted(detail, _MAX_STATUS_BYTES - status.ByteSize()))
        if status.ByteSize() > _MAX_STATUS_BYTES:
            del status.details[-1]
            break
    return status


def _fitted(detail: Message, size: int) -> Message:
    """The detail, with violations at its end left out until it fits."""
    if isinstance(detail, error_details_pb2.BadRequest):
        while len(detail.field_violations) > 1 and detail.ByteSize() > size - 64:
            del detail.field_violations[-1]
    elif isinstance(detail, error_details_pb2.PreconditionFailure):
        while len(detail.violations) > 1 and detail.ByteSize() > size - 64:
            del detail.violations[-1]
    return detail


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(max(1, round(seconds * 1000)))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def shortened(text: str, limit: int = 80) -> str:
    """The text, cut to `limit` characters: what clients send may be of any length."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shown(text: str) -> str:
    """The text in quotes, for messages: cut, and with control characters escaped."""
    return repr(shortened(text))
