import json

import pytest

from sae_runtime.catalogue.chat_endpoint import MAX_ANSWER_BYTES, ChatEndpoint, EndpointError
from tests.sae_runtime.catalogue.chat_server import Reply, chat_server, completion


def test_a_question_and_its_answer() -> None:
    with chat_server(lambda body: completion("the answer")) as server:
        endpoint = ChatEndpoint(server.url + "/", "tiny", key="secret")
        assert endpoint.answer("be brief", "what?") == "the answer"
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies[0]["model"] == "tiny"
    assert [m["content"] for m in server.bodies[0]["messages"]] == ["be brief", "what?"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(endpoint)


def test_a_busy_endpoint_is_asked_again_after_longer_and_longer_waits() -> None:
    replies: list[Reply] = [(503, {}, b""), (429, {"Retry-After": "9"}, b""), (500, {}, b""), completion("at last")]
    waits: list[float] = []
    with chat_server(lambda body: replies.pop(0)) as server:
        endpoint = ChatEndpoint(server.url, "tiny", sleep=waits.append)
        assert endpoint.answer("", "") == "at last"
    assert waits == [1, 9, 18]
    assert endpoint.n_requests == 4


def test_it_is_given_up_after_the_last_attempt() -> None:
    waits: list[float] = []
    with chat_server(lambda body: (503, {}, b"")) as server:
        endpoint = ChatEndpoint(server.url, "tiny", attempts=3, sleep=waits.append)
        with pytest.raises(EndpointError, match="no answer after 3 attempts: HTTP 503"):
            endpoint.answer("", "")
    assert len(server.bodies) == 3
    assert waits == [1, 2]


def test_no_wait_is_longer_than_a_minute() -> None:
    waits: list[float] = []
    with chat_server(lambda body: (429, {"Retry-After": "86400"}, b"")) as server, pytest.raises(EndpointError):
        ChatEndpoint(server.url, "tiny", attempts=2, sleep=waits.append).answer("", "")
    assert waits == [60]


def test_a_refusal_is_not_repeated() -> None:
    with chat_server(lambda body: (401, {}, b"")) as server, pytest.raises(EndpointError, match="HTTP 401"):
        ChatEndpoint(server.url, "tiny").answer("", "")
    assert len(server.bodies) == 1


def test_a_redirect_is_not_followed_and_takes_no_key_along() -> None:
    with (
        chat_server(lambda body: completion("stolen")) as elsewhere,
        chat_server(lambda body: (302, {"Location": elsewhere.url}, b"")) as server,
        pytest.raises(EndpointError, match="HTTP 302"),
    ):
        ChatEndpoint(server.url, "tiny", key="secret").answer("", "")
    assert not elsewhere.bodies


def test_nobody_listens() -> None:
    with chat_server(lambda body: completion("")) as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"no answer after 1 attempts: .*refused"):
        ChatEndpoint(url, "tiny", attempts=1).answer("", "")


def test_the_budget_counts_every_request() -> None:
    with chat_server(lambda body: (500, {}, b"")) as server:
        endpoint = ChatEndpoint(server.url, "tiny", max_requests=2, sleep=lambda seconds: None)
        with pytest.raises(EndpointError, match="budget of 2 requests is spent"):
            endpoint.answer("", "")
    assert len(server.bodies) == 2
    assert endpoint.requests_left == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        b"\xff\xfe",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {}}]}',
        b"[" * 100_000,
        json.dumps({"choices": [{"message": {"content": ["a"]}}]}).encode(),
    ],
)
def test_malformed_replies(data: bytes) -> None:
    error = pytest.raises(EndpointError, match=r"no chat completion|expected text")
    with chat_server(lambda body: (200, {}, data)) as server, error:
        ChatEndpoint(server.url, "tiny").answer("", "")


def test_a_reply_without_end_is_cut() -> None:
    error = pytest.raises(EndpointError, match="over 1,048,576 bytes")
    with chat_server(lambda body: completion("a" * MAX_ANSWER_BYTES)) as server, error:
        ChatEndpoint(server.url, "tiny").answer("", "")


def test_a_reply_that_is_cut_off_is_asked_for_again() -> None:
    replies: list[Reply] = [(200, {"Transfer-Encoding": "chunked"}, b"ffff\r\n{"), completion("whole")]
    with chat_server(lambda body: replies.pop(0)) as server:
        assert ChatEndpoint(server.url, "tiny", sleep=lambda seconds: None).answer("", "") == "whole"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:80", "ftp://a/b", "http://", ""])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="is not an http or https URL"):
        ChatEndpoint(url, "tiny")
