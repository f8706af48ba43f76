"""Ports of the service's own, and that somebody else's listener is left alone."""

from __future__ import annotations

import socket

import pytest

from service import local_ray


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
