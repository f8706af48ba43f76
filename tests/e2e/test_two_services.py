"""Two services on one machine, started at the same moment: each one answers its own clients, and only them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.pb.saeserve.v1 import server_service_pb2
from service.pb.saeserve.v1.server_service_pb2_grpc import ServerServiceStub
from tests.e2e.running_service import RunningService, start_service
from tests.e2e.tiny_model import TinyModel

CONNECTIONS = 40


def dictionaries_of(service: RunningService) -> list[str]:
    """What a connection of its own is told."""
    with service.channel() as channel:
        info = ServerServiceStub(channel).GetServerInfo(server_service_pb2.GetServerInfoRequest(), timeout=20)
    return list(info.dictionaries)


def start(model: TinyModel, dictionary: Path) -> RunningService:
    return start_service(f"--backbone={model.backbone}", f"--dictionaries={dictionary}", "--replicas=2", "--drain-s=1")


def test_each_service_answers_its_clients(tiny_model: TinyModel) -> None:
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(start, tiny_model, dictionary) for dictionary in tiny_model.dictionaries]
        services = [started.result() for started in starts]
    try:
        for _ in range(CONNECTIONS):
            for service, dictionary in zip(services, tiny_model.dictionaries, strict=True):
                assert dictionaries_of(service) == [dictionary.name]
    finally:
        for service in services:
            service.stop()
