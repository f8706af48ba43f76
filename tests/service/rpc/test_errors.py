"""Errors: their codes, their google.rpc details, and that they fit into trailing metadata."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from google.rpc import error_details_pb2

from service.engine.errors import QueueFull
from service.pb.saeserve.v1 import catalog_service_pb2, common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.rpc.errors import as_rpc_error
from tests.service.conftest import Served, serve, tight_settings
from tests.service.rpc.reading import failure, read_failure

pytestmark = pytest.mark.any_cpu


def extract(
    request_id: str = "", dictionaries: tuple[str, ...] = ("mid",), **fields: object
) -> pb.ExtractFeaturesRequest:
    fields.setdefault("inputs", [common_pb2.TextInput(text="some text")])
    return pb.ExtractFeaturesRequest(request_id=request_id, dictionaries=dictionaries, **fields)


async def test_invalid_argument_names_every_field_that_is_wrong(served: Served) -> None:
    failed = await failure(
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
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    bad = failed.detail(error_details_pb2.BadRequest)
    found = {violation.field: violation.description for violation in bad.field_violations}
    assert set(found) == {
        "dictionaries[1]", "inputs[1]", "inputs[2].text", "inputs[3].token_ids.ids[1]", "inputs[4].text",
        "selection.top_k", "aggregation",
    }  # fmt: skip
    assert "max_tokens_per_input = 96" in found["inputs[4].text"]
    assert failed.detail(error_details_pb2.RequestInfo).request_id == "bad-1"
    assert failed.trailing_metadata["request-id"] == "bad-1"


async def test_many_violations_fit_into_trailing_metadata(served: Served) -> None:
    inputs = [common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[999])) for _ in range(80)]
    failed = await failure(served.features.ExtractFeatures(extract("many", inputs=inputs)))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    assert 10 <= len(failed.fields) < 80
    assert len(failed.trailing_metadata["grpc-status-details-bin"]) <= 4096


async def test_unknown_dictionary(served: Served) -> None:
    failed = await failure(served.features.ExtractFeatures(extract("", ("mid", "nope"))))
    assert failed.code == grpc.StatusCode.NOT_FOUND
    assert failed.resources == [("saeserve.v1.Dictionary", "nope")]
    assert "mid" in failed.message
    assert failed.detail(error_details_pb2.RequestInfo).request_id  # made up by the server

    failed = await failure(served.catalog.GetDictionary(catalog_service_pb2.GetDictionaryRequest(name="nope")))
    assert failed.code == grpc.StatusCode.NOT_FOUND


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
        retry = read_failure(refused[0]).detail(error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToMilliseconds() >= 1


def test_queue_full_keeps_its_delay() -> None:
    error = as_rpc_error(QueueFull("full", limit_name="max_queued_tokens", retry_after_s=1.5), "id")
    assert error.details[0].retry_delay.ToMilliseconds() == 1500
