"""What Ray and HAProxy are told when the service starts them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from service.local_ray import StartError, environment, local_ray
from service.ports import MOST_REPLICAS, Ports
from service.settings import ServeSettings

PORTS = Ports(10_000)


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
    ray = importlib.util.find_spec("ray")  # not imported: other tests need a process without it
    assert ray is not None
    assert ray.origin is not None
    text = (Path(ray.origin).parent / "serve/_private/constants.py").read_text()
    for bound in ("MIN", "MAX"):
        for protocol in ("HTTP", "GRPC"):
            assert f'os.environ.get("RAY_SERVE_DIRECT_INGRESS_{bound}_{protocol}_PORT"' in text


def test_more_replicas_than_ports_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    settings = ServeSettings(replicas=MOST_REPLICAS + 1)
    with pytest.raises(StartError, match="has ports for 245"), local_ray(settings, verbose=False):
        pass
