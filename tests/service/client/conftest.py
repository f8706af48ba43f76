from collections.abc import Iterator

import pytest

from tests.service.client.fake_server import FakeServer, Running


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture
def fake(running: Running) -> FakeServer:
    return running.fake
