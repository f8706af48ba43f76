from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from service.client import AsyncClient, Client
from tests.service.client.both_clients import QUICK, Run, Script
from tests.service.client.fake_server import FakeServer, Running


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


@pytest.fixture
def fake(running: Running) -> FakeServer:
    return running.fake


@pytest.fixture(params=["sync", "asyncio"])
def run(request: pytest.FixtureRequest, fake: FakeServer) -> Run:
    """Runs a script, written once for both, with a client."""

    def run(script: Script, **options: Any) -> Any:
        options = {"retry": QUICK, "timeout_s": 20.0, **options}

        async def main() -> Any:
            if request.param == "sync":
                with Client(fake.address, **options) as client:
                    return await script(client)
            async with AsyncClient(fake.address, **options) as async_client:
                return await script(async_client)

        return asyncio.run(main())

    return run


@pytest.fixture
def unused_address() -> str:
    running = Running()
    running.stop()
    return running.fake.address
