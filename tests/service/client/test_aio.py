"""Streams, cancellation and health: scripts that the asyncio client and the blocking one both run."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from service.client import AsyncClient, Client, DeadlineExceeded, NotFound
from tests.service.client.both_clients import Run, items, value
from tests.service.client.fake_server import FakeServer, Running


def test_all_dictionaries_are_asked_for_once(run: Run, fake: FakeServer):
    async def script(client: Any) -> None:
        await value(client.extract_features("a"))
        await value(client.extract_features("b"))

    run(script)
    assert [list(request.dictionaries) for request in fake.requests("ExtractFeatures")] == [
        ["resid-late", "resid-mid"]
    ] * 2
    assert len(fake.requests("GetServerInfo")) == 1


def test_stream_keeps_the_order(run: Run, fake: FakeServer):
    requests = [["a b", "c"], "d e f", [1, 2]]
    replies = run(lambda client: items(client.extract_features_stream(requests, "resid-mid", threshold=0.5)))
    assert [[entry.n_tokens for entry in reply.inputs] for reply in replies] == [[2, 1], [3], [2]]
    assert all(request.selection.threshold == 0.5 for request in fake.requests("ExtractFeaturesStream")[1:])


def test_stream_of_an_iterable_that_fails(run: Run):
    def requests() -> Iterator[str]:
        yield "a b"
        raise RuntimeError("the file ended")

    received = []

    async def script(client: Any) -> None:
        stream = client.extract_features_stream(requests(), "resid-mid")
        if isinstance(client, Client):
            received.extend(stream)
        else:
            async for reply in stream:
                received.append(reply)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(RuntimeError, match="the file ended"):
        run(script)
    assert [reply[0].n_tokens for reply in received] == [2]


async def test_stream_from_an_asynchronous_iterable(fake: FakeServer):
    async def requests() -> AsyncIterator[str]:
        yield "a"
        yield "b c"

    async with AsyncClient(fake.address) as client:
        replies = [reply async for reply in client.extract_features_stream(requests(), "resid-mid")]
    assert [reply[0].n_tokens for reply in replies] == [1, 2]


def test_leaving_a_with_block_cancels_the_generation(run: Run, fake: FakeServer):
    async def script(client: Any) -> None:
        if isinstance(client, Client):
            with client.generate("wait") as generation:
                next(generation)
        else:
            async with client.generate("wait") as async_generation:
                await anext(async_generation)
        # The client stays open: it is the block that cancels.
        assert await asyncio.to_thread(fake.cancelled.wait, 10)

    run(script)


async def test_a_cancelled_task_cancels_its_call(fake: FakeServer):
    async with AsyncClient(fake.address) as client:
        generation = client.generate("wait")
        await anext(generation)
        task = asyncio.create_task(generation.result())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.cancelled.wait, 10)


def test_health(run: Run, running: Running):
    assert run(lambda client: value(client.is_healthy())) is True
    running.set_serving(False)
    assert run(lambda client: value(client.is_healthy())) is False
    with pytest.raises(NotFound):
        run(lambda client: value(client.is_healthy("no.such.Service")))


def test_nothing_there_is_not_healthy(unused_address: str):
    with Client(unused_address) as client:
        assert client.is_healthy() is False


class _KnowsNothing(health_pb2_grpc.HealthServicer):
    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.NOT_FOUND, "Application metadata not set.")


def test_an_ingress_without_the_application_is_not_healthy():
    """Ray's ingress answers NOT_FOUND to every call until the application is up."""
    ingress = grpc.server(ThreadPoolExecutor(max_workers=1))
    health_pb2_grpc.add_HealthServicer_to_server(_KnowsNothing(), ingress)
    port = ingress.add_insecure_port("127.0.0.1:0")
    ingress.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            assert client.is_healthy() is False
    finally:
        ingress.stop(None)


@pytest.fixture
def _asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a server asks once and gives up, as there is no time for a second question."""
    monkeypatch.setattr("service.client.channel.READINESS_POLL_S", math.inf)


@pytest.mark.usefixtures("_asked_once")
def test_a_server_that_does_not_serve(run: Run, running: Running):
    running.set_serving(False)
    with pytest.raises(DeadlineExceeded, match="it says that it is not serving"):
        run(lambda client: value(client.wait_until_ready(20)))


def test_wait_until_ready(run: Run, running: Running):
    run(lambda client: value(client.wait_until_ready(20)))
    running.set_serving(False)

    async def script(client: Any) -> None:
        if isinstance(client, Client):
            waiting = asyncio.create_task(asyncio.to_thread(client.wait_until_ready, 60))
        else:
            waiting = asyncio.create_task(client.wait_until_ready(60))
        running.set_serving(True)
        await waiting

    run(script)


@pytest.mark.usefixtures("_asked_once")
def test_waiting_for_a_server_that_is_not_there(unused_address: str):
    with Client(unused_address) as client, pytest.raises(DeadlineExceeded, match="last answer was UNAVAILABLE"):
        client.wait_until_ready(20)


def test_the_client_does_not_import_torch_or_ray():
    script = "import service.client, sys; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
