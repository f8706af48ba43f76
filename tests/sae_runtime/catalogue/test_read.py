"""Lists and searches of a catalogue, and files that are not what they should be."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from sae_runtime.catalogue.read import Catalogue
from sae_runtime.catalogue.records import SORTS, FeatureFilter, Sort
from sae_runtime.catalogue.write import write_catalogue
from sae_runtime.errors import CatalogueError
from tests.catalogue_pages import FINGERPRINT, catalogue_info, context, page, pages, write_pages


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_pages(tmp_path)


@pytest.fixture
def catalogue(path: Path) -> Catalogue:
    return Catalogue.open(path, FINGERPRINT)


ALL = FeatureFilter()


def listed(catalogue: Catalogue, chosen: FeatureFilter = ALL, **options: object) -> list[int]:
    return [summary.feature for summary in catalogue.summaries(chosen, **options)]  # type: ignore[arg-type]


def hits(catalogue: Catalogue, text: str, limit: int = 20) -> list[int]:
    return [hit.summary.feature for hit in catalogue.search(text, limit)]


# Lists


@pytest.mark.parametrize(
    ("sort", "descending", "expected"),
    [
        ("feature", False, [0, 1, 2, 3, 4]),
        ("feature", True, [4, 3, 2, 1, 0]),
        ("firing_rate", True, [2, 0, 1, 3, 4]),
        ("label_f1", True, [1, 0, 3, 2, 4]),  # those without a label last
        ("label_f1", False, [3, 0, 1, 2, 4]),  # also in this order
    ],
)
def test_sorted(catalogue: Catalogue, sort: Sort, descending: bool, expected: list[int]) -> None:
    assert listed(catalogue, sort=sort, descending=descending) == expected


@pytest.mark.parametrize("sort", SORTS)
def test_all_orders_list_all_features(catalogue: Catalogue, sort: Sort) -> None:
    assert sorted(listed(catalogue, sort=sort)) == [0, 1, 2, 3, 4]


def test_an_unknown_order(catalogue: Catalogue) -> None:
    with pytest.raises(ValueError, match=r"sort is 'feature; DROP TABLE feature', expected one of feature,"):
        listed(catalogue, sort="feature; DROP TABLE feature")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (FeatureFilter(with_flags=("dense",)), [2]),
        (FeatureFilter(with_flags=("dense", "dead")), []),
        (FeatureFilter(without_flags=("dense", "dead")), [0, 1, 3]),
        (FeatureFilter(min_rate=0.01), [0, 1, 2]),
        (FeatureFilter(max_rate=0.005), [3, 4]),
        (FeatureFilter(min_f1=0.9), [0, 1]),
    ],
)
def test_filtered(catalogue: Catalogue, chosen: FeatureFilter, expected: list[int]) -> None:
    assert listed(catalogue, chosen) == expected
    assert catalogue.count(chosen) == len(expected)


def test_paged(catalogue: Catalogue) -> None:
    assert listed(catalogue, offset=3, limit=1) == [3]
    assert listed(catalogue, offset=5) == []
    assert listed(catalogue, offset=2**62) == []


def test_summaries_of_features_keep_their_order(catalogue: Catalogue) -> None:
    expected = [pages()[i].summary for i in (3, 0)]
    assert list(catalogue.summaries_of([3, 77, 0])) == expected
    assert catalogue.labels_of([3, 77, 2, 0]) == {3: "Python keywords", 0: "any token of Spanish text"}
    assert catalogue.neighbors(3) == pages()[3].neighbors


# Searches


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("spanish", [0]),
        ("SPANISH TEXT", [0]),
        ("span", [0]),
        ("madre", [0]),  # in a context
        ("return", [3]),  # a token
        ("python spanish", [0, 3]),  # nowhere together: those with any of them
        ("spanish nothing", [0]),
        ("nowhere", []),
        ("", []),
    ],
)
def test_words(catalogue: Catalogue, text: str, expected: list[int]) -> None:
    assert sorted(hits(catalogue, text)) == expected


def test_a_symbol_is_a_token(catalogue: Catalogue) -> None:
    """By the share of firings that are on it: all of 1, half of 2. Feature 3 only promotes it."""
    assert hits(catalogue, "=") == [1, 2, 3]
    assert hits(catalogue, "{") == [3]
    assert hits(catalogue, "==") == []
    assert hits(catalogue, "python =") == [3]  # the one with both
    assert hits(catalogue, "spanish =") == [1, 2, 0, 3]


def test_labels_count_more_than_contexts(tmp_path: Path) -> None:
    write_catalogue(
        tmp_path / "c",
        catalogue_info(),
        [
            page(0, contexts=[context("a whale", [0, 1.0])]),
            page(1, active=[" whale"]),
            page(2, "token whale"),
            *(page(i) for i in range(3, 30)),
        ],
    )
    assert hits(Catalogue.open(tmp_path / "c"), "whale") == [2, 1, 0]
    assert hits(Catalogue.open(tmp_path / "c"), "whale", limit=2) == [2, 1]


def test_searches_from_several_threads(catalogue: Catalogue) -> None:
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(hits(catalogue, "spanish"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0]] * 8


# Files


def refusal(path: Path, fingerprint: str | None = FINGERPRINT) -> str:
    with pytest.raises(CatalogueError) as raised:
        Catalogue.open(path, fingerprint)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    return message


def test_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "features.sqlite").endswith("no such file, expected a catalogue of features")
    assert "no such file" in refusal(tmp_path)


def test_not_sqlite(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 100)
    assert "file is not a database" in refusal(path)


def test_empty(path: Path) -> None:
    path.write_bytes(b"")
    assert "another application's SQLite file" in refusal(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    message = refusal(path)
    assert "is truncated: found" in message or "cannot be read as a catalogue of features" in message


def test_damaged_inside(path: Path) -> None:
    """The damage shows when a page is read, and names the file."""
    data = bytearray(path.read_bytes())
    with sqlite3.connect(path) as db:
        (page_size,) = db.execute("PRAGMA page_size").fetchone()
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'context'").fetchone()
    data[(root - 1) * page_size : root * page_size] = b"\xa5" * page_size
    path.write_bytes(data)
    with pytest.raises(CatalogueError, match=r"features\.sqlite: cannot be read as a catalogue of features"):
        Catalogue.open(path).page(0)


def test_contents_that_do_not_fit(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE context SET activations = x'00' WHERE feature = 0")
    with pytest.raises(CatalogueError, match="a context has 6 tokens and 1 activations"):
        Catalogue.open(path).page(0)


def test_another_application(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA application_id = 1")
    assert "another application's SQLite file" in refusal(path)


def test_a_newer_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    assert "has schema version 99, this saeserve reads up to 1; upgrade it" in refusal(path)


def test_another_dictionary(path: Path) -> None:
    message = refusal(path, "ef" * 32)
    assert FINGERPRINT in message
    assert "ef" * 32 in message
    assert Catalogue.open(path).info.fingerprint == FINGERPRINT  # whoever does not ask may read it


def test_reading_changes_nothing(path: Path, catalogue: Catalogue) -> None:
    """Also in a folder that cannot be written: no journal, no lock."""
    before = path.read_bytes()
    catalogue.search("spanish")
    catalogue.close()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
