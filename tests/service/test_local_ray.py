"""What Ray and HAProxy are told when the service starts them."""

from __future__ import annotations

import _thread
import importlib.util
import sys
import threading
from pathlib import Path

import pytest

from service.local_ray import StartError, environment, local_ray, start_within
from service.ports import MOST_REPLICAS, Ports
from service.settings import ServeSettings

PORTS = Ports(10_000)


def path_in_ray(name: str) -> Path:
    ray = importlib.util.find_spec("ray")  # not imported: other tests need a process without it
    assert ray is not None
    assert ray.origin is not None
    return Path(ray.origin).parent / name


def source_of_ray(name: str) -> str:
    return path_in_ray(name).read_text()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_leave_the_cores_soon_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], expected: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment(ServeSettings(), tmp_path, PORTS).get("GOMP_SPINCOUNT") == expected


def test_rays_waits_at_start_follow_the_setting(tmp_path: Path) -> None:
    variables = environment(ServeSettings(start_timeout_s=123.4), tmp_path, PORTS)
    waits = {name: value for name, value in variables.items() if "wait_time" in name or "TIMEOUT" in name}
    assert len(waits) == 4
    assert set(waits.values()) == {"124"}


def test_every_port_of_a_run_is_of_its_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # HAProxy is installed
    variables = environment(ServeSettings(), tmp_path, PORTS)
    ports = {name: int(value) for name, value in variables.items() if name.endswith("_PORT")}
    assert len(ports) == 8
    assert all(10_000 < port <= 10_500 for port in ports.values()), ports
    assert environment(ServeSettings(haproxy_metrics_port=9101), tmp_path, PORTS)[
        "RAY_SERVE_HAPROXY_METRICS_PORT"
    ] == str(9101)


def test_ray_reads_the_ranges_of_replicas_ports() -> None:
    """The names are Ray's: a release that calls them otherwise would let services answer each other's calls."""
    text = source_of_ray("serve/_private/constants.py")
    for bound in ("MIN", "MAX"):
        for protocol in ("HTTP", "GRPC"):
            assert f'os.environ.get("RAY_SERVE_DIRECT_INGRESS_{bound}_{protocol}_PORT"' in text


def test_ray_reads_the_waits_and_haproxys_buffer() -> None:
    constants = source_of_ray("serve/_private/constants.py")
    for name in (
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE",
    ):
        assert f'"{name}"' in constants
    assert '"RAY_gcs_server_port_wait_time_s"' in source_of_ray("_private/node.py")
    assert b"RAY_raylet_start_wait_time_s" in path_in_ray("_raylet.so").read_bytes()


def test_more_replicas_than_ports_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    settings = ServeSettings(replicas=MOST_REPLICAS + 1)
    with pytest.raises(StartError, match="has ports for 245"), local_ray(settings, verbose=False):
        pass


class TestStartWithin:
    def test_what_the_start_raises_is_raised(self) -> None:
        def broken() -> None:
            raise ValueError("no such folder")

        with pytest.raises(ValueError, match="no such folder"):
            start_within(60, broken)

    def test_a_start_that_hangs_is_an_error_once_the_time_is_over(self) -> None:
        end = threading.Event()
        with pytest.raises(StartError, match="--start-timeout-s"):
            start_within(0, end.wait)
        end.set()

    def test_a_signal_reaches_the_caller_while_the_start_hangs(self) -> None:
        end = threading.Event()

        def interrupted() -> None:
            _thread.interrupt_main()
            end.wait()

        with pytest.raises(KeyboardInterrupt):
            start_within(60, interrupted)
        end.set()
