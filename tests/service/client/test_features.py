"""What the client says of features is what their catalogue has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.client import AsyncClient, FailedPrecondition, Label, NotFound
from service.client.features import list_features_request
from service.replica import ReplicaSettings
from tests.catalogue_pages import pages
from tests.service.conftest import LIMITS, Served, serve
from tests.service.rpc.catalogue.conftest import with_catalogue

pytestmark = pytest.mark.any_cpu


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Served]:
    settings = ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path / "labels"))
    async for served in serve(settings, dictionaries=with_catalogue(tmp_path / "mid")):
        yield served


@pytest.fixture
async def client(server: Served) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as client:
        yield client


async def test_pages(server: Served, client: AsyncClient) -> None:
    for expected in pages():
        details = await client.get_feature("mid", expected.summary.feature)
        assert details.fingerprint == server.dictionaries["mid"].fingerprint
        page = details.page
        after = {summary.feature: summary.label for summary in (page.summary for page in pages())}
        assert [near.label for near in page.neighbors] == [after.get(expected.summary.feature + 1, ""), ""]
        found = replace(page, neighbors=tuple(replace(near, label="") for near in page.neighbors), contexts=())
        assert found == replace(expected, contexts=())
        for ours, theirs in zip(page.contexts, expected.contexts, strict=True):
            assert replace(ours, activations=()) == replace(theirs, activations=())
            np.testing.assert_allclose(ours.activations, theirs.activations, atol=0.01)
        assert await client.neighbor_features("mid", expected.summary.feature) == page.neighbors


async def test_lists(client: AsyncClient) -> None:
    first = await client.list_features("mid", sort="firing_rate", descending=True, page_size=3)
    rest = await client.list_features("mid", sort="firing_rate", descending=True, page_token=first.next_page_token)
    assert [summary.feature for summary in first.features + rest.features] == [2, 0, 1, 3, 4]
    assert (first.total, rest.total, rest.next_page_token) == (5, 5, "")
    dense = await client.list_features("mid", with_flags=["dense"])
    assert dense.features == (pages()[2].summary,)


async def test_searches(client: AsyncClient) -> None:
    (hit,) = (await client.search_features("spanish")).hits
    assert (hit.dictionary, hit.summary) == ("mid", pages()[0].summary)
    by_text = await client.search_features(fires_on="Once upon", silent_on=["12", "34"], dictionaries="mid", limit=3)
    assert 0 < len(by_text.hits) <= 3
    assert all(hit.activation > 0 for hit in by_text.hits)


async def test_labels(client: AsyncClient) -> None:
    assert await client.label_feature("mid", 0, "Spanish", author="Ada") is None
    replaced = await client.label_feature("mid", 0, "words of Spain")
    assert replaced is not None
    assert replaced == Label("Spanish", "person", author="Ada", created=replaced.created)
    extraction = await client.extract_features("Once upon", ["mid"], features=[0, 1, 2], labels=True)
    assert set(extraction.labels["mid"].values()) <= {"words of Spain", 'token "="'}
    study = await client.ablate_features("Once upon", [("mid", 0), ("mid", 2)], labels=True)
    assert study.labels == {"mid": {0: "words of Spain"}}
    assert list(study.fingerprints) == ["mid"]


async def test_labels_of_watched_features(client: AsyncClient) -> None:
    for feature in range(96):
        await client.label_feature("mid", feature, f"feature {feature}")
    watching = client.generate("Once", features="mid", prompt_features=True, labels=True)
    labels: dict[int, str] = {}
    async for chunk in watching:
        labels |= chunk.labels.get("mid", {})
    shown = {int(f) for tokens in (await watching.result()).features for f in tokens.dictionaries["mid"].indices}
    assert labels == {feature: f"feature {feature}" for feature in shown}


async def test_dictionaries(client: AsyncClient) -> None:
    details = await client.get_dictionary("mid")
    assert details.dictionary.has_catalogue
    assert details.catalogue is not None
    assert (details.catalogue.n_tokens, details.catalogue.figures) == (1_000_000, {"single_token": 0.25})
    assert (await client.get_dictionary("early")).catalogue is None


async def test_errors(client: AsyncClient) -> None:
    with pytest.raises(NotFound):
        await client.get_feature("mid", 96)
    with pytest.raises(FailedPrecondition, match="saeserve catalogue build early"):
        await client.list_features("early")


def test_unknown_names_of_options() -> None:
    with pytest.raises(ValueError, match="sort is 'rate', expected one of feature, firing_rate"):
        list_features_request("mid", sort="rate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with_flags is 'big', expected one of dead"):
        list_features_request("mid", with_flags=["big"])  # type: ignore[list-item]
