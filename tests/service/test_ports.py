"""Every run of the service has ports of its own, and nobody's listener is disturbed."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys

import pytest

from service import ports as ports_module
from service.ports import PortError, free_ports, is_free, reserved_ports

EPHEMERAL = 32_768  # where Linux begins to give ports away, unless it is told otherwise


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> int:
    """Makes a block that is free now the only one; its first port."""
    with reserved_ports() as ports:
        first = ports.first
    monkeypatch.setattr(ports_module, "_BLOCKS", range(first, first + 1, 500))
    return first


def test_blocks_of_two_runs_share_no_port() -> None:
    with reserved_ports() as one, reserved_ports() as other:
        assert not set(one) & set(other)
        assert max(one) < EPHEMERAL


def test_uses_of_a_block_share_no_port() -> None:
    with reserved_ports() as ports:
        single = [
            ports.first,
            ports.haproxy_metrics,
            ports.haproxy_statistics,
            ports.fallback_http,
            ports.fallback_grpc,
        ]
        uses = [*single, *ports.replicas_http, *ports.replicas_grpc]
    assert len(set(uses)) == len(uses)
    assert set(uses) <= set(ports)
    assert len(ports.replicas_http) == len(ports.replicas_grpc) == ports_module.MOST_REPLICAS


def test_a_block_is_free_again_when_its_run_has_ended(one_block: int) -> None:
    with reserved_ports() as ports, pytest.raises(PortError, match="no block of 500 free ports"), reserved_ports():
        pass
    with reserved_ports() as again:
        assert again.first == ports.first == one_block


def test_a_killed_run_leaves_no_reservation(one_block: int) -> None:
    code = (
        "from service import ports\n"
        f"ports._BLOCKS = range({one_block}, {one_block + 1}, 500)\n"
        "with ports.reserved_ports():\n"
        "    print('reserved', flush=True)\n"
        "    input()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "reserved\n"
        with pytest.raises(PortError), reserved_ports():
            pass
        other.kill()
        other.wait()
    with reserved_ports() as ports:
        assert ports.first == one_block


@pytest.mark.parametrize("shared", [False, True], ids=["a listener", "a listener that shares its port, as gRPC's do"])
def test_a_block_in_which_somebody_listens_is_passed_over(one_block: int, shared: bool) -> None:
    with socket.socket() as listener:
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", one_block + 499))
        listener.listen()
        with pytest.raises(PortError), reserved_ports():
            pass


def test_a_block_with_a_port_of_the_settings_is_passed_over(one_block: int) -> None:
    with pytest.raises(PortError), reserved_ports(used=[9000, one_block + 77]):
        pass
    with reserved_ports(used=[9000, one_block + 500]) as ports:
        assert ports.first == one_block


def test_free_ports_differ_and_are_in_no_block() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert max(ports) < EPHEMERAL
    assert min(ports) >= ports_module._BLOCKS.stop


def test_a_port_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_ports(2)
    monkeypatch.setattr(ports_module, "_OTHERS", range(taken, taken + 1))
    with contextlib.closing(socket.create_server(("127.0.0.1", taken))):
        assert not is_free(taken)
        assert is_free(free)
        with pytest.raises(PortError, match=f"fewer than 1 ports from {taken} to {taken} are free"):
            free_ports(1)
