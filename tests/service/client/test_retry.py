"""When calls are tried again: RetryPolicy and Attempts with a clock that stands still, and both clients."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from service.client import (
    NO_RETRY,
    Client,
    DeadlineExceeded,
    ResourceExhausted,
    RetryPolicy,
    SaeserveError,
    Unavailable,
)
from service.client.errors import error_of_code
from service.client.retry import Attempts
from tests.service.client.both_clients import Run, items, value
from tests.service.client.fake_server import Failure, FakeServer, retry_info


def attempts(policy: RetryPolicy, timeout_s: float = math.inf, *, draw: float = 0.0) -> Attempts:
    """`draw` in [-1, 1]: where in the jitter's range each wait falls."""

    def uniform(low: float, high: float) -> float:
        return (low + high) / 2 + draw * (high - low) / 2

    return Attempts(policy, timeout_s, clock=lambda: 1000.0, uniform=uniform)


def error(code: grpc.StatusCode, retry_after_s: float | None = None) -> SaeserveError:
    return error_of_code(code, "failed", retry_after_s=retry_after_s)


UNAVAILABLE = error(grpc.StatusCode.UNAVAILABLE)


def test_waits_grow_up_to_the_maximum_and_end_with_the_attempts():
    tries = attempts(RetryPolicy(attempts=6, initial_backoff_s=0.1, multiplier=2, max_backoff_s=0.5))
    delays = [tries.delay_after(UNAVAILABLE) for _ in range(6)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5, None])


@pytest.mark.parametrize(("draw", "delay"), [(-1, 0.07), (1, 0.13)])
def test_jitter_spreads_the_waits(draw: float, delay: float):
    assert attempts(RetryPolicy(jitter=0.3), draw=draw).delay_after(UNAVAILABLE) == pytest.approx(delay)


def test_waits_at_least_as_long_as_an_unavailable_server_asks():
    tries = attempts(RetryPolicy(attempts=3, initial_backoff_s=0.1, multiplier=40, max_backoff_s=9))
    asked = error(grpc.StatusCode.UNAVAILABLE, retry_after_s=1.0)
    assert [tries.delay_after(asked), tries.delay_after(asked)] == pytest.approx([1.0, 4.0])


@pytest.mark.parametrize(
    "code",
    [code for code in grpc.StatusCode if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK)],
)
def test_no_other_code_is_retried(code: grpc.StatusCode):
    assert attempts(RetryPolicy()).delay_after(error(code, retry_after_s=0.1)) is None


def test_a_full_queue_is_retried_on_request_if_the_server_says_when():
    policy = RetryPolicy(retry_exhausted=True)
    assert attempts(policy).delay_after(error(grpc.StatusCode.RESOURCE_EXHAUSTED, 0.25)) == 0.25
    assert attempts(policy).delay_after(error(grpc.StatusCode.RESOURCE_EXHAUSTED)) is None


def test_no_attempt_that_the_deadline_would_cut_off():
    assert attempts(RetryPolicy(), timeout_s=0.11).delay_after(UNAVAILABLE) == pytest.approx(0.1)
    assert attempts(RetryPolicy(), timeout_s=0.1).delay_after(UNAVAILABLE) is None


def test_remaining_time():
    assert attempts(NO_RETRY, timeout_s=3.0).remaining_s() == 3.0
    assert attempts(NO_RETRY).remaining_s() is None


def test_no_retry_tries_once():
    assert attempts(NO_RETRY).delay_after(UNAVAILABLE) is None


def test_policy_needs_an_attempt():
    with pytest.raises(ValueError, match="attempts is 0"):
        RetryPolicy(attempts=0)


# Both clients


def unavailable(times: int) -> Failure:
    return Failure(grpc.StatusCode.UNAVAILABLE, "starting", times=times)


def test_a_call_that_fails_twice_is_retried(run: Run, fake: FakeServer):
    fake.failures["ExtractFeatures"] = [unavailable(2)]
    assert len(run(lambda client: value(client.extract_features("a", "resid-mid")))) == 1
    assert len(fake.requests("ExtractFeatures")) == 3


def test_retries_end(run: Run, fake: FakeServer):
    fake.failures["ExtractFeatures"] = [unavailable(3)]
    with pytest.raises(Unavailable, match="starting"):
        run(lambda client: value(client.extract_features("a", "resid-mid")))
    assert len(fake.requests("ExtractFeatures")) == 3


@pytest.mark.parametrize("method", ["ExtractFeatures", "Generate"])
def test_what_expired_is_not_retried(run: Run, fake: FakeServer, method: str):
    fake.failures[method] = [Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")]

    async def script(client: Any) -> Any:
        if method == "Generate":
            return await value(client.generate("a").result())
        return await value(client.extract_features("a", "resid-mid"))

    with pytest.raises(DeadlineExceeded):
        run(script)
    assert len(fake.requests(method)) == 1


def test_a_generation_is_retried_before_its_first_message(run: Run, fake: FakeServer):
    fake.failures["Generate"] = [unavailable(2)]
    assert run(lambda client: value(client.generate("a").result())).text == " a dog é."
    assert len(fake.requests("Generate")) == 3


def test_a_generation_is_not_retried_after_its_first_message(run: Run, fake: FakeServer):
    fake.fail_after_chunks = unavailable(1)
    received: list[str] = []

    async def script(client: Any) -> None:
        generation = client.generate("a")
        if isinstance(client, Client):
            received.extend(chunk.text for chunk in generation)
        else:
            async for chunk in generation:
                received.append(chunk.text)  # noqa: PERF401

    with pytest.raises(Unavailable):
        run(script)
    assert received == [" a dog", "", " é."]
    assert len(fake.requests("Generate")) == 1


def test_a_stream_of_extractions_is_not_retried(run: Run, fake: FakeServer):
    fake.failures["ExtractFeaturesStream"] = [unavailable(1)]
    with pytest.raises(Unavailable):
        run(lambda client: items(client.extract_features_stream(["a"], "resid-mid")))


def test_a_full_queue_is_retried_only_on_request(run: Run, fake: FakeServer):
    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full", (retry_info(0.002),), times=2)
    fake.failures["ExtractFeatures"] = [full]
    with pytest.raises(ResourceExhausted) as caught:
        run(lambda client: value(client.extract_features("a", "resid-mid")))
    assert caught.value.retry_after_s == pytest.approx(0.002)
    run(
        lambda client: value(client.extract_features("a", "resid-mid")),
        retry=RetryPolicy(attempts=3, retry_exhausted=True),
    )
    assert len(fake.requests("ExtractFeatures")) == 3
