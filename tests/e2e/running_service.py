"""`saeserve serve` as a process of its own, as a user starts it."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.ports import free_ports

READY_TIMEOUT_S = 240
T = TypeVar("T")


def poll(question: Callable[[], T], *, timeout_s: float = 60) -> T:
    """Asks until the answer is true; the last answer if it never is."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = question()
        if answer or time.monotonic() > deadline:
            return answer
        time.sleep(0.1)


@dataclass
class RunningService:
    process: subprocess.Popen[str]
    grpc_address: str
    http_address: str
    ready_line: str
    start_s: float

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.http_address}{path}", timeout=20) as reply:
            text: str = reply.read().decode()
            return text

    def metric(self, sample: str) -> float:
        """The value of a sample of /metrics, written as there; 0 if it is not there."""
        lines = (line.rpartition(" ") for line in self.get("/metrics").splitlines())
        return next((float(value) for name, _, value in lines if name == sample), 0.0)

    def is_serving(self) -> bool:
        with self.channel() as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def processes(self) -> list[Any]:
        """Every process that the service has started (psutil.Process)."""
        importlib.import_module("ray")  # brings its own psutil
        import psutil

        return list(psutil.Process(self.process.pid).children(recursive=True))

    def replica_pids(self) -> list[int]:
        return [process.pid for process in self.processes() if "ServeReplica" in " ".join(process.cmdline())]

    def stop(self, signal_number: signal.Signals = signal.SIGINT) -> int:
        """Signals the process and waits for its end; returns the exit code."""
        if self.process.poll() is None:
            self.signal(signal_number)
        return self.process.wait(60)

    def signal(self, signal_number: signal.Signals) -> None:
        """Signals the process; with SIGINT its whole group, as a terminal does."""
        (os.killpg if signal_number == signal.SIGINT else os.kill)(self.process.pid, signal_number)


def alive(processes: list[Any]) -> list[Any]:
    """Those of a service's processes that are still there after a while."""
    import psutil

    _, left = psutil.wait_procs(processes, timeout=60)
    return list(left)


def run_serve(*flags: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`saeserve serve` that is expected to end by itself."""
    return subprocess.run(_command(*flags), capture_output=True, text=True, timeout=timeout_s, env=_environment())


def start_service(*flags: str) -> RunningService:
    """Starts the service on free ports and waits for the line that says it is ready."""
    grpc_port, http_port = free_ports(2)
    began = time.monotonic()
    process = subprocess.Popen(
        _command(f"--grpc-port={grpc_port}", f"--http-port={http_port}", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=_environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    watchdog = threading.Timer(READY_TIMEOUT_S, process.terminate)
    watchdog.start()
    line = process.stdout.readline()
    watchdog.cancel()
    if not line:
        process.wait(60)
        raise AssertionError(f"the service did not start: {process.stderr.read()}")
    return RunningService(process, f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}", line, time.monotonic() - began)


def _command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", "serve", *flags]


def _environment() -> dict[str, str]:
    """Without settings of whoever runs the tests."""
    root = Path(__file__).parents[2]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAESERVE_", "RAY_"))}
    return kept | {"PYTHONPATH": str(root)}
