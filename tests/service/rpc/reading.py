"""Reads what tests of several RPCs get back: dense features, and errors with their details."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray

from sae_runtime import Dictionary
from service.arrays import unpack_sparse_rows
from service.pb.saeserve.v1 import common_pb2

Detail = TypeVar("Detail", bound=Message)


def dense(rows: common_pb2.SparseRows, dictionary: Dictionary) -> NDArray[np.float32]:
    """[n, n_latents]."""
    splits, indices, values = unpack_sparse_rows(rows)
    out = np.zeros((len(splits) - 1, dictionary.n_latents), np.float32)
    row = np.repeat(np.arange(len(splits) - 1), np.diff(splits.astype(int)))
    out[row, indices] = values
    return out


@dataclass(frozen=True)
class Failure:
    """The status of a call that failed."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...]
    trailing_metadata: dict[str, Any]

    def all_of(self, kind: type[Detail]) -> list[Detail]:
        return [detail for detail in self.details if isinstance(detail, kind)]

    def detail(self, kind: type[Detail]) -> Detail:
        """The one detail of a kind."""
        (detail,) = self.all_of(kind)
        return detail

    @property
    def fields(self) -> list[str]:
        """Paths of the fields that an INVALID_ARGUMENT names."""
        return [violation.field for violation in self.detail(error_details_pb2.BadRequest).field_violations]

    @property
    def resources(self) -> list[tuple[str, str]]:
        """Type and name of what a NOT_FOUND did not find."""
        return [(each.resource_type, each.resource_name) for each in self.all_of(error_details_pb2.ResourceInfo)]


async def failure(call: Awaitable[object]) -> Failure:
    """The failure of a call, of which there must be one; of a stream, of its first reply."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    return read_failure(raised.value)


def read_failure(error: grpc.aio.AioRpcError) -> Failure:
    status = rpc_status.from_call(_Sync(error))  # type: ignore[arg-type]
    assert status is not None
    assert status.message == error.details()
    details = []
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.TypeName().removeprefix("google.rpc."))()
        assert packed.Unpack(detail)
        details.append(detail)
    return Failure(error.code(), error.details() or "", tuple(details), dict(error.trailing_metadata()))


class _Sync:
    """AioRpcError in the shape that grpc_status reads."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details = error.code, error.details
        self.trailing_metadata = lambda: tuple(error.trailing_metadata())
