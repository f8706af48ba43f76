"""How both clients reach the server: addresses, channel options, timeouts."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from typing import Any

import grpc

from service.client.errors import SaeserveError, error_of_code

DEFAULT_ADDRESS = "127.0.0.1:9000"
TIMEOUT_S = 30.0
GENERATE_TIMEOUT_S = 300.0
READINESS_POLL_S = 0.2

Metadata = Sequence[tuple[str, str | bytes]]
ChannelOptions = Sequence[tuple[str, Any]]

_MAX_MESSAGE_BYTES = 256 * 2**20  # 4096 rows of 12288 float32 activations are 192 MiB


def channel_options(address: str, more: ChannelOptions) -> list[tuple[str, Any]]:
    """Options of a grpc channel; `more` override the defaults."""
    options: dict[str, Any] = {
        "grpc.max_send_message_length": _MAX_MESSAGE_BYTES,
        "grpc.max_receive_message_length": _MAX_MESSAGE_BYTES,
        # Finds dead connections during long calls. By default, gRPC servers close connections that ping more often than
        # every 5 minutes while no data flows.
        "grpc.keepalive_time_ms": 330_000,
        "grpc.keepalive_timeout_ms": 20_000,
        # A server that comes back is found again quickly (grpc: first after 1 s, later up to 120 s).
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 5_000,
        # Several clients in a process do not share a connection.
        "grpc.use_local_subchannel_pool": 1,
    }
    if _is_loopback(address):
        options["grpc.enable_http_proxy"] = 0
    return list({**options, **dict(more)}.items())


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def timeout_of(timeout_s: float | None, default: float) -> float:
    """The timeout of a call in seconds; math.inf for none."""
    timeout = default if timeout_s is None else timeout_s
    if not timeout > 0:
        raise ValueError(f"timeout_s is {timeout}, expected more than 0 (math.inf: no deadline)")
    return timeout


def grpc_timeout(timeout_s: float) -> float | None:
    return None if math.isinf(timeout_s) else timeout_s


def not_ready(address: str, timeout_s: float, last_error: SaeserveError | None) -> SaeserveError:
    """The error of wait_until_ready."""
    state = f"the last answer was {last_error}" if last_error else "it says that it is not serving"
    return error_of_code(grpc.StatusCode.DEADLINE_EXCEEDED, f"{address} was not ready after {timeout_s:g} s; {state}")


def ended_early() -> SaeserveError:
    """The error of a generation whose stream closed without saying how it ended."""
    return error_of_code(grpc.StatusCode.INTERNAL, "the stream ended before the generation did")
