"""A block of ports of this machine for one run of the service.

Ray Serve gives every replica the next port of a range, and gRPC lets processes share a port: two services with the same
range would answer each other's calls. So every run reserves its own block:

    first        bound while the service runs, which reserves the block
    1 to 4       HAProxy's metrics and statistics, Serve's fallback proxy (HTTP, then gRPC)
    10 to 254    replicas' HTTP
    255 to 499   replicas' gRPC

The system frees the first port when its process ends, even if it is killed. Processes that a killed service left behind
may still listen on other ports, so a block is only reserved if all its ports are free.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass

_BLOCK = 500
_REPLICAS_HTTP, _REPLICAS_GRPC = 10, 255
# Linux assigns ports from 32768 on to outgoing connections and to port 0: ours lie below.
_BLOCKS = range(10_000, 30_000, _BLOCK)
_OTHERS = range(30_000, 32_500)

MOST_REPLICAS = _REPLICAS_GRPC - _REPLICAS_HTTP
"""Replicas of one service on one machine that a block has ports for."""


class PortError(Exception):
    """Not enough ports are free; the message is for the person who starts the service."""


@dataclass(frozen=True)
class Ports:
    """A block of ports, by what uses them."""

    first: int

    @property
    def haproxy_metrics(self) -> int:
        return self.first + 1

    @property
    def haproxy_statistics(self) -> int:
        return self.first + 2

    @property
    def fallback_http(self) -> int:
        return self.first + 3

    @property
    def fallback_grpc(self) -> int:
        return self.first + 4

    @property
    def replicas_http(self) -> range:
        return range(self.first + _REPLICAS_HTTP, self.first + _REPLICAS_GRPC)

    @property
    def replicas_grpc(self) -> range:
        return range(self.first + _REPLICAS_GRPC, self.first + _BLOCK)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.first + _BLOCK))


@contextlib.contextmanager
def reserved_ports(used: Collection[int] = ()) -> Iterator[Ports]:
    """Reserves a block of ports for the time of a `with` block.

    Args:
        used: the service's other ports, which the block must not contain.

    Raises:
        PortError: no block is free.
    """
    for first in random.SystemRandom().sample(_BLOCKS, len(_BLOCKS)):
        ports = Ports(first)
        if any(port in used for port in ports):
            continue
        try:
            owner = bind("", first, reuse=False)
        except OSError:
            continue
        with owner:
            if all(map(is_free, list(ports)[1:])):
                yield ports
                return
    raise PortError(
        f"no block of {_BLOCK} free ports from {_BLOCKS.start} to {_BLOCKS.stop - 1} is left for the replicas"
    )


def free_ports(count: int) -> list[int]:
    """Ports outside all blocks on which no process listens now.

    Raises:
        PortError: too few of them are free.
    """
    free: list[int] = []
    for port in random.SystemRandom().sample(_OTHERS, len(_OTHERS)):
        if is_free(port):
            free.append(port)
        if len(free) == count:
            return free
    raise PortError(f"fewer than {count} ports from {_OTHERS.start} to {_OTHERS.stop - 1} are free")


def is_free(port: int) -> bool:
    """Whether no process listens on a port, on any address."""
    try:
        bind("", port).close()
    except OSError:
        return False
    return True


def bind(host: str, port: int, *, reuse: bool = True) -> socket.socket:
    """A bound socket that does not listen.

    Args:
        reuse: also bind a port whose earlier connections have just ended, or to which another such socket is bound.

    Raises:
        OSError: the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if reuse:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound
