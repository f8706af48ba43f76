"""Both clients against a server with canned replies; each test runs the blocking client and the asyncio one."""

from __future__ import annotations

import asyncio
import inspect
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2_grpc

from service.client import (
    NO_RETRY,
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InputStatistics,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RetryPolicy,
    SaeserveError,
    SparseRows,
    Unavailable,
    set_feature,
)
from tests.service.client.fake_server import Failure, FakeServer, Running, retry_info

QUICK = RetryPolicy(attempts=3, initial_backoff_s=0.001)
WIRE_ROUNDING = 1.01  # gRPC sends deadlines in three digits, rounded up
Script = Callable[[Any], Awaitable[Any]]
Run = Callable[..., Any]


async def value(result: Any) -> Any:
    """Awaits what the asyncio client returns; what the blocking one returns is there already."""
    return await result if inspect.isawaitable(result) else result


async def items(stream: Any) -> list[Any]:
    return [each async for each in stream] if hasattr(stream, "__aiter__") else list(stream)


@pytest.fixture(params=["sync", "asyncio"])
def run(request: pytest.FixtureRequest, fake: FakeServer) -> Run:
    """Runs a script, written once for both, with a client."""

    def run(script: Script, **options: Any) -> Any:
        options = {"retry": QUICK, "timeout_s": 20.0, **options}

        async def main() -> Any:
            if request.param == "sync":
                with Client(fake.address, **options) as client:
                    return await script(client)
            async with AsyncClient(fake.address, **options) as async_client:
                return await script(async_client)

        return asyncio.run(main())

    return run


# Replies


def test_extract_features(run: Run, fake: FakeServer):
    reply = run(
        lambda client: value(
            client.extract_features(
                ["a bc", [7]],
                ["resid-mid", "resid-late"],
                top_k=2,
                tokens=True,
                reconstruction_error=True,
                overflow="truncate",
                request_id="mine",
            )
        )
    )
    (sent,) = fake.requests("ExtractFeatures")
    assert list(sent.dictionaries) == ["resid-mid", "resid-late"]
    assert sent.selection.top_k == 2
    assert reply.request_id == "mine"
    assert (reply.timing.queue_ms, reply.timing.compute_ms, reply.timing.total_ms) == (1.5, 4.0, 6.25)
    assert len(reply) == 2
    first = reply[0]
    assert (first.n_tokens, first.truncated_tokens) == (2, 3)
    assert list(first.dictionaries) == ["resid-mid", "resid-late"]
    indices, values = first["resid-late"].row(1)
    np.testing.assert_array_equal(indices, [1, 63])
    np.testing.assert_array_equal(values, [2.0, 1.0])
    assert (indices.dtype, values.dtype) == (np.uint32, np.float32)
    np.testing.assert_array_equal(first.dictionaries["resid-mid"].reconstruction_error, [0.25, 0.25])
    assert first.tokens.pieces == (b"a", b" bc")
    np.testing.assert_array_equal(first.tokens.byte_starts, [0, 1])
    np.testing.assert_array_equal(first.tokens.char_ends, [1, 4])
    np.testing.assert_array_equal(first.tokens.ids, [100, 101])


def test_what_was_not_asked_for_is_none(run: Run):
    reply = run(lambda client: value(client.extract_features("a", "resid-mid", aggregation="max")))
    assert reply.request_id == "made-up"
    assert reply[0].tokens is None
    assert reply[0].dictionaries["resid-mid"].reconstruction_error is None
    assert len(reply[0]["resid-mid"]) == 1


def test_all_dictionaries_are_asked_for_once(run: Run, fake: FakeServer):
    async def script(client: Any) -> None:
        await value(client.extract_features("a"))
        await value(client.extract_features("b"))

    run(script)
    assert [list(request.dictionaries) for request in fake.requests("ExtractFeatures")] == [
        ["resid-late", "resid-mid"]
    ] * 2
    assert len(fake.requests("GetServerInfo")) == 1


def test_stream_keeps_the_order(run: Run, fake: FakeServer):
    requests = [["a b", "c"], "d e f", [1, 2]]
    replies = run(lambda client: items(client.extract_features_stream(requests, "resid-mid", threshold=0.5)))
    assert [[each.n_tokens for each in reply.inputs] for reply in replies] == [[2, 1], [3], [2]]
    assert all(each.selection.threshold == 0.5 for each in fake.requests("ExtractFeaturesStream")[1:])


def test_stream_of_an_iterable_that_fails(run: Run):
    def requests() -> Iterator[str]:
        yield "a b"
        raise RuntimeError("the file ended")

    received = []

    async def script(client: Any) -> None:
        stream = client.extract_features_stream(requests(), "resid-mid")
        if isinstance(client, Client):
            received.extend(stream)
        else:
            async for reply in stream:
                received.append(reply)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(RuntimeError, match="the file ended"):
        run(script)
    assert [reply[0].n_tokens for reply in received] == [2]


async def test_stream_from_an_asynchronous_iterable(fake: FakeServer):
    async def requests() -> AsyncIterator[str]:
        yield "a"
        yield "b c"

    async with AsyncClient(fake.address) as client:
        replies = [reply async for reply in client.extract_features_stream(requests(), "resid-mid")]
    assert [reply[0].n_tokens for reply in replies] == [1, 2]


def test_encode_and_decode(run: Run, fake: FakeServer):
    async def script(client: Any) -> tuple[Any, Any, Any]:
        encoding = await value(client.encode_activations("resid-mid", np.ones((3, 4)), top_k=1, request_id="e"))
        plain = await value(client.encode_activations("resid-late", np.ones((3, 4))))
        decoding = await value(
            client.decode_features("resid-mid", encoding.features, encoding.input_statistics, request_id="d")
        )
        return encoding, plain, decoding

    encoding, plain, decoding = run(script)
    np.testing.assert_array_equal(encoding.features.row_splits, [0, 1, 2, 3])
    np.testing.assert_array_equal(encoding.features.values, [2.0, 2.0, 2.0])
    np.testing.assert_array_equal(encoding.input_statistics.mean, [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(encoding.input_statistics.std, [3.0, 3.0, 3.0])
    assert plain.input_statistics is None
    np.testing.assert_array_equal(decoding.activations, np.ones((3, 4), np.float32))
    assert (encoding.request_id, decoding.request_id) == ("e", "d")
    (sent,) = fake.requests("DecodeFeatures")
    assert list(sent.features.indices) == [0, 1, 2]
    assert list(sent.input_statistics.std) == [3.0, 3.0, 3.0]


def test_decode_without_statistics(run: Run, fake: FakeServer):
    rows = SparseRows(np.array([0, 1]), np.array([5]), np.array([1.5]))
    run(lambda client: value(client.decode_features("resid-mid", rows)))
    (sent,) = fake.requests("DecodeFeatures")
    assert not sent.HasField("input_statistics")
    assert (list(sent.features.indices), list(sent.features.values)) == ([5], [1.5])


def test_decode_of_no_rows_keeps_its_statistics(run: Run, fake: FakeServer):
    empty = np.zeros(0, np.float32)
    rows = SparseRows(np.array([0]), np.zeros(0, np.uint32), empty)
    run(lambda client: value(client.decode_features("resid-mid", rows, InputStatistics(empty, empty))))
    assert fake.requests("DecodeFeatures")[0].HasField("input_statistics")


def test_generate(run: Run, fake: FakeServer):
    async def script(client: Any) -> tuple[list[Any], Any, Any]:
        generation = client.generate(
            "Once", [set_feature("resid-mid", 3, 2.0)], max_new_tokens=6, seed=5, stop=["x"], request_id="g"
        )
        chunks = await items(generation)
        return chunks, await value(generation.result()), await value(generation.result())

    chunks, result, again = run(script)
    assert [chunk.text for chunk in chunks] == [" a cat", "", " é."]
    np.testing.assert_array_equal(chunks[1].token_ids, [1, 11])
    assert result.text == " a cat é."
    np.testing.assert_array_equal(result.token_ids, [0, 10, 1, 11, 2, 12])
    np.testing.assert_array_equal(result.logprobs, np.array([-0.5, 0, -0.5, -1, -0.5, -2], np.float32))
    assert (result.finish_reason, result.stop, result.seed) == ("stop", "x", 5)
    assert (result.prompt_tokens, result.generated_tokens, result.request_id) == (4, 6, "g")
    assert again.text == result.text
    (sent,) = fake.requests("Generate")
    assert (sent.max_new_tokens, sent.edits[0].feature, sent.edits[0].set.value) == (6, 3, 2.0)


def test_generate_result_alone(run: Run):
    result = run(lambda client: value(client.generate("Once").result()))
    assert (result.text, result.finish_reason, result.seed) == (" a dog é.", "length", 77)


def test_generate_several_sequences(run: Run, fake: FakeServer):
    async def script(client: Any) -> tuple[list[Any], Any, Any]:
        generation = client.generate("Once", [set_feature("resid-mid", 3, 2.0)], samples=2, compare=True)
        return await items(generation), await value(generation.all_results()), await value(generation.result())

    chunks, results, first = run(script)
    assert [(chunk.sample, chunk.unedited) for chunk in chunks[:4]] == [(0, True), (1, True), (0, False), (1, False)]
    assert [(r.unedited, r.sample, r.text) for r in results] == [
        (False, 0, " a cat é."),
        (False, 1, " a cat é.!"),
        (True, 0, " a dog é."),
        (True, 1, " a dog é.!"),
    ]
    assert first is results[0]
    (sent,) = fake.requests("Generate")
    assert (sent.samples, sent.compare) == (2, True)


def test_generate_tells_tokens_and_features(run: Run, fake: FakeServer):
    result = run(
        lambda client: value(
            client.generate(
                "Once", top_logprobs=2, features="resid-mid", features_top_k=2, repetition_penalty=1.5
            ).result()
        )
    )
    assert [list(top.token_ids) for top in result.top[:2]] == [[0, 7], [10, 7]]
    np.testing.assert_allclose(result.top[0].logprobs, [-0.5, -3])
    assert result.top[1].pieces == (b"<10>", b" x")
    first, second = result.features
    assert (first.first_position, second.first_position, first.pieces) == (4, 6, (b"a", b" b"))
    indices, values = first.dictionaries["resid-mid"].row(0)
    assert (indices.tolist(), values.tolist()) == ([5, 9], [2.5, 1.0])
    (sent,) = fake.requests("Generate")
    assert (sent.top_logprobs, list(sent.features.dictionaries), sent.features.top_k) == (2, ["resid-mid"], 2)
    assert sent.sampling.repetition_penalty == 1.5


def test_a_sequence_without_an_end_is_an_error(run: Run, fake: FakeServer):
    fake.end_without_finish = True
    with pytest.raises(SaeserveError, match="ended"):
        run(lambda client: value(client.generate("a", samples=2).all_results()))


def test_dictionaries(run: Run):
    async def script(client: Any) -> tuple[Any, Any, Any]:
        listed = await value(client.list_dictionaries())
        return listed, await value(client.get_dictionary("resid-mid")), await value(client.get_dictionary("resid-late"))

    listed, mid, late = run(script)
    assert [(each.name, each.k, each.context_length) for each in listed] == [
        ("resid-late", None, None),
        ("resid-mid", 8, 32),
    ]
    assert mid.evaluation == {"nmse": 0.125, "loss_recovered": 0.9375}
    assert mid.provenance.created.isoformat() == "2026-11-22T01:02:03+00:00"
    assert mid.provenance.config == {"k": 8}
    assert late.provenance is None


def test_server_info(run: Run):
    info = run(lambda client: value(client.server_info()))
    assert info.library_versions["ray"] == "2.60.0"
    assert info.backbone.sites == ("2.resid_post_mlp", "3.resid_post_mlp")
    assert (info.limits.max_inputs, info.limits.max_edit_strength) == (2, 10.0)
    assert info.device == "cpu"


def test_metadata_goes_with_every_call(run: Run, fake: FakeServer):
    async def script(client: Any) -> None:
        await value(client.extract_features("a"))
        await items(client.extract_features_stream(["a"]))
        await value(client.generate("a").result())

    run(script, metadata=[("authorization", "Bearer 1")])
    assert {method for method, _, _ in fake.calls} >= {"ExtractFeatures", "ExtractFeaturesStream", "Generate"}
    assert all(metadata["authorization"] == "Bearer 1" for _, _, metadata in fake.calls)


# Errors


def test_errors_carry_their_details(run: Run, fake: FakeServer):
    violation = error_details_pb2.BadRequest.FieldViolation(field="inputs[0]", description="is empty")
    bad_request = error_details_pb2.BadRequest(field_violations=[violation])
    fake.failures["ExtractFeatures"] = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "wrong", (bad_request,))]
    with pytest.raises(InvalidArgument) as caught:
        run(lambda client: value(client.extract_features("", "resid-mid", request_id="mine")))
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.message, error.request_id) == ("wrong", "mine")
    assert error.field_violations == (FieldViolation("inputs[0]", "is empty"),)
    assert str(error) == "INVALID_ARGUMENT: wrong\n  inputs[0]: is empty (request mine)"
    assert len(fake.requests("ExtractFeatures")) == 1


def test_not_found_names_the_resource(run: Run):
    with pytest.raises(NotFound, match="no dictionary named 'x'") as caught:
        run(lambda client: value(client.get_dictionary("x")))
    assert caught.value.resources == ("x",)


def test_a_failed_precondition_says_which_field(run: Run, fake: FakeServer):
    violation = error_details_pb2.PreconditionFailure.Violation(type="S", subject="edits[0]", description="no maximum")
    details = (error_details_pb2.PreconditionFailure(violations=[violation]),)
    fake.failures["Generate"] = [Failure(grpc.StatusCode.FAILED_PRECONDITION, "cannot", details)]
    with pytest.raises(FailedPrecondition) as caught:
        run(lambda client: value(client.generate("x").result()))
    assert caught.value.field_violations == (FieldViolation("edits[0]", "no maximum"),)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_code_raises_its_class(code: grpc.StatusCode, fake: FakeServer):
    fake.failures["ListDictionaries"] = [Failure(code, "no")]
    with Client(fake.address, retry=NO_RETRY) as client, pytest.raises(SaeserveError) as caught:
        client.list_dictionaries()
    assert caught.value.code is code
    named = code.name.title().replace("_", "")
    # Codes that the API does not use have no class of their own.
    assert type(caught.value).__name__ in (named, "SaeserveError")


def test_a_server_that_is_not_there(unused_address: str):
    with Client(unused_address, retry=QUICK) as client, pytest.raises(Unavailable) as caught:
        client.server_info()
    assert caught.value.request_id == ""


def test_calls_end_at_their_deadline(run: Run):
    with pytest.raises(DeadlineExceeded):
        run(lambda client: value(client.extract_features("wait", "resid-mid", timeout_s=0.2)))
    with pytest.raises(DeadlineExceeded):
        run(lambda client: value(client.generate("wait", timeout_s=0.2).result()))


def test_the_server_is_told_the_deadline(run: Run, fake: FakeServer):
    run(lambda client: value(client.extract_features("a", "resid-mid", timeout_s=50)), timeout_s=1000)
    run(lambda client: value(client.generate("a", timeout_s=70).result()), generate_timeout_s=1000)
    assert 0 < fake.time_left_s["ExtractFeatures"] <= 50 * WIRE_ROUNDING
    assert 50 < fake.time_left_s["Generate"] <= 70 * WIRE_ROUNDING


def test_default_deadlines_are_the_clients(run: Run, fake: FakeServer):
    run(lambda client: value(client.extract_features("a", "resid-mid")), timeout_s=50)
    run(lambda client: value(client.generate("a").result()), generate_timeout_s=70)
    assert 0 < fake.time_left_s["ExtractFeatures"] <= 50 * WIRE_ROUNDING
    assert 50 < fake.time_left_s["Generate"] <= 70 * WIRE_ROUNDING


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


def test_no_deadline(run: Run, fake: FakeServer):
    run(lambda client: value(client.server_info(timeout_s=math.inf)))
    assert fake.time_left_s["GetServerInfo"] > 1e9  # gRPC has no word for never
    with pytest.raises(ValueError, match="timeout_s is 0"):
        run(lambda client: value(client.server_info(timeout_s=0)))


# Retries


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


# Streams that end otherwise


def test_a_generation_whose_stream_just_ends(run: Run, fake: FakeServer):
    fake.end_without_finish = True
    with pytest.raises(Internal, match="ended before the generation did"):
        run(lambda client: value(client.generate("a").result()))


def test_leaving_a_with_block_cancels_the_generation(run: Run, fake: FakeServer):
    async def script(client: Any) -> None:
        if isinstance(client, Client):
            with client.generate("wait") as generation:
                next(generation)
        else:
            async with client.generate("wait") as async_generation:
                await anext(async_generation)
        # The client stays open: it is the block that cancels.
        assert await asyncio.to_thread(fake.cancelled.wait, 10)

    run(script)


def test_iterating_on_after_cancel(fake: FakeServer):
    with Client(fake.address) as client:
        generation = client.generate("wait")
        next(generation)
        generation.cancel()
        with pytest.raises(Cancelled):
            generation.result()


async def test_a_cancelled_task_cancels_its_call(fake: FakeServer):
    async with AsyncClient(fake.address) as client:
        generation = client.generate("wait")
        await anext(generation)
        task = asyncio.create_task(generation.result())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.cancelled.wait, 10)


# Health


def test_health(run: Run, running: Running):
    assert run(lambda client: value(client.is_healthy())) is True
    running.set_serving(False)
    assert run(lambda client: value(client.is_healthy())) is False
    with pytest.raises(NotFound):
        run(lambda client: value(client.is_healthy("no.such.Service")))


def test_nothing_there_is_not_healthy(unused_address: str):
    with Client(unused_address) as client:
        assert client.is_healthy() is False


class _KnowsNothing(health_pb2_grpc.HealthServicer):
    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.NOT_FOUND, "Application metadata not set.")


def test_an_ingress_without_the_application_is_not_healthy():
    """Ray's ingress answers NOT_FOUND to every call until the application is up."""
    ingress = grpc.server(ThreadPoolExecutor(max_workers=1))
    health_pb2_grpc.add_HealthServicer_to_server(_KnowsNothing(), ingress)
    port = ingress.add_insecure_port("127.0.0.1:0")
    ingress.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            assert client.is_healthy() is False
    finally:
        ingress.stop(None)


@pytest.fixture
def _asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a server asks once and gives up, as there is no time for a second question."""
    monkeypatch.setattr("service.client.channel.READINESS_POLL_S", math.inf)


@pytest.mark.usefixtures("_asked_once")
def test_a_server_that_does_not_serve(run: Run, running: Running):
    running.set_serving(False)
    with pytest.raises(DeadlineExceeded, match="it says that it is not serving"):
        run(lambda client: value(client.wait_until_ready(20)))


def test_wait_until_ready(run: Run, running: Running):
    run(lambda client: value(client.wait_until_ready(20)))
    running.set_serving(False)

    async def script(client: Any) -> None:
        if isinstance(client, Client):
            waiting = asyncio.create_task(asyncio.to_thread(client.wait_until_ready, 60))
        else:
            waiting = asyncio.create_task(client.wait_until_ready(60))
        running.set_serving(True)
        await waiting

    run(script)


@pytest.mark.usefixtures("_asked_once")
def test_waiting_for_a_server_that_is_not_there(unused_address: str):
    with Client(unused_address) as client, pytest.raises(DeadlineExceeded, match="last answer was UNAVAILABLE"):
        client.wait_until_ready(20)


@pytest.fixture
def unused_address() -> str:
    running = Running()
    running.stop()
    return running.fake.address


def test_the_client_does_not_import_torch_or_ray():
    script = "import service.client, sys; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
