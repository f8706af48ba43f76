"""Errors of calls: an exception class for each gRPC status that the server documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that the server refused."""

    field: str
    """Path of the field in the request message, such as `inputs[2].text`."""
    description: str
    """What is wrong with it."""


class SaeserveError(Exception):
    """A call failed. Codes without a subclass, such as UNIMPLEMENTED, raise this class."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        request_id: str = "",
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        resources: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.request_id = request_id
        """Id under which the server logged the call; empty if the call never reached it."""
        self.field_violations = field_violations
        """Which fields are wrong, and why (INVALID_ARGUMENT, FAILED_PRECONDITION)."""
        self.retry_after_s = retry_after_s
        """Seconds after which the server suggests another attempt, if it does."""
        self.resources = resources
        """Names of the resources that do not exist (NOT_FOUND)."""

    def __str__(self) -> str:
        text = f"{self.code.name}: {self.message}"
        # The message often repeats its only violation.
        for violation in self.field_violations:
            if violation.description not in self.message:
                text += f"\n  {violation.field}: {violation.description}"
        return f"{text} (request {self.request_id})" if self.request_id else text


class InvalidArgument(SaeserveError):
    """The request is wrong; `field_violations` says where."""


class NotFound(SaeserveError):
    """A dictionary or feature does not exist; `resources` names it."""


class FailedPrecondition(SaeserveError):
    """The request is valid, but something it names cannot do this, such as a dictionary without statistics."""


class ResourceExhausted(SaeserveError):
    """The server's queue is full, or a message is too large."""


class Unavailable(SaeserveError):
    """No server answers at the address, or it is starting or draining."""


class DeadlineExceeded(SaeserveError):
    """The call took longer than its timeout."""


class Cancelled(SaeserveError):
    """The call was cancelled, by the client or the server."""


class Internal(SaeserveError):
    """A fault of the server."""


class Unauthenticated(SaeserveError):
    """The call carries no valid credentials."""


class PermissionDenied(SaeserveError):
    """The credentials do not allow the call."""


_CLASSES: dict[grpc.StatusCode, type[SaeserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}


def error_of_code(code: grpc.StatusCode, message: str, **details: Any) -> SaeserveError:
    """The exception for a status code; `details` are SaeserveError's keyword arguments."""
    return _CLASSES.get(code, SaeserveError)(code, message, **details)


def error_of_call(error: grpc.RpcError) -> SaeserveError:
    """The exception for a failed call of grpc or grpc.aio, with the google.rpc details from its trailing metadata."""
    call: Any = error  # the RpcErrors that grpc raises are also calls, which their type does not say
    return error_of_code(call.code(), call.details() or "", **_read_details(call.trailing_metadata() or ()))


def _read_details(trailing_metadata: Any) -> dict[str, Any]:
    metadata = dict(trailing_metadata)
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))
    violations: list[FieldViolation] = []
    resources: list[str] = []
    details: dict[str, Any] = {"request_id": metadata.get("request-id", "")}
    for detail in status.details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
        elif detail.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR):
            failure = error_details_pb2.PreconditionFailure.FromString(detail.value)
            violations += [FieldViolation(v.subject, v.description) for v in failure.violations]
        elif detail.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
            resources.append(error_details_pb2.ResourceInfo.FromString(detail.value).resource_name)
        elif detail.Is(error_details_pb2.RequestInfo.DESCRIPTOR):
            details["request_id"] = error_details_pb2.RequestInfo.FromString(detail.value).request_id
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            details["retry_after_s"] = delay.seconds + delay.nanos / 1e9
    return details | {"field_violations": tuple(violations), "resources": tuple(resources)}
