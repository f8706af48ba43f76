import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

import grpc
import pytest

from service.cli.main import main
from service.replica import ReplicaSettings, ServiceRuntime
from service.rpc.register import add_to_grpc_server, build_handlers
from tests.builders import small_backbone
from tests.service.client.fake_server import FakeServer, Running
from tests.service.conftest import LIMITS, served_dictionaries

Run = Callable[..., asyncio.Future["Output"]]
PNG = b"\x89PNG\r\n\x1a\n"


class Output(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture
def fake(running: Running) -> FakeServer:
    return running.fake


@pytest.fixture
def saeserve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    """Runs a command line in this process, with output that is no terminal and 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Output:
        try:
            code = main(arguments)
        except SystemExit as exit_by_argparse:
            code = int(exit_by_argparse.code or 0)
        return Output(code, *capsys.readouterr())

    return run


@pytest.fixture
def call(saeserve: Callable[..., Output], fake: FakeServer) -> Callable[..., Output]:
    """Runs a command line against the fake server."""
    return lambda *arguments: saeserve(*arguments, "--address", fake.address)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """The address of the real handlers and engine, on small random models and without Ray."""
    runtime = ServiceRuntime(small_backbone(), served_dictionaries(), ReplicaSettings(limits=LIMITS))
    await runtime.open()
    server = grpc.aio.server()
    add_to_grpc_server(build_handlers(runtime), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)
    await runtime.stop()


@pytest.fixture
def run(saeserve: Callable[..., Output], address: str) -> Run:
    """Runs a command line against the real handlers; in a thread, since the server lives on this event loop."""
    return lambda *arguments: asyncio.to_thread(saeserve, *arguments, "--address", address)
