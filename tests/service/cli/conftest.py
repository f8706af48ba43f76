from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from service.cli.main import main
from tests.service.client.fake_server import FakeServer, Running


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
    """Runs a command line in this process, on a terminal that is none, 100 columns wide."""
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
    """The same with the fake server's address."""
    return lambda *arguments: saeserve(*arguments, "--address", fake.address)
