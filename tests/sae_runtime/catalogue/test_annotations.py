"""A catalogue and the labels written since, seen as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sae_runtime.catalogue.annotations import Annotations
from sae_runtime.catalogue.label_store import LabelStore
from sae_runtime.catalogue.read import Catalogue
from sae_runtime.catalogue.records import FeatureFilter, Label
from tests.builders import random_dictionary
from tests.catalogue_pages import FINGERPRINT, pages, write_pages

DICTIONARY = random_dictionary("1.resid_post_mlp", 32, k=8, normalize=True, seed=2)


@pytest.fixture
def written(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path / "labels.sqlite", "mid", FINGERPRINT)


@pytest.fixture
def annotations(tmp_path: Path, written: LabelStore) -> Annotations:
    return Annotations(DICTIONARY, Catalogue.open(write_pages(tmp_path)), written)


def test_a_person_stands_before_a_rule_and_a_better_model_too(annotations: Annotations, written: LabelStore) -> None:
    written.write(0, Label("words of Spain", "person"))
    written.write(1, Label("equals", "some-model", 0.5))
    written.write(2, Label("commas", "some-model", 0.8))
    shown = [(s.label, s.label_source, s.label_f1) for s in annotations.summaries_of([0, 1, 2])]
    assert shown == [("words of Spain", "person", None), ('token "="', "rule", 0.95), ("commas", "some-model", 0.8)]
    page = annotations.page(0)
    assert page is not None
    assert [label.text for label in page.labels] == ["words of Spain", "any token of Spanish text"]
    assert page.summary == annotations.summaries_of([0])[0]
    assert annotations.labels_of([0, 3, 4]) == {0: "words of Spain", 3: "Python keywords"}
    listed = annotations.summaries(FeatureFilter(), sort="feature", descending=False, offset=0, limit=2)
    assert listed == annotations.summaries_of([0, 1])


def test_search_sees_both(annotations: Annotations, written: LabelStore) -> None:
    written.write(4, Label("Spanish verbs", "person"))
    written.write(3, Label("keywords", "person"))
    assert [hit.summary.feature for hit in annotations.search("spanish", 5)] == [4, 0], (
        "what somebody wrote comes first"
    )
    (hit,) = annotations.search("keywords", 5)
    assert hit.summary.label == "keywords"
    assert [hit.summary.feature for hit in annotations.search("spanish", 1)] == [4]


def test_without_a_catalogue(written: LabelStore) -> None:
    """Written labels are there, and the figures of the statistics."""
    written.write(4, Label("Spanish verbs", "person"))
    annotations = Annotations(DICTIONARY, None, written)
    assert annotations.page(4) is None
    (hit,) = annotations.search("spanish", 5)
    assert DICTIONARY.statistics is not None
    assert hit.summary.firing_rate == DICTIONARY.statistics.firing_rate[4]
    bare = Annotations(replace(DICTIONARY, statistics=None), None, written).summaries_of([4, 7])
    assert [(s.label, s.firing_rate) for s in bare] == [("Spanish verbs", 0.0), ("", 0.0)]


def test_a_feature_that_the_catalogue_lacks(annotations: Annotations) -> None:
    known, bare = annotations.summaries_of([0, 90])
    assert known == pages()[0].summary
    assert (bare.feature, bare.label) == (90, "")
