"""Hundreds of malformed requests over all RPCs get documented codes, and the server is sound afterwards."""

import asyncio
from collections import Counter

import numpy as np
import pytest
import torch

from service.arrays import unpack_sparse_rows
from service.pb.saeserve.v1 import catalog_service_pb2, common_pb2, feature_service_pb2, server_service_pb2
from service.rpc.register import RPCS
from tests.service.conftest import Served
from tests.service.rpc.malformed import Facts, malformed_requests, send

pytestmark = pytest.mark.any_cpu


async def test_malformed_requests_get_documented_codes_and_leave_the_server_sound(served: Served) -> None:
    info = await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    listed = await served.catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest())
    requests = list(malformed_requests(Facts(info, listed.dictionaries), count=500, seed=1))
    assert len(requests) >= 400
    assert {request.rpc for request in requests} == set(RPCS)

    codes = await asyncio.gather(*(send(served.channel, request) for request in requests))

    wrong = Counter(
        (request.rpc, request.defect, code.name)
        for request, code in zip(requests, codes, strict=True)
        if code not in request.codes
    )
    assert not wrong

    dictionary = served.dictionaries["mid"]
    reply = await served.features.ExtractFeatures(
        feature_service_pb2.ExtractFeaturesRequest(inputs=[common_pb2.TextInput(text="Sound?")], dictionaries=["mid"])
    )
    ids = torch.tensor([served.backbone.encode_text("Sound?").ids])
    acts = served.backbone.activations(ids, sites=[dictionary.site])[dictionary.site][0]
    splits, indices, values = unpack_sparse_rows(reply.results[0].dictionaries[0].features)
    expected_splits, expected_indices, expected_values = dictionary.encode(acts).to_csr()
    np.testing.assert_array_equal(splits, expected_splits)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(values, expected_values, atol=1e-5)
