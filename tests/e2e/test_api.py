"""The API through the real port: HAProxy, Ray Serve, a replica."""

from __future__ import annotations

import random

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from service.arrays import unpack_sparse_rows
from service.pb.saeserve.v1 import catalog_service_pb2, catalog_service_pb2_grpc, edits_pb2, server_service_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from service.pb.saeserve.v1 import intervention_service_pb2 as intervention_pb
from service.pb.saeserve.v1.common_pb2 import TextInput
from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceStub
from service.pb.saeserve.v1.intervention_service_pb2_grpc import InterventionServiceStub
from service.pb.saeserve.v1.server_service_pb2_grpc import ServerServiceStub
from service.rpc.register import RPCS
from tests.e2e.conftest import MAX_GENERATIONS, MAX_QUEUED_GENERATIONS
from tests.e2e.running_service import RunningService, poll
from tests.e2e.tiny_model import TinyModel
from tests.service.rpc.malformed import Facts, malformed_requests, send

ACTIVE = "saeserve_active_generations"


def extract_request(text: str) -> feature_pb.ExtractFeaturesRequest:
    return feature_pb.ExtractFeaturesRequest(inputs=[TextInput(text=text)], dictionaries=["mid", "late"])


def generate_request(tokens: int, *, edits: bool = False) -> intervention_pb.GenerateRequest:
    request = intervention_pb.GenerateRequest(
        prompt=TextInput(text="Once upon a time"), max_new_tokens=tokens, ignore_end_of_text=True
    )
    if edits:
        request.edits.add(dictionary="mid", feature=3, set=edits_pb2.Amount(value=30))
    return request


def test_ready_line_says_where_and_how(service: RunningService) -> None:
    assert f"gRPC {service.grpc_address}" in service.ready_line
    assert "saeserve features" in service.ready_line
    assert service.get("/healthz") == "SERVING\n"


def test_health_by_service(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "saeserve.v1.FeatureService"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


@pytest.mark.parametrize("size", [17_000, 60_000])
def test_metadata_that_is_too_large_is_resource_exhausted(channel: grpc.Channel, size: int) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        FeatureServiceStub(channel).ExtractFeatures(
            extract_request("x"), timeout=20, metadata=[("x-large", "a" * size)]
        )
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_reflection_lists_every_service(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    reply = next(iter(stub.ServerReflectionInfo(iter([request]), timeout=20)))
    assert {rpc.service for rpc in RPCS.values()} <= {service.name for service in reply.list_services_response.service}


def test_features_equal_the_librarys_alone_and_among_64_calls(channel: grpc.Channel, tiny_model: TinyModel) -> None:
    rng = random.Random(0)
    alphabet = "abc defg hijk é日"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 200))) for _ in range(64)]
    stub = FeatureServiceStub(channel)
    alone = stub.ExtractFeatures(extract_request(texts[0]), timeout=60)
    calls = [stub.ExtractFeatures.future(extract_request(text), timeout=60) for text in texts]
    replies = [alone, *(call.result() for call in calls)]

    backbone, dictionaries = tiny_model.load_backbone(), tiny_model.load_dictionaries()
    for text, reply in zip([texts[0], *texts], replies, strict=True):
        ids = torch.tensor([backbone.encode_text(text).ids])
        sites = [str(dictionary.site) for dictionary in dictionaries.values()]
        activations = backbone.activations(ids, sites=sites)
        for result in reply.results[0].dictionaries:
            dictionary = dictionaries[result.dictionary]
            expected = dictionary.encode(activations[str(dictionary.site)][0])
            splits, indices, values = unpack_sparse_rows(result.features)
            dense = np.zeros((len(splits) - 1, dictionary.n_latents), dtype=np.float32)
            dense[np.repeat(np.arange(len(splits) - 1), np.diff(splits.astype(np.int64))), indices] = values
            np.testing.assert_allclose(dense, expected.to_dense().numpy(), atol=1e-5)


def test_two_streams_at_once_and_a_steered_one_changes_nothing(channel: grpc.Channel) -> None:
    stub = InterventionServiceStub(channel)

    def tokens(call: grpc.Call) -> list[int]:
        return [token for reply in call for token in reply.chunk.token_ids]

    alone = tokens(stub.Generate(generate_request(40), timeout=60))
    steered, plain = (stub.Generate(generate_request(40, edits=edits), timeout=60) for edits in (True, False))
    assert tokens(plain) == alone
    assert len(alone) == 40
    assert tokens(steered) != alone


def test_bidirectional_stream_keeps_order(channel: grpc.Channel) -> None:
    requests = (
        feature_pb.ExtractFeaturesStreamRequest(
            request=feature_pb.ExtractFeaturesRequest(
                request_id=str(n), inputs=[TextInput(text="word " * (1 + n % 7))], dictionaries=["mid"]
            )
        )
        for n in range(50)
    )
    replies = FeatureServiceStub(channel).ExtractFeaturesStream(requests, timeout=60)
    assert [reply.response.request_id for reply in replies] == [str(n) for n in range(50)]


def test_errors_carry_their_details_through_the_ingress(channel: grpc.Channel) -> None:
    request = extract_request("text")
    request.dictionaries[:] = ["no such dictionary"]
    with pytest.raises(grpc.RpcError) as caught:
        FeatureServiceStub(channel).ExtractFeatures(request, timeout=20)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    status = rpc_status.from_call(caught.value)
    assert status is not None
    resource = error_details_pb2.ResourceInfo()
    assert any(detail.Unpack(resource) for detail in status.details)
    assert resource.resource_name == "no such dictionary"


async def test_malformed_requests_leave_the_service_sound(service: RunningService) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        info = await ServerServiceStub(channel).GetServerInfo(server_service_pb2.GetServerInfoRequest())
        catalog = catalog_service_pb2_grpc.CatalogServiceStub(channel)
        listed = await catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest())
        requests = list(malformed_requests(Facts(info, listed.dictionaries), count=200))
        assert len(requests) == 200
        for request in requests:
            code = await send(channel, request)
            assert code in request.codes, (request.rpc, request.defect)
        await FeatureServiceStub(channel).ExtractFeatures(extract_request("still here"), timeout=20)
    assert service.is_serving()


def test_cancelled_generation_leaves_its_place(service: RunningService, channel: grpc.Channel) -> None:
    stub, generated = InterventionServiceStub(channel), 'saeserve_tokens_total{kind="generate"}'
    before = service.metric(generated)
    calls = [stub.Generate(generate_request(1000), timeout=120) for _ in range(MAX_GENERATIONS)]
    for call in calls:
        next(call)
    assert service.metric(ACTIVE) == MAX_GENERATIONS
    for call in calls:
        call.cancel()
    assert poll(lambda: service.metric(ACTIVE) == 0)
    assert service.metric(generated) - before < MAX_GENERATIONS * 1000  # they did not run to their end
    sum(1 for _ in stub.Generate(generate_request(3), timeout=60))


def test_full_queue_is_refused_with_a_time_to_retry(service: RunningService, channel: grpc.Channel) -> None:
    stub = InterventionServiceStub(channel)
    running = [stub.Generate(generate_request(1000), timeout=120) for _ in range(MAX_GENERATIONS)]
    for call in running:
        next(call)
    waiting = [stub.Generate(generate_request(1000), timeout=120) for _ in range(MAX_QUEUED_GENERATIONS + 1)]
    # One of them is refused, whichever came last; the others wait until a place is free.
    refused = poll(lambda: [call for call in waiting if call.done()])
    assert [call.code() for call in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
    status = rpc_status.from_call(refused[0])
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToTimedelta().total_seconds() > 0
    for call in (*running, *waiting):
        call.cancel()
    assert poll(lambda: service.metric(ACTIVE) == 0)


def test_metrics_count_calls_and_tokens(service: RunningService, channel: grpc.Channel) -> None:
    calls, tokens = 'saeserve_requests_total{code="OK",rpc="ExtractFeatures"}', 'saeserve_tokens_total{kind="extract"}'
    before = service.metric(calls), service.metric(tokens)
    for _ in range(5):
        FeatureServiceStub(channel).ExtractFeatures(extract_request("0123456789"), timeout=20)
    assert service.metric(calls) == before[0] + 5
    assert service.metric(tokens) == before[1] + 50
