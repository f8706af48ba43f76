"""Labels written over the API: validated, shown everywhere, shared by replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.pb.saeserve.v1 import catalog_service_pb2
from service.pb.saeserve.v1 import catalogue_pb2 as pb
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve, served_dictionaries
from tests.service.rpc.reading import failure

pytestmark = pytest.mark.any_cpu


async def write(server: Served, text: str, dictionary: str = "mid", feature: int = 0, **fields: Any) -> Any:
    request = pb.LabelFeatureRequest(dictionary=dictionary, feature=feature, text=text, **fields)
    return await server.catalog.LabelFeature(request)


async def labels(server: Served, feature: int = 0) -> list[tuple[str, str, str]]:
    reply = await server.catalog.GetFeature(pb.GetFeatureRequest(dictionary="mid", feature=feature))
    return [(label.text, label.source, label.author) for label in reply.page.labels]


async def test_a_later_label_wins_and_says_what_it_replaced(catalogued: Served) -> None:
    first = await write(catalogued, "words of Spain", author="Ada")
    assert first.fingerprint == catalogued.dictionaries["mid"].fingerprint
    assert not first.HasField("replaced")
    second = await write(catalogued, "Spanish", author="Bob")
    assert (second.replaced.text, second.replaced.author, second.replaced.source) == ("words of Spain", "Ada", "person")
    rule = ("any token of Spanish text", "rule", "")
    assert await labels(catalogued) == [("Spanish", "person", "Bob"), rule]
    removed = await write(catalogued, "")
    assert removed.replaced.text == "Spanish"
    assert await labels(catalogued) == [rule]
    assert not (await write(catalogued, "")).HasField("replaced")


async def test_a_label_of_a_model(catalogued: Served) -> None:
    await write(catalogued, "Iberian", source="some-model")
    assert await labels(catalogued) == [("any token of Spanish text", "rule", ""), ("Iberian", "some-model", "")]


async def test_replicas_see_each_others_labels(tmp_path: Path) -> None:
    settings = ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path))
    async for one in serve(settings):
        async for other in serve(settings):
            await write(one, "first", "early", 7)
            assert (await write(other, "second", "early", 7)).replaced.text == "first"
            hit = (await one.catalog.SearchFeatures(pb.SearchFeaturesRequest(query="second"))).hits[0]
            assert (hit.dictionary, hit.summary.feature, hit.summary.label) == ("early", 7, "second")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": "x" * 501}, "text"),
        ({"text": "a\nb"}, "text"),
        ({"text": "\x1b[2J"}, "text"),
        ({"text": "a\u202eb"}, "text"),
        ({"text": " "}, "text"),
        ({"text": "x", "source": "rule"}, "source"),
        ({"text": "x", "source": "s" * 101}, "source"),
        ({"text": "x", "author": "a\x00b"}, "author"),
    ],
)
async def test_refused(catalogued: Served, fields: dict[str, str], field: str) -> None:
    failed = await failure(write(catalogued, **fields))  # type: ignore[arg-type]
    assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "{0.__class__}%s", "'; DROP TABLE label; --"])
async def test_text_is_text(catalogued: Served, text: str) -> None:
    await write(catalogued, text)
    assert (await labels(catalogued))[0][0] == text


async def test_labels_of_another_version_are_said_to_be_hidden(tmp_path: Path) -> None:
    settings = ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path))
    async for server in serve(settings):
        await write(server, "of the first", "mid", 1)
    changed = served_dictionaries()
    changed["mid"] = replace(changed["mid"], latent_bias=changed["mid"].latent_bias + 1)
    async for server in serve(settings, dictionaries=changed):
        reply = await server.catalog.GetDictionary(catalog_service_pb2.GetDictionaryRequest(name="mid"))
        assert reply.hidden_labels == 1


async def test_a_broken_file_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "labels.sqlite").write_text("nothing")
    async for server in serve(ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path))):
        assert "is served without written labels" in caplog.text
        failed = await failure(write(server, "x"))
        assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
        assert (tmp_path / "labels.sqlite").read_text() == "nothing"


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async for server in serve(ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path / "file"))):
        assert (await failure(write(server, "x"))).code == grpc.StatusCode.FAILED_PRECONDITION
