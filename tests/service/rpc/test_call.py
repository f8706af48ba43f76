"""What wraps every handler: request ids, admission, defects, cancellation and deadlines."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2

from service.pb.saeserve.v1 import common_pb2, server_service_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve
from tests.service.rpc.reading import failure

pytestmark = pytest.mark.any_cpu


def extract(
    request_id: str = "", dictionaries: tuple[str, ...] = ("mid",), **fields: object
) -> pb.ExtractFeaturesRequest:
    fields.setdefault("inputs", [common_pb2.TextInput(text="some text")])
    return pb.ExtractFeaturesRequest(request_id=request_id, dictionaries=dictionaries, **fields)


@pytest.mark.parametrize("request_id", ["x" * 129, "tab\there", "ümlaut"])
async def test_request_ids_that_cannot_be_echoed(served: Served, request_id: str) -> None:
    failed = await failure(served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest(request_id=request_id)))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failed.fields == ["request_id"]


async def test_unavailable_before_start_and_while_draining() -> None:
    async for served in serve(ReplicaSettings(limits=LIMITS), open_now=False):
        for state in ("starting", "draining"):
            failed = await failure(served.features.ExtractFeatures(extract("early")))
            assert failed.code == grpc.StatusCode.UNAVAILABLE
            assert state in failed.message
            assert failed.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
            served.runtime.begin_drain()


async def test_internal_error_says_nothing_but_the_request_id(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(work: object) -> None:
        raise RuntimeError("secret path /etc/nowhere")

    monkeypatch.setattr(served.runtime.engine, "extract", broken)
    failed = await failure(served.features.ExtractFeatures(extract("int-1")))
    assert failed.code == grpc.StatusCode.INTERNAL
    assert failed.message == "internal error; request id int-1"
    assert [type(detail) for detail in failed.details] == [error_details_pb2.RequestInfo]
    assert "secret path" in caplog.text
    assert "int-1" in caplog.text


class _Held:
    """An engine.extract that begins, tells so, and never ends."""

    def __init__(self) -> None:
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()

    async def __call__(self, work: object) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


async def test_cancelled_and_expired_calls_reach_the_engine(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = _Held()
    monkeypatch.setattr(served.runtime.engine, "extract", held)
    call = served.features.ExtractFeatures(extract())
    await asyncio.wait_for(held.begun.wait(), 10)
    call.cancel()
    await asyncio.wait_for(held.cancelled.wait(), 10)

    for timeout_s in (0.2, 2, 20):  # on a slow machine a call may expire before it has begun
        held = _Held()
        monkeypatch.setattr(served.runtime.engine, "extract", held)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.features.ExtractFeatures(extract(), timeout=timeout_s)
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if held.begun.is_set():
            break
    await asyncio.wait_for(held.cancelled.wait(), 10)

    held = _Held()
    monkeypatch.setattr(served.runtime.engine, "extract", held)
    stream = served.features.ExtractFeaturesStream(iter([pb.ExtractFeaturesStreamRequest(request=extract())]))
    reading = asyncio.ensure_future(stream.read())
    await asyncio.wait_for(held.begun.wait(), 10)
    stream.cancel()
    await asyncio.wait_for(held.cancelled.wait(), 10)
    with pytest.raises(asyncio.CancelledError):
        await reading
