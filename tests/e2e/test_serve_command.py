"""`saeserve serve` from its first line to its last process. Runs after the other files: it stops their service."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import pytest

import sae_runtime
from service.client import Client
from service.ports import free_ports
from tests.e2e.running_service import RunningService, alive, run_serve, start_service
from tests.e2e.tiny_model import TinyModel

BUILTIN = Path(sae_runtime.__file__).parent / "builtin" / "backbone"


def test_port_in_use_is_one_line(service: RunningService) -> None:
    port = service.grpc_address.rpartition(":")[2]
    ended = run_serve(f"--grpc-port={port}")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == f"saeserve: port {port} is in use; choose another with --grpc-port\n"


def test_wrong_dictionary_is_one_line_and_leaves_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    grpc_port, http_port = free_ports(2)
    ended = run_serve(
        f"--backbone={tiny_model.backbone}",
        f"--dictionaries={tmp_path / 'missing'}",
        f"--grpc-port={grpc_port}",
        f"--http-port={http_port}",
    )
    assert ended.returncode == 1
    assert re.fullmatch(r"saeserve: .*missing.*\n", ended.stderr)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", grpc_port))


def test_the_ready_line_says_the_device_and_the_addresses(service: RunningService) -> None:
    assert service.ready_line.startswith("saeserve is ready on cpu")
    assert f"gRPC {service.grpc_address}, HTTP http://{service.http_address}. " in service.ready_line


def test_ctrl_c_twice_leaves_no_process(service: RunningService) -> None:
    processes = service.processes()
    assert len(processes) > 5
    service.signal(signal.SIGINT)
    assert service.stop() == 0
    assert alive(processes) == []
    assert service.process.stderr is not None
    assert service.process.stderr.read() == ""


@pytest.mark.skipif(not BUILTIN.is_dir(), reason="the builtin model is not there")
def test_builtin_model_serves_and_sigterm_stops_it() -> None:
    running = start_service()
    try:
        with Client(running.grpc_address) as client:
            text = "".join(event.text for event in client.generate("Once upon a time", max_new_tokens=5))
            assert text
        processes = running.processes()
    finally:
        code = running.stop(signal.SIGTERM)
    assert code == 0
    assert alive(processes) == []
