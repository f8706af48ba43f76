"""FeatureService equals the library, one request at a time and many at once, for dictionaries of every family."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from sae_runtime import SparseFeatures
from sae_runtime.dictionary.features import InputStatistics
from sae_runtime.dictionary.ranking import Ranking, ranking_table
from service.arrays import (
    pack_input_statistics,
    pack_sparse_rows,
    pack_tensor,
    unpack_input_statistics,
    unpack_reconstruction_error,
    unpack_tensor,
)
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.rpc.feature import STREAM_WINDOW
from tests.service.conftest import Served, serve, tight_settings
from tests.service.rpc.conftest import SITE, WIDTH
from tests.service.rpc.reading import dense, failure

TEXTS = ("A short text.", "Zwölf Boxkämpfer 😀 jagen", "x", "To be, or not to be, that is the question.")


def expected_rows(served: Served, name: str, ids: list[int]) -> np.ndarray:
    """Dense features [n tokens, n_latents] from the library alone."""
    return library_features(served, name, ids).to_dense().numpy()


def library_features(served: Served, name: str, ids: list[int]) -> SparseFeatures:
    dictionary = served.dictionaries[name]
    activations = served.backbone.activations(torch.tensor([ids]), sites=[dictionary.site])
    return dictionary.encode(activations[dictionary.site][0])


def text_ids(served: Served, text: str) -> list[int]:
    return served.backbone.encode_text(text).ids


async def test_features_of_texts_and_ids_in_several_dictionaries(served: Served) -> None:
    inputs = [common_pb2.TextInput(text=text) for text in TEXTS]
    inputs.append(common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[5, 6, 7])))
    names = ["mid", "early", "wide", "delta"]
    call = served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            request_id="r-1", inputs=inputs, dictionaries=names, include_tokens=True, include_reconstruction_error=True
        )
    )
    reply = await call

    assert reply.request_id == "r-1"
    assert ("request-id", "r-1") in tuple(await call.trailing_metadata())
    assert 0 <= reply.timing.queue_ms <= reply.timing.total_ms
    assert 0 < reply.timing.compute_ms <= reply.timing.total_ms
    for result, ids in zip(reply.results, [*(text_ids(served, t) for t in TEXTS), [5, 6, 7]], strict=True):
        assert result.n_tokens == len(ids)
        assert [d.dictionary for d in result.dictionaries] == names
        assert list(result.tokens.ids) == ids
        for found in result.dictionaries:
            dictionary = served.dictionaries[found.dictionary]
            features = library_features(served, found.dictionary, ids)
            np.testing.assert_allclose(dense(found.features, dictionary), features.to_dense(), atol=1e-5)
            x = served.backbone.activations(torch.tensor([ids]), sites=[dictionary.site])[dictionary.site][0]
            error = (x - dictionary.decode(features)).square().sum(1) / x.square().sum(1)
            np.testing.assert_allclose(unpack_reconstruction_error(found), error, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "combine"),
    [
        (pb.AGGREGATION_MAX, lambda z: z.max(0)),
        (pb.AGGREGATION_MEAN, lambda z: z.mean(0)),
        (pb.AGGREGATION_SUM, lambda z: z.sum(0)),
        (pb.AGGREGATION_LAST, lambda z: z[-1]),
    ],
)
async def test_aggregation(served: Served, aggregation: pb.Aggregation, combine) -> None:
    reply = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(text=TEXTS[0])], dictionaries=["early"], aggregation=aggregation
        )
    )
    found = dense(reply.results[0].dictionaries[0].features, served.dictionaries["early"])
    expected = combine(expected_rows(served, "early", text_ids(served, TEXTS[0])))
    np.testing.assert_allclose(found, expected[None], atol=1e-5)


@pytest.mark.parametrize(
    ("selection", "keep"),
    [
        (pb.FeatureSelection(top_k=3), lambda z: z >= np.sort(z, axis=1)[:, [-3]]),
        (pb.FeatureSelection(threshold=0.5), lambda z: z > 0.5),
        (
            pb.FeatureSelection(features=pb.FeatureIds(ids=[7, 90, 0])),
            lambda z: np.isin(np.arange(z.shape[1]), [7, 90, 0])[None],
        ),
    ],
)
async def test_selection(served: Served, selection: pb.FeatureSelection, keep) -> None:
    reply = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(text=TEXTS[3])], dictionaries=["wide"], selection=selection
        )
    )
    z = expected_rows(served, "wide", text_ids(served, TEXTS[3]))
    found = dense(reply.results[0].dictionaries[0].features, served.dictionaries["wide"])
    np.testing.assert_allclose(found, z * keep(z), atol=1e-5)


async def test_64_concurrent_requests_of_mixed_length(served: Served) -> None:
    rng = random.Random(3)
    rows = [[rng.randrange(1, 257) for _ in range(rng.choice((1, 3, 17, 40, 96)))] for _ in range(64)]
    names = [rng.choice(sorted(served.dictionaries)) for _ in rows]
    replies = await asyncio.gather(
        *(
            served.features.ExtractFeatures(
                pb.ExtractFeaturesRequest(
                    inputs=[common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=ids))], dictionaries=[name]
                )
            )
            for ids, name in zip(rows, names, strict=True)
        )
    )
    for reply, ids, name in zip(replies, rows, names, strict=True):
        found = dense(reply.results[0].dictionaries[0].features, served.dictionaries[name])
        np.testing.assert_allclose(found, expected_rows(served, name, ids), atol=1e-5)


async def test_stream_answers_in_order_and_ends_with_the_first_error(served: Served) -> None:
    texts = [TEXTS[i % 4] * (1 + i % 2) for i in range(3 * STREAM_WINDOW)]

    def message(i: int, text: str, dictionary: str = "mid") -> pb.ExtractFeaturesStreamRequest:
        return pb.ExtractFeaturesStreamRequest(
            request=pb.ExtractFeaturesRequest(
                request_id=f"s-{i}", inputs=[common_pb2.TextInput(text=text)], dictionaries=[dictionary]
            )
        )

    requests = [message(i, text) for i, text in enumerate(texts)]
    replies = [reply async for reply in served.features.ExtractFeaturesStream(iter(requests))]
    assert [reply.response.request_id for reply in replies] == [f"s-{i}" for i in range(len(texts))]
    for reply, text in zip(replies, texts, strict=True):
        found = dense(reply.response.results[0].dictionaries[0].features, served.dictionaries["mid"])
        np.testing.assert_allclose(found, expected_rows(served, "mid", text_ids(served, text)), atol=1e-5)

    requests[5] = message(5, "x", dictionary="nowhere")
    # Six requests: a grpc.aio client that is still writing when a stream ends reports INTERNAL on its own account.
    call = served.features.ExtractFeaturesStream(iter(requests[:6]))
    seen = [(await call.read()).response.request_id for _ in range(5)]
    assert seen == [f"s-{i}" for i in range(5)]
    assert await call.code() == grpc.StatusCode.NOT_FOUND
    assert ("request-id", "s-5") in tuple(await call.trailing_metadata())


async def test_stream_waits_where_a_call_is_refused() -> None:
    def extract(i: int) -> pb.ExtractFeaturesStreamRequest:
        text = common_pb2.TextInput(text="some text")
        return pb.ExtractFeaturesStreamRequest(
            request=pb.ExtractFeaturesRequest(request_id=f"s-{i}", inputs=[text], dictionaries=["mid"])
        )

    async for served in serve(tight_settings()):
        replies = [reply async for reply in served.features.ExtractFeaturesStream(map(extract, range(40)))]
        assert [reply.response.request_id for reply in replies] == [f"s-{i}" for i in range(40)]


@pytest.mark.parametrize("name", ["mid", "early"])
async def test_encode_and_decode(served: Served, name: str) -> None:
    dictionary = served.dictionaries[name]
    x = 3 * torch.randn(5, dictionary.d_in, generator=torch.Generator().manual_seed(1)) + 1
    encoded = await served.features.EncodeActivations(
        pb.EncodeActivationsRequest(dictionary=name, activations=pack_tensor(x.numpy()))
    )
    features = dictionary.encode(x)
    np.testing.assert_allclose(dense(encoded.features, dictionary), features.to_dense(), atol=1e-5)
    assert encoded.timing.compute_ms > 0
    decoded = await served.features.DecodeFeatures(
        pb.DecodeFeaturesRequest(dictionary=name, features=encoded.features, input_statistics=encoded.input_statistics)
    )
    np.testing.assert_allclose(unpack_tensor(decoded.activations), dictionary.decode(features), atol=1e-4)
    if dictionary.normalizes_input:
        mean, std = unpack_input_statistics(encoded.input_statistics)
        np.testing.assert_allclose(mean, x.mean(1), atol=1e-5)
        np.testing.assert_allclose(std, x.std(1), atol=1e-4)
    else:
        assert not encoded.HasField("input_statistics")


async def test_decode_without_statistics_stays_in_the_normalised_space(served: Served) -> None:
    dictionary = served.dictionaries["mid"]
    rows = pack_sparse_rows(np.array([0, 2, 2]), np.array([9, 4]), np.array([0.5, 2.0]))
    decoded = await served.features.DecodeFeatures(pb.DecodeFeaturesRequest(dictionary="mid", features=rows))
    expected = torch.stack(
        [dictionary.pre_bias + 0.5 * dictionary.decoder[9] + 2 * dictionary.decoder[4], dictionary.pre_bias]
    )
    np.testing.assert_allclose(unpack_tensor(decoded.activations), expected, atol=1e-5)

    moved = await served.features.DecodeFeatures(
        pb.DecodeFeaturesRequest(
            dictionary="mid",
            features=rows,
            input_statistics=pack_input_statistics(np.array([1.0, -1.0]), np.array([2.0, 3.0])),
        )
    )
    statistics = InputStatistics(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [3.0]]))
    expected = expected * statistics.std + statistics.mean
    np.testing.assert_allclose(unpack_tensor(moved.activations), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "convert"),
    [
        (common_pb2.DATA_TYPE_FLOAT16, lambda x: x.half().numpy().tobytes()),
        (common_pb2.DATA_TYPE_BFLOAT16, lambda x: x.bfloat16().view(torch.int16).numpy().tobytes()),
    ],
)
async def test_encode_reads_half_precision(served: Served, dtype: common_pb2.DataType, convert) -> None:
    dictionary = served.dictionaries["early"]
    x = torch.randn(2, dictionary.d_in, generator=torch.Generator().manual_seed(2))
    tensor = common_pb2.Tensor(shape=[2, dictionary.d_in], dtype=dtype, data=convert(x))
    reply = await served.features.EncodeActivations(pb.EncodeActivationsRequest(dictionary="early", activations=tensor))
    rounded = (x.half() if dtype == common_pb2.DATA_TYPE_FLOAT16 else x.bfloat16()).float()
    np.testing.assert_allclose(dense(reply.features, dictionary), dictionary.encode_dense(rounded), atol=1e-5)


@pytest.mark.parametrize("name", ["jumprelu", "gated", "groupmax"])
async def test_encode_and_decode_of_every_family(families: Served, name: str) -> None:
    dictionary = families.dictionaries[name]
    x = 3 * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)) + 1
    encoded = await families.features.EncodeActivations(
        pb.EncodeActivationsRequest(dictionary=name, activations=pack_tensor(x.numpy()))
    )
    features = dictionary.encode(x)
    np.testing.assert_allclose(dense(encoded.features, dictionary), features.to_dense(), atol=1e-4)
    decoded = await families.features.DecodeFeatures(
        pb.DecodeFeaturesRequest(dictionary=name, features=encoded.features, input_statistics=encoded.input_statistics)
    )
    np.testing.assert_allclose(unpack_tensor(decoded.activations), dictionary.decode(features), atol=1e-3)


async def test_a_skip_connection_is_decoded_where_the_input_is_at_hand_only(families: Served) -> None:
    reply = await families.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[3, 1, 4, 1, 5]))],
            dictionaries=["skip"],
            include_reconstruction_error=True,
        )
    )
    dictionary = families.dictionaries["skip"]
    x = families.backbone.activations(torch.tensor([[3, 1, 4, 1, 5]]), sites=[SITE])[SITE][0]
    missed = (x - dictionary.decode(dictionary.encode(x))).square().sum(dim=1) / x.square().sum(dim=1)
    np.testing.assert_allclose(reply.results[0].dictionaries[0].reconstruction_error, missed, rtol=1e-3)
    rows = common_pb2.SparseRows(row_splits=[0, 1], indices=[1], values=[0.5])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await families.features.DecodeFeatures(pb.DecodeFeaturesRequest(dictionary="skip", features=rows))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "has a skip connection" in (refused.value.details() or "")


async def test_a_transcoder_has_features_but_no_reconstruction_error(families: Served) -> None:
    request = pb.ExtractFeaturesRequest(
        inputs=[common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[3, 1, 4]))], dictionaries=["transcoder"]
    )
    assert len((await families.features.ExtractFeatures(request)).results) == 1
    request.include_reconstruction_error = True
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await families.features.ExtractFeatures(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "has no reconstruction error" in (refused.value.details() or "")


# Orders other than by activation


def ranked(served: Served, name: str, ids: list[int], ranking: Ranking, k: int) -> list[list[tuple[int, float]]]:
    """The first k features of every token, from the library's dense features."""
    table = ranking_table(served.dictionaries[name].statistics, ranking)
    rows = []
    for row in expected_rows(served, name, ids):
        active = np.flatnonzero(row)
        order = active[np.argsort(-table.scores(active, row[active]), kind="stable")][:k]
        rows.append([(int(latent), float(row[latent])) for latent in order])
    return rows


@pytest.mark.parametrize("name", ["mid", "early"])
@pytest.mark.parametrize("ranking", ["activation", "surprise", "z_score"])
async def test_the_first_features_of_an_order(served: Served, name: str, ranking: Ranking) -> None:
    """The values are activations in every order."""
    selection = pb.FeatureSelection(top_k=3, rank_by=f"FEATURE_RANKING_{ranking.upper()}")
    reply = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(text=TEXTS[3])], dictionaries=[name], selection=selection
        )
    )
    features = reply.results[0].dictionaries[0].features
    expected = ranked(served, name, text_ids(served, TEXTS[3]), ranking, 3)
    assert list(features.row_splits) == np.cumsum([0, *map(len, expected)]).tolist()
    assert list(features.indices) == [latent for row in expected for latent, _ in row]
    assert list(features.values) == pytest.approx([value for row in expected for _, value in row], rel=1e-4)


async def test_an_order_alone_returns_all_features_in_it(served: Served) -> None:
    request = pb.ExtractFeaturesRequest(
        inputs=[common_pb2.TextInput(text=TEXTS[0])],
        dictionaries=["early"],
        selection=pb.FeatureSelection(rank_by=common_pb2.FEATURE_RANKING_SURPRISE),
    )
    features = (await served.features.ExtractFeatures(request)).results[0].dictionaries[0].features
    expected = ranked(served, "early", text_ids(served, TEXTS[0]), "surprise", 10_000)
    assert list(features.indices) == [latent for row in expected for latent, _ in row]


async def test_an_order_that_needs_statistics(served: Served) -> None:
    request = pb.ExtractFeaturesRequest(
        inputs=[common_pb2.TextInput(text="a")],
        dictionaries=["plain"],
        selection=pb.FeatureSelection(top_k=1, rank_by=common_pb2.FEATURE_RANKING_SURPRISE),
    )
    refused = await failure(served.features.ExtractFeatures(request))
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "FEATURE_RANKING_SURPRISE needs statistics" in refused.message
    request.selection.rank_by = 9  # type: ignore[assignment]
    refused = await failure(served.features.ExtractFeatures(request))
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["selection.rank_by"])


# Activations

SHORT_TEXTS = ("A short text.", "x")


def get_activations(served: Served, *sites: str, **fields: Any) -> Any:
    fields.setdefault("inputs", [common_pb2.TextInput(text=text) for text in SHORT_TEXTS])
    return served.features.GetActivations(pb.GetActivationsRequest(sites=sites, **fields))


async def test_activations_are_those_of_the_backbone(served: Served) -> None:
    """Of every site in one call, in the order of the request, without padding."""
    sites = ["2.resid_delta_attn", "0.resid_post_mlp", "1.mlp_post_act"]
    reply = await get_activations(served, *sites, request_id="a-1", include_tokens=True)
    assert reply.request_id == "a-1"
    for text, result in zip(SHORT_TEXTS, reply.results, strict=True):
        ids = text_ids(served, text)
        expected = served.backbone.activations(torch.tensor([ids]), sites=sites)
        assert (result.n_tokens, list(result.tokens.ids)) == (len(ids), ids)
        assert [entry.site for entry in result.sites] == sites
        for entry in result.sites:
            np.testing.assert_allclose(unpack_tensor(entry.activations), expected[entry.site][0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [
        (common_pb2.DATA_TYPE_UNSPECIFIED, torch.float32),
        (common_pb2.DATA_TYPE_FLOAT16, torch.float16),
        (common_pb2.DATA_TYPE_BFLOAT16, torch.bfloat16),
    ],
)
async def test_activations_in_a_shorter_type(
    served: Served, dtype: common_pb2.DataType, torch_dtype: torch.dtype
) -> None:
    """Rounded as torch rounds."""
    site = "1.resid_post_mlp"
    exact = unpack_tensor((await get_activations(served, site)).results[0].sites[0].activations)
    sent = (await get_activations(served, site, dtype=dtype)).results[0].sites[0].activations
    assert len(sent.data) == exact.size * torch_dtype.itemsize
    np.testing.assert_array_equal(unpack_tensor(sent), torch.from_numpy(exact).to(torch_dtype).float().numpy())


async def test_activations_encode_to_the_features_of_the_text(served: Served) -> None:
    activations = (await get_activations(served, "1.resid_post_mlp")).results[0].sites[0].activations
    encoded = await served.features.EncodeActivations(
        pb.EncodeActivationsRequest(dictionary="mid", activations=activations)
    )
    extracted = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(inputs=[common_pb2.TextInput(text=SHORT_TEXTS[0])], dictionaries=["mid"])
    )
    dictionary = served.dictionaries["mid"]
    np.testing.assert_allclose(
        dense(encoded.features, dictionary),
        dense(extracted.results[0].dictionaries[0].features, dictionary),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("sites", "fields", "field", "described"),
    [
        ([], {}, "sites", "is empty"),
        (["1.resid"], {}, "sites[0]", "resid"),
        (["0.resid_pre", "7.resid_pre"], {}, "sites[1]", "layers 0 to 2"),
        (["0.resid_pre", "0.resid_pre"], {}, "sites[1]", "named twice"),
        (["0.resid_pre"], {"dtype": 9}, "dtype", "9 is not a value"),
        (["0.resid_pre"], {"inputs": []}, "inputs", "is empty"),
        (["0.resid_pre", "1.resid_pre"], {"inputs": [common_pb2.TextInput(text="a" * 40)]}, "inputs", "80 tokens"),
    ],
)
async def test_activations_that_are_refused(
    served: Served, sites: list[str], fields: dict[str, Any], field: str, described: str
) -> None:
    """The limit is max_activation_rows = 64: tokens times sites."""
    refused = await failure(get_activations(served, *sites, **fields))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert field in refused.fields
    assert described in refused.message
