"""Dictionaries of every family behind the API: the same numbers as the library, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runtime import Dictionary
from service.arrays import pack_tensor, unpack_sparse_rows, unpack_tensor
from service.pb.saeserve.v1 import catalog_service_pb2, common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.settings import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve
from tests.service.engine.models import N_LATENTS, random_dictionary

SITE, WIDTH = "1.resid_post_mlp", 32


def dictionaries() -> dict[str, Dictionary]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    relu = random_dictionary(SITE, WIDTH, k=None, normalize=False, seed=1)
    topk = random_dictionary(SITE, WIDTH, k=8, normalize=False, seed=2)
    families = {
        "jumprelu": replace(relu, activation="jumprelu", threshold=normal(N_LATENTS), output_bias=normal(WIDTH)),
        "gated": replace(
            relu, activation="gated", magnitude_scale=normal(N_LATENTS).exp(), magnitude_bias=normal(N_LATENTS)
        ),
        "groupmax": replace(topk, activation="groupmax", normalization="constant_norm"),
        "skip": replace(topk, skip=normal(WIDTH, WIDTH)),
        "transcoder": replace(topk, transcoder=True),
    }
    return {name: replace(dictionary, name=name) for name, dictionary in families.items()}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async for server in serve(ReplicaSettings(limits=LIMITS), dictionaries=dictionaries()):
        yield server


def dense(rows: common_pb2.SparseRows) -> np.ndarray:
    row_splits, indices, values = unpack_sparse_rows(rows)
    found = np.zeros((len(row_splits) - 1, N_LATENTS), np.float32)
    for row in range(len(found)):
        entries = slice(int(row_splits[row]), int(row_splits[row + 1]))
        found[row, indices[entries]] = values[entries]
    return found


@pytest.mark.parametrize("name", ["jumprelu", "gated", "groupmax"])
async def test_encode_and_decode(served: Served, name: str) -> None:
    dictionary = served.dictionaries[name]
    x = 3 * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)) + 1
    encoded = await served.features.EncodeActivations(
        pb.EncodeActivationsRequest(dictionary=name, activations=pack_tensor(x.numpy()))
    )
    features = dictionary.encode(x)
    np.testing.assert_allclose(dense(encoded.features), features.to_dense(), atol=1e-4)
    decoded = await served.features.DecodeFeatures(
        pb.DecodeFeaturesRequest(dictionary=name, features=encoded.features, input_statistics=encoded.input_statistics)
    )
    np.testing.assert_allclose(unpack_tensor(decoded.activations), dictionary.decode(features), atol=1e-3)


async def test_the_catalogue_says_what_they_are(served: Served) -> None:
    reply = await served.catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest())
    found = {d.name: (d.architecture, d.k, d.normalization, d.normalizes_input) for d in reply.dictionaries}
    assert found["jumprelu"] == ("jumprelu", 0, "none", False)
    assert found["gated"] == ("gated", 0, "none", False)
    assert found["groupmax"] == ("groupmax", 8, "constant_norm", True)
    assert [d.name for d in reply.dictionaries if d.has_skip_connection] == ["skip"]
    assert [d.name for d in reply.dictionaries if d.transcoder] == ["transcoder"]


async def test_a_skip_connection_is_decoded_where_the_input_is_at_hand_only(served: Served) -> None:
    reply = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[3, 1, 4, 1, 5]))],
            dictionaries=["skip"],
            include_reconstruction_error=True,
        )
    )
    dictionary = served.dictionaries["skip"]
    x = served.backbone.activations(torch.tensor([[3, 1, 4, 1, 5]]), sites=[SITE])[SITE][0]
    missed = (x - dictionary.decode(dictionary.encode(x))).square().sum(dim=1) / x.square().sum(dim=1)
    np.testing.assert_allclose(reply.results[0].dictionaries[0].reconstruction_error, missed, rtol=1e-3)
    rows = common_pb2.SparseRows(row_splits=[0, 1], indices=[1], values=[0.5])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.features.DecodeFeatures(pb.DecodeFeaturesRequest(dictionary="skip", features=rows))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "has a skip connection" in (refused.value.details() or "")


async def test_a_transcoder_has_features_but_no_reconstruction_error(served: Served) -> None:
    request = pb.ExtractFeaturesRequest(
        inputs=[common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[3, 1, 4]))], dictionaries=["transcoder"]
    )
    assert len((await served.features.ExtractFeatures(request)).results) == 1
    request.include_reconstruction_error = True
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.features.ExtractFeatures(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "has no reconstruction error" in (refused.value.details() or "")
