"""Ports of the service's own, and that somebody else's listener is left alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from service import local_ray

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_free_ports_are_different_and_not_ones_that_the_system_gives_away() -> None:
    ports = local_ray.free_ports(50)

    assert len(set(ports)) == 50
    first_given_away = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32_768
    if first_given_away == 32_768:  # Linux's own default; a machine may be set otherwise
        assert max(ports) < first_given_away


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
