"""Lists and pages of features over the API."""

from __future__ import annotations

import base64
import sqlite3
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from service.pb.saeserve.v1 import catalog_service_pb2, server_service_pb2
from service.pb.saeserve.v1 import catalogue_pb2 as pb
from service.replica import ReplicaSettings
from tests.catalogue_pages import pages
from tests.service.conftest import LIMITS, Served, serve
from tests.service.rpc.catalogue.conftest import with_catalogue
from tests.service.rpc.reading import failure

pytestmark = pytest.mark.any_cpu


async def listed(server: Served, **fields: Any) -> list[int]:
    reply = await server.catalog.ListFeatures(pb.ListFeaturesRequest(dictionary="mid", **fields))
    assert reply.fingerprint == server.dictionaries["mid"].fingerprint
    return [summary.feature for summary in reply.features]


async def test_sorted_and_filtered(catalogued: Served) -> None:
    assert await listed(catalogued) == [0, 1, 2, 3, 4]
    assert await listed(catalogued, sort=pb.FEATURE_SORT_FIRING_RATE, descending=True) == [2, 0, 1, 3, 4]
    assert await listed(catalogued, sort=pb.FEATURE_SORT_LABEL_F1, descending=True, min_label_f1=0.5) == [1, 0, 3]
    assert await listed(catalogued, with_flags=[pb.FEATURE_FLAG_DENSE, pb.FEATURE_FLAG_POSITIONAL]) == [2]
    assert await listed(catalogued, without_flags=[pb.FEATURE_FLAG_DENSE], min_rate=0.005, max_rate=0.01) == [1, 3]
    assert await listed(catalogued, max_rate=0.0) == [4]


@pytest.mark.parametrize("sort", pb.FeatureSort.values())
async def test_every_order_lists_every_feature(catalogued: Served, sort: int) -> None:
    assert sorted(await listed(catalogued, sort=sort)) == [0, 1, 2, 3, 4]


async def test_pages_join_to_the_list(catalogued: Served) -> None:
    request = pb.ListFeaturesRequest(dictionary="mid", sort=pb.FEATURE_SORT_LABEL_F1, page_size=2)
    found = []
    while True:
        reply = await catalogued.catalog.ListFeatures(request)
        assert reply.total == 5
        found.append([summary.feature for summary in reply.features])
        if not reply.next_page_token:
            break
        request.page_token = reply.next_page_token
    assert found == [[3, 0], [1, 2], [4]]


async def test_a_page_past_the_end_is_empty(catalogued: Served) -> None:
    """A token of a list may outlive features: such a page is empty, and the last."""
    reply = await catalogued.catalog.ListFeatures(pb.ListFeaturesRequest(dictionary="mid", page_size=2))
    digest = base64.urlsafe_b64decode(reply.next_page_token).replace(b"[2,", b"[9000,")
    request = pb.ListFeaturesRequest(dictionary="mid", page_token=base64.urlsafe_b64encode(digest).decode())
    past = await catalogued.catalog.ListFeatures(request)
    assert (list(past.features), past.next_page_token, past.total) == ([], "", 5)


@pytest.mark.parametrize(
    "token", ["x", "W10=", "bnVsbA==", "WzAsICJ4Il0=", "WzEsMl0=", "Ww" * 40_000, "ü", base64.b64encode(b"[" * 50_000)]
)
async def test_bad_page_tokens(catalogued: Served, token: Any) -> None:
    failed = await failure(catalogued.catalog.ListFeatures(pb.ListFeaturesRequest(dictionary="mid", page_token=token)))
    assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_token"])


async def test_a_page_token_belongs_to_its_list(catalogued: Served) -> None:
    first = pb.ListFeaturesRequest(dictionary="mid", page_size=2)
    token = (await catalogued.catalog.ListFeatures(first)).next_page_token
    other_size = pb.ListFeaturesRequest(dictionary="mid", page_size=3, page_token=token)
    assert len((await catalogued.catalog.ListFeatures(other_size)).features) == 3
    other_order = pb.ListFeaturesRequest(dictionary="mid", descending=True, page_token=token)
    assert (await failure(catalogued.catalog.ListFeatures(other_order))).fields == ["page_token"]


async def test_a_page_has_all_that_the_catalogue_has(catalogued: Served) -> None:
    reply = await catalogued.catalog.GetFeature(pb.GetFeatureRequest(dictionary="mid", feature=0))
    page, expected = reply.page, pages()[0]
    assert reply.fingerprint == catalogued.dictionaries["mid"].fingerprint
    assert (page.summary.label, page.summary.label_f1) == ("any token of Spanish text", 0.9)
    assert [label.source for label in page.labels] == ["rule"]
    assert page.labels[0].predicate_json == '{"kind": "tokens", "tokens": [1]}'
    assert tuple(page.histogram) == expected.histogram
    assert dict(page.rate_by_kind) == expected.rate_by_kind
    assert [bytes(token.piece) for token in page.active_tokens] == [b" de", b" la"]
    assert page.HasField("ablation_kl")
    assert not page.HasField("output_score")
    (context, short) = page.contexts
    assert b"".join(context.tokens) == "la casa de mi madre está".encode()
    assert context.activations[context.peak] == 2.5
    assert (context.place.source, context.place.record, context.place.position) == ("prose.jsonl", 3, 2)
    assert (short.kind, short.quantile) == ("strongest", -1)


async def test_neighbors_have_their_labels(catalogued: Served) -> None:
    await catalogued.catalog.LabelFeature(pb.LabelFeatureRequest(dictionary="early", feature=5, text="a person's"))
    reply = await catalogued.catalog.NeighborFeatures(pb.NeighborFeaturesRequest(dictionary="mid", feature=0))
    found = [(near.dictionary, near.feature, near.how, near.label) for near in reply.neighbors]
    assert found == [("mid", 1, "decoder", 'token "="'), ("early", 5, "together", "a person's")]
    page = (await catalogued.catalog.GetFeature(pb.GetFeatureRequest(dictionary="mid", feature=0))).page
    assert list(page.neighbors) == list(reply.neighbors)


@pytest.mark.parametrize("feature", [96, 2**32 - 1])
async def test_a_feature_outside_the_dictionary(catalogued: Served, feature: int) -> None:
    for call in (
        catalogued.catalog.GetFeature(pb.GetFeatureRequest(dictionary="mid", feature=feature)),
        catalogued.catalog.NeighborFeatures(pb.NeighborFeaturesRequest(dictionary="mid", feature=feature)),
        catalogued.catalog.LabelFeature(pb.LabelFeatureRequest(dictionary="mid", feature=feature, text="x")),
    ):
        failed = await failure(call)
        assert failed.code == grpc.StatusCode.NOT_FOUND
        assert failed.resources == [("saeserve.v1.Feature", f"mid:{feature}")]


async def test_a_feature_that_the_catalogue_lacks(catalogued: Served) -> None:
    failed = await failure(catalogued.catalog.GetFeature(pb.GetFeatureRequest(dictionary="mid", feature=50)))
    assert failed.code == grpc.StatusCode.NOT_FOUND
    assert "the catalogue of 'mid' has no feature 50" in failed.message


async def test_no_catalogue(catalogued: Served) -> None:
    for call in (
        catalogued.catalog.ListFeatures(pb.ListFeaturesRequest(dictionary="early")),
        catalogued.catalog.GetFeature(pb.GetFeatureRequest(dictionary="early")),
        catalogued.catalog.NeighborFeatures(pb.NeighborFeaturesRequest(dictionary="early")),
        catalogued.catalog.SearchFeatures(pb.SearchFeaturesRequest(query="x", dictionaries=["early"])),
    ):
        failed = await failure(call)
        assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
        assert "`saeserve catalogue build early --data TEXT`" in failed.message
        (violation,) = failed.detail(error_details_pb2.PreconditionFailure).violations
        assert (violation.type, violation.subject) == ("CATALOGUE", "dictionary")


async def test_dictionaries_say_whether_they_have_one(catalogued: Served) -> None:
    reply = await catalogued.catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest())
    assert {d.name: d.has_catalogue for d in reply.dictionaries if d.name in ("mid", "early")} == {
        "mid": True,
        "early": False,
    }
    assert {d.name: d.fingerprint for d in reply.dictionaries} == {
        name: dictionary.fingerprint for name, dictionary in catalogued.dictionaries.items()
    }
    mid = await catalogued.catalog.GetDictionary(catalog_service_pb2.GetDictionaryRequest(name="mid"))
    assert (mid.catalogue.n_tokens, list(mid.catalogue.sources)) == (1_000_000, ["prose.jsonl", "code.jsonl"])
    early = await catalogued.catalog.GetDictionary(catalog_service_pb2.GetDictionaryRequest(name="early"))
    assert not early.HasField("catalogue")


@pytest.mark.parametrize("broken", ["not SQLite", "truncated", "another dictionary's"])
async def test_a_broken_catalogue_does_not_keep_a_dictionary_from_being_served(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    dictionaries = with_catalogue(tmp_path / "mid")
    file = tmp_path / "mid" / "features.sqlite"
    if broken == "not SQLite":
        file.write_text("nothing")
    elif broken == "truncated":
        file.write_bytes(file.read_bytes()[:20_000])
    else:
        with sqlite3.connect(file) as db:
            db.execute("UPDATE metadata SET value = '\"ef\"' WHERE key = 'fingerprint'")
    settings = ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path))
    async for server in serve(settings, dictionaries=dictionaries):
        assert f"dictionary mid is served without its catalogue: {file}: " in caplog.text
        (note,) = (await server.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())).notes
        assert note.startswith("dictionary mid is served without its catalogue: features.sqlite: ")
        failed = await failure(server.catalog.GetFeature(pb.GetFeatureRequest(dictionary="mid")))
        assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
        assert "has a catalogue that cannot be used" in failed.message
        assert str(tmp_path) not in failed.message
        reply = await server.catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest())
        assert not any(d.has_catalogue for d in reply.dictionaries)


async def test_damage_that_shows_later(tmp_path: Path) -> None:
    dictionaries = with_catalogue(tmp_path / "mid")
    with sqlite3.connect(tmp_path / "mid" / "features.sqlite") as db:
        db.execute("UPDATE context SET activations = x'00' WHERE feature = 0")
    settings = ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path))
    async for server in serve(settings, dictionaries=dictionaries):
        failed = await failure(server.catalog.GetFeature(pb.GetFeatureRequest(dictionary="mid")))
        assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
        assert str(tmp_path) not in failed.message
        assert await listed(server) == [0, 1, 2, 3, 4]
