"""The blocking client, which is generated from the asyncio one."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from service.client import (
    AsyncClient,
    AsyncGeneration,
    Cancelled,
    Client,
    Generation,
)
from tests.service.client.fake_server import FakeServer


@pytest.mark.parametrize(
    ("blocking", "asynchronous"), [(Client, AsyncClient), (Generation, AsyncGeneration)], ids=["client", "generation"]
)
def test_both_clients_have_the_same_calls(blocking: type, asynchronous: type):
    def calls(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        public = inspect.getmembers(kind, lambda member: inspect.isfunction(member) and member.__name__[0] != "_")
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(call).parameters.values()]
            for name, call in public
        }

    assert calls(blocking) == calls(asynchronous)


def test_iterating_on_after_cancel(fake: FakeServer):
    with Client(fake.address) as client:
        generation = client.generate("wait")
        next(generation)
        generation.cancel()
        with pytest.raises(Cancelled):
            generation.result()
