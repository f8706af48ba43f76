"""Ports of the service's own, and that somebody else's listener is left alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from service import local_ray
from service.settings import ServeSettings


def test_free_ports_are_different_and_not_ones_that_the_system_gives_away() -> None:
    ports = local_ray.free_ports(50)

    assert len(set(ports)) == 50
    assert max(ports) < 32_768  # where Linux begins, unless it is told otherwise


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = local_ray.free_ports(2)
    monkeypatch.setattr(local_ray, "_OUR_PORTS", range(taken, taken + 1))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        with pytest.raises(local_ray.StartError, match=f"fewer than 1 ports from {taken} to {taken}"):
            local_ray.free_ports(1)

    monkeypatch.setattr(local_ray, "_OUR_PORTS", range(free, free + 1))
    assert local_ray.free_ports(1) == [free]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_leave_the_cores_soon_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], expected: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert local_ray.environment(ServeSettings(), tmp_path).get("GOMP_SPINCOUNT") == expected
