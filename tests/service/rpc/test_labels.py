"""Replies that name features have their labels on request, and the fingerprints of their dictionaries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.pb.saeserve.v1 import catalogue_pb2, causal_pb2, common_pb2, intervention_service_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, Served, serve

pytestmark = pytest.mark.any_cpu

TEXT = common_pb2.TextInput(text="Once upon a time")
OTHER = common_pb2.TextInput(text="12 34")
LABELS = {"mid": {feature: f"mid {feature}" for feature in range(0, 96, 2)}, "early": {}}


@pytest.fixture
async def labelled(tmp_path: Path) -> AsyncIterator[Served]:
    """Every other feature of "mid" has a label."""
    async for server in serve(ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path))):
        for feature, text in LABELS["mid"].items():
            request = catalogue_pb2.LabelFeatureRequest(dictionary="mid", feature=feature, text=text)
            await server.catalog.LabelFeature(request)
        yield server


def check(server: Served, labels: object, named: dict[str, set[int]], *, included: bool = True) -> None:
    """The labels of the features that a reply names, once each, and of no others."""
    found = {entry.dictionary: dict(entry.labels) for entry in labels}  # type: ignore[attr-defined]
    assert found == {
        name: {feature: LABELS[name][feature] for feature in features if included and feature in LABELS[name]}
        for name, features in named.items()
    }
    for entry in labels:  # type: ignore[attr-defined]
        assert entry.fingerprint == server.dictionaries[entry.dictionary].fingerprint


@pytest.mark.parametrize("included", [True, False])
async def test_extract(labelled: Served, included: bool) -> None:
    request = feature_pb.ExtractFeaturesRequest(
        inputs=[TEXT, OTHER], dictionaries=["mid", "early"], include_labels=included
    )
    reply = await labelled.features.ExtractFeatures(request)
    named: dict[str, set[int]] = {"mid": set(), "early": set()}
    for entry in (entry for result in reply.results for entry in result.dictionaries):
        named[entry.dictionary].update(entry.features.indices)
        assert entry.fingerprint == labelled.dictionaries[entry.dictionary].fingerprint
    assert named["mid"] & LABELS["mid"].keys()
    check(labelled, reply.labels, named if included else {})


async def test_generate(labelled: Served) -> None:
    """Labels come once, with the first chunk that has the feature."""
    request = intervention_service_pb2.GenerateRequest(
        prompt=TEXT,
        max_new_tokens=12,
        ignore_end_of_text=True,
        samples=2,
        features=intervention_service_pb2.WatchedFeatures(dictionaries=["mid"], prompt=True, include_labels=True),
    )
    seen: set[int] = set()
    async for reply in labelled.interventions.Generate(request):
        here: set[int] = set()
        for entry in (entry for features in reply.chunk.features for entry in features.dictionaries):
            assert entry.fingerprint == labelled.dictionaries["mid"].fingerprint
            here.update(entry.features.indices)
        check(labelled, reply.chunk.labels, {"mid": here - seen} if here - seen else {})
        seen |= here
    assert seen & LABELS["mid"].keys()


@pytest.mark.parametrize("included", [True, False])
async def test_ablate(labelled: Served, included: bool) -> None:
    strongest = causal_pb2.StrongestFeatures(count=6, dictionaries=["mid", "early"])
    request = causal_pb2.AblateFeaturesRequest(inputs=[TEXT], strongest=strongest, include_labels=included)
    reply = await labelled.interventions.AblateFeatures(request)
    check(labelled, reply.labels, grouped(effect.feature for effect in reply.effects), included=included)


@pytest.mark.parametrize("included", [True, False])
async def test_attribute(labelled: Served, included: bool) -> None:
    request = causal_pb2.AttributeFeaturesRequest(
        input=TEXT, dictionaries=["mid", "early"], count=8, include_labels=included
    )
    reply = await labelled.interventions.AttributeFeatures(request)
    check(labelled, reply.labels, grouped(pair.feature for pair in reply.attributions), included=included)


@pytest.mark.parametrize("included", [True, False])
async def test_contrast(labelled: Served, included: bool) -> None:
    request = causal_pb2.ContrastFeaturesRequest(
        a=[TEXT, OTHER], b=[OTHER, TEXT], dictionaries=["mid", "early"], count=8, include_labels=included
    )
    reply = await labelled.interventions.ContrastFeatures(request)
    check(labelled, reply.labels, grouped(feature.feature for feature in reply.features), included=included)


def grouped(features: object) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {"mid": set(), "early": set()}
    for feature in features:  # type: ignore[attr-defined]
        named[feature.dictionary].add(feature.feature)
    return named


async def test_labels_that_cannot_be_read_leave_the_reply_as_it_is(
    labelled: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "labels.sqlite"
    file.write_bytes(b"\xa5" * file.stat().st_size)
    request = feature_pb.ExtractFeaturesRequest(inputs=[TEXT], dictionaries=["mid"], include_labels=True)
    reply = await labelled.features.ExtractFeatures(request)
    assert len(reply.results[0].dictionaries[0].features.indices)
    assert not any(entry.labels for entry in reply.labels)
    assert f"no labels: {file}: " in caplog.text
