"""What the HAProxy of `saeserve serve` says on its admin socket."""

from __future__ import annotations

import contextlib
import socket
import time
from functools import partial
from pathlib import Path

FOLDER = "h"
"""Folder of HAProxy's files in the folder of a run. Short names: Ray adds 56 characters, and HAProxy accepts 97."""
ADMIN_SOCKET = "a.sock"

_POLL_S = 0.02


def forwards_to_replicas(directory: Path) -> bool:
    """Whether gRPC calls go to replicas directly, and no longer to Ray Serve's own proxy, as they do at first.

    Args:
        directory: the folder of the run.
    """
    # "8 grpc-saeserve 1 SERVE_REPLICA_saeserve-FeatureServer-564azgr4 127.0.0.1 2 ...": the sixth is 2 for a server
    # that is up.
    rows = [line.split() for line in _ask(directory, "show servers state")]
    return any(
        len(row) > 5 and row[1].startswith("grpc") and row[3].startswith("SERVE_REPLICA") and row[5] == "2"
        for row in rows
    )


def await_replies_sent(directory: Path, timeout_s: float) -> None:
    """Waits at most `timeout_s` seconds until HAProxy has passed on the replies that it is passing on now."""
    deadline = time.monotonic() + timeout_s
    calls = _calls(directory)
    while calls and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        calls &= _calls(directory)


def _calls(directory: Path) -> set[str]:
    """Names of the calls in HAProxy."""
    # "0x7f21c8017e30: proto=tcpv4 src=127.0.0.1:47332 fe=..."; our own question has proto=unix_stream.
    return {line.partition(":")[0] for line in _ask(directory, "show sess") if " proto=tcp" in line}


def _ask(directory: Path, question: str) -> list[str]:
    """The lines of HAProxy's answer; none without HAProxy."""
    lines: list[str] = []
    for path in directory.glob(f"{FOLDER}/*/{ADMIN_SOCKET}"):
        with socket.socket(socket.AF_UNIX) as admin, contextlib.suppress(OSError):
            admin.settimeout(1)
            admin.connect(str(path))
            admin.sendall(f"{question}\n".encode())
            lines += b"".join(iter(partial(admin.recv, 2**16), b"")).decode().splitlines()
    return lines
