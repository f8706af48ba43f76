"""What is read from HAProxy's admin socket: where calls go, and which replies are under way."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.haproxy import await_replies_sent, forwards_to_replicas

OUR_QUESTION = "0x7f: proto=unix_stream src=unix:1 fe=GLOBAL be=<NONE>"
FALLBACK = "8 grpc-saeserve 2 SERVE_PROXY_ACTOR-fallback-5749 127.0.0.1 2 0"


class HAProxy:
    """Answers its admin socket with one text after the other, and for ever with the last."""

    def __init__(self, directory: Path, *answers: str) -> None:
        self.answers = answers
        self.asked = 0
        path = directory / "h" / "of-this-node" / "a.sock"
        path.parent.mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                assert connection.recv(100).startswith(b"show ")
                answer = self.answers[min(self.asked, len(self.answers) - 1)]
                self.asked += 1
                connection.sendall(answer.encode())


def calls(*names: str) -> str:
    return "\n".join([*(f"{name}: proto=tcpv4 src=127.0.0.1:1 fe=grpc_frontend" for name in names), OUR_QUESTION, ""])


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short: socket addresses are limited
        yield Path(folder)


def test_replies_under_way_are_waited_for_and_later_calls_are_not(directory: Path) -> None:
    haproxy = HAProxy(directory, calls("0xa", "0xb"), calls("0xb", "0xc"), calls("0xc", "0xd"))
    await_replies_sent(directory, 600)
    assert haproxy.asked == 3


def test_a_reply_that_is_never_read_is_waited_for_until_the_time_is_over(directory: Path) -> None:
    haproxy = HAProxy(directory, calls("0xa"))
    await_replies_sent(directory, 0.1)
    assert haproxy.asked > 1


def test_without_calls_and_without_haproxy_nothing_is_waited_for(directory: Path) -> None:
    await_replies_sent(directory, 600)
    haproxy = HAProxy(directory, calls())
    await_replies_sent(directory, 600)
    assert haproxy.asked == 1


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ("5 http-saeserve 1 SERVE_REPLICA_saeserve-FeatureServer-a 127.0.0.1 2 0", False),
        ("8 grpc-saeserve 1 SERVE_REPLICA_saeserve-FeatureServer-a 127.0.0.1 0 0", False),
        ("8 grpc-saeserve 1 SERVE_REPLICA_saeserve-FeatureServer-a 127.0.0.1 2 0", True),
    ],
    ids=["only HTTP", "not up", "up"],
)
def test_calls_go_to_replicas_once_one_is_up(directory: Path, servers: str, expected: bool) -> None:
    HAProxy(directory, f"1\n# be_id be_name srv_id srv_name srv_addr srv_op_state\n{servers}\n{FALLBACK}\n\n")
    assert forwards_to_replicas(directory) == expected


def test_without_haproxy_calls_go_to_no_replica_directly(directory: Path) -> None:
    assert not forwards_to_replicas(directory)
