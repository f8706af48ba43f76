"""Searches by words and by texts."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
import torch

from service.pb.saeserve.v1 import catalogue_pb2 as pb
from service.pb.saeserve.v1 import common_pb2
from tests.sae_runtime.catalogue.test_search_query import HOSTILE
from tests.service.conftest import Served
from tests.service.rpc.reading import failure


async def search(server: Served, **fields: Any) -> pb.SearchFeaturesResponse:
    return await server.catalog.SearchFeatures(pb.SearchFeaturesRequest(**fields))


def names(reply: pb.SearchFeaturesResponse) -> list[tuple[str, int]]:
    return [(hit.dictionary, hit.summary.feature) for hit in reply.hits]


async def test_words(catalogued: Served) -> None:
    reply = await search(catalogued, query="spanish")
    assert names(reply) == [("mid", 0)]
    assert reply.hits[0].summary.label == "any token of Spanish text"
    assert reply.hits[0].fingerprint == catalogued.dictionaries["mid"].fingerprint
    assert set(reply.without_catalogue) == set(catalogued.dictionaries) - {"mid"}
    assert names(await search(catalogued, query="=")) == [("mid", 1), ("mid", 2), ("mid", 3)]
    assert names(await search(catalogued, query="=", limit=1)) == [("mid", 1)]
    assert names(await search(catalogued, query="nowhere", dictionaries=["mid"])) == []


async def test_written_labels_of_a_dictionary_without_a_catalogue(catalogued: Served) -> None:
    await catalogued.catalog.LabelFeature(pb.LabelFeatureRequest(dictionary="early", feature=7, text="Spanish too"))
    reply = await search(catalogued, query="spanish", dictionaries=["early"])
    assert names(reply) == [("early", 7)]
    assert list(reply.without_catalogue) == ["early"]
    assert set(names(await search(catalogued, query="spanish"))) == {("mid", 0), ("early", 7)}


@pytest.mark.parametrize(
    "query", [text for text in HOSTILE if text and "\ud800" not in text], ids=lambda t: repr(t[:9])
)
async def test_hostile_words(catalogued: Served, query: str) -> None:
    """Found or not found; too many bytes are refused with the limit."""
    call = search(catalogued, query=query, dictionaries=["mid"])
    if len(query.encode()) > 600:
        failed = await failure(call)
        assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["query"])
        assert "max_text_bytes" in failed.message
    else:
        assert len((await call).hits) <= 20


def texts(*contents: str) -> list[common_pb2.TextInput]:
    return [common_pb2.TextInput(text=content) for content in contents]


@pytest.mark.parametrize("silent", [[], ["Another"], ["Another", "and more"]])
async def test_texts(catalogued: Served, silent: list[str]) -> None:
    """Against the dictionaries applied to the backbone's activations, one text and one feature at a time."""
    fires = ["Once upon", "a time"]
    expected = {}
    for name in ("mid", "early", "plain"):
        dictionary = catalogued.dictionaries[name]

        def largest(text: str, dictionary: Any = dictionary) -> Any:
            ids = torch.tensor([catalogued.backbone.encode_text(text).ids])
            acts = catalogued.backbone.activations(ids, sites=[dictionary.site])[dictionary.site][0]
            return dictionary.encode_dense(acts).max(0).values.double()

        on, off = [largest(text) for text in fires], [largest(text) for text in silent]
        for feature in range(96):
            if all(values[feature] > 0 for values in on) and not any(values[feature] > 0 for values in off):
                activation = float(sum(values[feature] for values in on)) / 2
                surprise = 1.0
                if dictionary.statistics is not None:  # of 1,000 tokens; rates have a floor of 10 firings
                    surprise = -np.log10(max(0.01, float(dictionary.statistics.firing_rate[feature])))
                expected[name, feature] = activation, activation * surprise
    reply = await search(
        catalogued,
        fires_on=texts(*fires),
        silent_on=texts(*silent),
        dictionaries=["mid", "early", "plain"],
        limit=500,
    )
    assert expected
    found = {(hit.dictionary, hit.summary.feature): (hit.activation, hit.score) for hit in reply.hits}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-4, atol=1e-5)
    scores = [hit.score for hit in reply.hits]
    assert scores == sorted(scores, reverse=True)


async def test_hits_of_texts_have_labels(catalogued: Served) -> None:
    reply = await search(catalogued, fires_on=texts("Once upon a time, and then"), dictionaries=["mid"], limit=96)
    for hit in reply.hits:
        assert bool(hit.summary.label) == (hit.summary.feature in (0, 1, 3))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "query"),
        ({"silent_on": texts("a")}, "query"),
        ({"query": "a", "fires_on": texts("a")}, "query"),
        ({"query": "a", "silent_on": texts("a")}, "query"),
        ({"fires_on": texts("")}, "fires_on[0].text"),
        ({"fires_on": texts("a"), "silent_on": texts("b" * 601)}, "silent_on[0].text"),
        ({"fires_on": texts(*["a"] * 81)}, "fires_on"),
        ({"query": "a", "dictionaries": ["mid", "mid"]}, "dictionaries[1]"),
        ({"query": "a", "dictionaries": [""]}, "dictionaries[0]"),
        ({"fires_on": texts("a"), "overflow": 9}, "overflow"),
    ],
)
async def test_refused(catalogued: Served, fields: dict[str, Any], field: str) -> None:
    failed = await failure(search(catalogued, **fields))
    assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
    assert field in failed.fields


async def test_an_unknown_dictionary(catalogued: Served) -> None:
    failed = await failure(search(catalogued, query="a", dictionaries=["nowhere"]))
    assert failed.code == grpc.StatusCode.NOT_FOUND
