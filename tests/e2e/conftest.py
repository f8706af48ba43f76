"""One real service for all end-to-end tests: `saeserve serve` on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.running_service import RunningService, start_service
from tests.e2e.tiny_model import TinyModel, write_tiny_model

MAX_GENERATIONS = 2
MAX_QUEUED_GENERATIONS = 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("ray")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def service(tiny_model: TinyModel) -> Iterator[RunningService]:
    running = start_service(
        f"--backbone={tiny_model.backbone}",
        "--dictionaries=" + ",".join(map(str, tiny_model.dictionaries)),
        f"--engine.max-concurrent-generations={MAX_GENERATIONS}",
        f"--engine.max-queued-generations={MAX_QUEUED_GENERATIONS}",
        "--limits.max-new-tokens=1000",
        "--drain-s=1",
    )
    yield running
    running.stop()


@pytest.fixture
def channel(service: RunningService) -> Iterator[grpc.Channel]:
    with service.channel() as channel:
        yield channel
