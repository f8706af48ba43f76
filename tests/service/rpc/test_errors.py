"""The error contract: codes, google.rpc details, request ids; cancellation and deadlines."""

import asyncio
import threading

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from service.engine.errors import QueueFull
from service.pb.saeserve.v1 import catalog_service_pb2, common_pb2, edits_pb2, server_service_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.pb.saeserve.v1 import intervention_service_pb2 as intervention_pb
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve, tight_settings

pytestmark = pytest.mark.any_cpu


def extract(
    request_id: str = "", dictionaries: tuple[str, ...] = ("mid",), **fields: object
) -> pb.ExtractFeaturesRequest:
    fields.setdefault("inputs", [common_pb2.TextInput(text="some text")])
    return pb.ExtractFeaturesRequest(request_id=request_id, dictionaries=dictionaries, **fields)


async def failure(call: grpc.aio.UnaryUnaryCall) -> tuple[grpc.aio.AioRpcError, dict[type[Message], Message]]:
    """The error of a call and its details by type (the first of each)."""
    answer = call if isinstance(call, grpc.aio.UnaryUnaryCall) else call.read()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await answer
    status = rpc_status.from_call(_Sync(raised.value))
    assert status is not None
    assert status.message == raised.value.details()
    details: dict[type[Message], Message] = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        message = getattr(error_details_pb2, name)()
        assert packed.Unpack(message)
        details.setdefault(type(message), message)
    return raised.value, details


class _Sync:
    """AioRpcError in the shape that grpc_status reads."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details = error.code, error.details
        self.trailing_metadata = lambda: tuple(error.trailing_metadata())


async def test_invalid_argument_names_every_field_that_is_wrong(served: Served) -> None:
    error, details = await failure(
        served.features.ExtractFeatures(
            extract(
                "bad-1",
                ("mid", "mid"),
                inputs=[
                    common_pb2.TextInput(text="fine"),
                    common_pb2.TextInput(),
                    common_pb2.TextInput(text=""),
                    common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[1, 999])),
                    common_pb2.TextInput(text="x" * 97),
                ],
                selection=pb.FeatureSelection(top_k=0),
                aggregation=50,
            )
        )
    )
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    bad = details[error_details_pb2.BadRequest]
    found = {violation.field: violation.description for violation in bad.field_violations}
    assert set(found) == {
        "dictionaries[1]", "inputs[1]", "inputs[2].text", "inputs[3].token_ids.ids[1]", "inputs[4].text",
        "selection.top_k", "aggregation",
    }  # fmt: skip
    assert "max_tokens_per_input = 96" in found["inputs[4].text"]
    assert details[error_details_pb2.RequestInfo].request_id == "bad-1"
    assert ("request-id", "bad-1") in tuple(error.trailing_metadata())


async def test_unknown_dictionary(served: Served) -> None:
    error, details = await failure(served.features.ExtractFeatures(extract("", ("mid", "nope"))))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    resource = details[error_details_pb2.ResourceInfo]
    assert (resource.resource_type, resource.resource_name) == ("saeserve.v1.Dictionary", "nope")
    assert "mid" in error.details()
    assert details[error_details_pb2.RequestInfo].request_id  # made up by the server

    error, _ = await failure(served.catalog.GetDictionary(catalog_service_pb2.GetDictionaryRequest(name="nope")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_edit_that_needs_statistics_the_dictionary_lacks(served: Served) -> None:
    request = intervention_pb.GenerateRequest(
        prompt=common_pb2.TextInput(text="a"),
        edits=[
            edits_pb2.Edit(dictionary="plain", feature=1, ablate=edits_pb2.ABLATION_MEAN),
            edits_pb2.Edit(
                dictionary="plain",
                feature=2,
                set=edits_pb2.Amount(value=1, unit=edits_pb2.UNIT_RECORDED_MAXIMUM),
            ),
        ],
    )
    error, details = await failure(served.interventions.Generate(request))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    failed = details[error_details_pb2.PreconditionFailure]
    assert [violation.subject for violation in failed.violations] == ["edits[0].ablate", "edits[1].set.unit"]


def hold_forwards(served: Served, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No forward ends before the event is set."""
    go_on, forward = threading.Event(), served.backbone.forward
    monkeypatch.setattr(served.backbone, "forward", lambda *a, **k: go_on.wait(60) and forward(*a, **k))
    return go_on


async def extract_words(served: Served) -> pb.ExtractFeaturesResponse:
    return await served.features.ExtractFeatures(extract(inputs=[common_pb2.TextInput(text="word " * 15)]))


async def test_full_queue_says_when_to_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    async for served in serve(tight_settings()):
        go_on = hold_forwards(served, monkeypatch)
        calls = [asyncio.ensure_future(extract_words(served)) for _ in range(30)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)  # one is refused
        go_on.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert refused
        assert len(refused) < len(results)
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        status = rpc_status.from_call(_Sync(refused[0]))
        retry = error_details_pb2.RetryInfo()
        assert any(packed.Unpack(retry) for packed in status.details)
        assert retry.retry_delay.ToMilliseconds() >= 1


async def test_stream_waits_where_a_call_is_refused() -> None:
    async for served in serve(tight_settings()):
        requests = [pb.ExtractFeaturesStreamRequest(request=extract(str(i + 1))) for i in range(40)]
        replies = [reply async for reply in served.features.ExtractFeaturesStream(iter(requests))]
        assert [reply.response.request_id for reply in replies] == [str(i + 1) for i in range(40)]


async def test_unavailable_before_start_and_while_draining() -> None:
    async for served in serve(ReplicaSettings(limits=LIMITS), open_now=False):
        for state in ("starting", "draining"):
            error, details = await failure(served.features.ExtractFeatures(extract("early")))
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert state in error.details()
            assert details[error_details_pb2.RetryInfo].retry_delay.ToMilliseconds() > 0
            served.runtime.begin_drain()


async def test_internal_error_says_nothing_but_the_request_id(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(work: object) -> None:
        raise RuntimeError("secret path /etc/nowhere")

    monkeypatch.setattr(served.runtime.engine, "extract", broken)
    error, details = await failure(served.features.ExtractFeatures(extract("int-1")))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert error.details() == "internal error; request id int-1"
    assert set(details) == {error_details_pb2.RequestInfo}
    assert "secret path" in caplog.text
    assert "int-1" in caplog.text


@pytest.mark.parametrize("request_id", ["x" * 129, "tab\there", "ümlaut"])
async def test_request_ids_that_cannot_be_echoed(served: Served, request_id: str) -> None:
    error, details = await failure(
        served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest(request_id=request_id))
    )
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details[error_details_pb2.BadRequest].field_violations[0].field == "request_id"


async def test_many_violations_fit_into_trailing_metadata(served: Served) -> None:
    inputs = [common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[999])) for _ in range(80)]
    error, details = await failure(served.features.ExtractFeatures(extract("many", inputs=inputs)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert 10 <= len(details[error_details_pb2.BadRequest].field_violations) < 80
    assert len(dict(error.trailing_metadata())["grpc-status-details-bin"]) <= 4096


class _Held:
    """An engine.extract that begins, tells so, and never ends."""

    def __init__(self) -> None:
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()

    async def __call__(self, work: object) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


async def test_cancelled_and_expired_calls_reach_the_engine(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = _Held()
    monkeypatch.setattr(served.runtime.engine, "extract", held)
    call = served.features.ExtractFeatures(extract())
    await asyncio.wait_for(held.begun.wait(), 10)
    call.cancel()
    await asyncio.wait_for(held.cancelled.wait(), 10)

    for timeout_s in (0.2, 2, 20):  # on a slow machine a call may expire before it has begun
        held = _Held()
        monkeypatch.setattr(served.runtime.engine, "extract", held)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.features.ExtractFeatures(extract(), timeout=timeout_s)
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if held.begun.is_set():
            break
    await asyncio.wait_for(held.cancelled.wait(), 10)

    held = _Held()
    monkeypatch.setattr(served.runtime.engine, "extract", held)
    stream = served.features.ExtractFeaturesStream(iter([pb.ExtractFeaturesStreamRequest(request=extract())]))
    reading = asyncio.ensure_future(stream.read())
    await asyncio.wait_for(held.begun.wait(), 10)
    stream.cancel()
    await asyncio.wait_for(held.cancelled.wait(), 10)
    with pytest.raises(asyncio.CancelledError):
        await reading


def test_queue_full_keeps_its_delay() -> None:
    from service.rpc.errors import as_rpc_error

    error = as_rpc_error(QueueFull("full", limit_name="max_queued_tokens", retry_after_s=1.5), "id")
    assert error.details[0].retry_delay.ToMilliseconds() == 1500
