"""What wraps every handler: request ids, admission, defects, cancellation and deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.pb.saeserve.v1 import causal_pb2, common_pb2, intervention_service_pb2, server_service_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve
from tests.service.rpc.reading import Failure, failure

pytestmark = pytest.mark.any_cpu

TEXT = common_pb2.TextInput(text="some text")


def extract(
    request_id: str = "", dictionaries: tuple[str, ...] = ("mid",), **fields: object
) -> pb.ExtractFeaturesRequest:
    fields.setdefault("inputs", [TEXT])
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


class _Delayed:
    """A method of the engine that begins, tells so, and runs when it may."""

    def __init__(self, method: Callable[[Any], Awaitable[Any]]) -> None:
        self._method = method
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, work: object) -> Any:
        self.begun.set()
        await self.go_on.wait()
        return await self._method(work)


async def refusal(served: Served) -> Failure:
    failed = await failure(served.features.ExtractFeatures(extract("late")))
    assert failed.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    return failed


class TestDraining:
    @pytest.mark.parametrize(
        ("method", "rpc", "request_message"),
        [
            ("extract", "ExtractFeatures", extract()),
            ("score", "Score", causal_pb2.ScoreRequest(inputs=[TEXT])),
            (
                "ablate",
                "AblateFeatures",
                causal_pb2.AblateFeaturesRequest(
                    inputs=[TEXT],
                    strongest=causal_pb2.StrongestFeatures(count=5, dictionaries=["mid"]),
                ),
            ),
        ],
    )
    async def test_a_running_call_ends_normally(
        self, served: Served, monkeypatch: pytest.MonkeyPatch, method: str, rpc: str, request_message: Any
    ) -> None:
        delayed = _Delayed(getattr(served.runtime.engine, method))
        monkeypatch.setattr(served.runtime.engine, method, delayed)
        stub = served.features if rpc == "ExtractFeatures" else served.interventions
        running = asyncio.ensure_future(getattr(stub, rpc)(request_message))
        await asyncio.wait_for(delayed.begun.wait(), 10)
        served.runtime.begin_drain()
        assert (await refusal(served)).code == grpc.StatusCode.UNAVAILABLE
        assert not served.runtime.readiness.drained
        delayed.go_on.set()
        assert (await running).request_id
        assert served.runtime.readiness.drained

    async def test_a_generation_streams_to_its_end(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        generate, go_on = served.runtime.engine.generate, asyncio.Event()

        async def paused_after_its_first_tokens(work: Any) -> AsyncIterator[Any]:
            async for event in generate(work):
                yield event
                await go_on.wait()

        monkeypatch.setattr(served.runtime.engine, "generate", paused_after_its_first_tokens)
        request = intervention_service_pb2.GenerateRequest(prompt=TEXT, max_new_tokens=40, ignore_end_of_text=True)
        stream = served.interventions.Generate(request)
        replies = aiter(stream)
        tokens = len((await anext(replies)).chunk.token_ids)
        served.runtime.begin_drain()
        assert (await refusal(served)).code == grpc.StatusCode.UNAVAILABLE
        assert not served.runtime.readiness.drained
        go_on.set()
        tokens += sum([len(reply.chunk.token_ids) async for reply in replies])
        assert tokens == 40
        assert await stream.code() == grpc.StatusCode.OK
        assert served.runtime.readiness.drained

    async def test_a_cancelled_call_is_not_waited_for(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        held = _Held()
        monkeypatch.setattr(served.runtime.engine, "extract", held)
        call = served.features.ExtractFeatures(extract())
        await asyncio.wait_for(held.begun.wait(), 10)
        served.runtime.begin_drain()
        assert not served.runtime.readiness.drained
        call.cancel()
        await asyncio.wait_for(held.cancelled.wait(), 10)
        await refusal(served)
        assert served.runtime.readiness.drained

    async def test_a_request_stream_answers_what_it_has_read_and_ends_unavailable(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        delayed = _Delayed(served.runtime.engine.extract)
        monkeypatch.setattr(served.runtime.engine, "extract", delayed)
        stream = served.features.ExtractFeaturesStream()
        await stream.write(pb.ExtractFeaturesStreamRequest(request=extract("read")))
        await asyncio.wait_for(delayed.begun.wait(), 10)
        served.runtime.begin_drain()
        delayed.go_on.set()
        assert (await stream.read()).response.request_id == "read"
        assert await stream.code() == grpc.StatusCode.UNAVAILABLE
        assert served.runtime.readiness.drained

    async def test_an_idle_request_stream_ends_at_once(self, served: Served) -> None:
        stream = served.features.ExtractFeaturesStream()
        await stream.write(pb.ExtractFeaturesStreamRequest(request=extract("first")))
        await stream.read()
        served.runtime.begin_drain()  # the client sends nothing more and does not close its side
        assert await asyncio.wait_for(stream.code(), 10) == grpc.StatusCode.UNAVAILABLE
        assert "draining" in await stream.details()
        assert served.runtime.readiness.drained

    async def test_an_open_health_watch_is_not_waited_for(self, served: Served) -> None:
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        served.runtime.begin_drain()
        assert served.runtime.readiness.drained

    async def test_a_replica_that_serves_is_not_drained(self, served: Served) -> None:
        assert not served.runtime.readiness.drained
