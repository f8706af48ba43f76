"""Labels that people and models wrote: one writer at a time, and text that is only text."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sae_runtime.catalogue import database
from sae_runtime.catalogue.label_store import LabelStore
from sae_runtime.catalogue.records import Label, best_first
from sae_runtime.errors import CatalogueError

FINGERPRINT = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels" / "labels.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[LabelStore]:
    store = LabelStore(path, "mid", FINGERPRINT)
    yield store
    store.close()


def person(text: str, author: str = "") -> Label:
    return Label(text, "person", author=author, created="2026-11-30T12:00:00+00:00")


def test_a_label_is_what_was_written(store: LabelStore, path: Path) -> None:
    assert store.labels_of([1, 2]) == {}
    assert not path.exists()  # reading makes no file
    model = Label(
        "numbers", "some-model", 0.75, 0.5, 1.0, 20, 30, author="prompt 3", created="2026-11-30T13:00:00+00:00"
    )
    assert store.write(1, model) is None
    assert store.write(1, person("counts", "Ada")) is None
    assert store.write(2, replace(model, text="dates")) is None
    assert store.labels_of([1, 2, 3]) == {
        1: (person("counts", "Ada"), model),
        2: (replace(model, text="dates"),),
    }


def test_a_label_without_a_time_gets_one(store: LabelStore) -> None:
    store.write(1, replace(person("x"), created=""))
    assert store.labels_of([1])[1][0].created.endswith("+00:00")


def test_the_later_label_of_a_source_wins(store: LabelStore) -> None:
    store.write(1, person("first", "Ada"))
    assert store.write(1, person("second", "Bob")) == person("first", "Ada")
    assert store.labels_of([1]) == {1: (person("second", "Bob"),)}
    assert store.search("first", 5) == []
    assert [feature for feature, _ in store.search("second", 5)] == [1]


def test_removed(store: LabelStore) -> None:
    store.write(1, person("first"))
    assert store.remove(1, "person") == person("first")
    assert store.remove(1, "person") is None
    assert store.labels_of([1]) == {}
    assert store.search("first", 5) == []


def test_the_best_label_is_first() -> None:
    labels = [Label("a", "x"), Label("b", "rule", 0.6), Label("c", "y", 0.9), Label("d", "person")]
    assert [label.text for label in best_first(labels)] == ["d", "c", "b", "a"]


def test_labels_of_another_version_are_kept_but_not_shown(store: LabelStore, path: Path) -> None:
    store.write(1, person("old"))
    newer = LabelStore(path, "mid", "cd" * 32)
    assert (newer.labels_of([1]), newer.search("old", 5), newer.n_hidden()) == ({}, [], 1)
    newer.write(1, person("new"))
    assert store.labels_of([1]) == {1: (person("old"),)}
    assert LabelStore(path, "other", "ef" * 32).n_hidden() == 0  # of another dictionary in the same file


HOSTILE = [
    "<script>alert(1)</script>", "%s%n{0.__class__}{label}", "'); DROP TABLE label; --", '"quoted" NEAR(a b)', "مرحبا",
    "👩‍👩‍👧",
    "x" * 500,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_text_is_text(store: LabelStore, text: str) -> None:
    store.write(1, person(text))
    assert store.labels_of([1])[1][0].text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text is empty"),
        ("  ", "text is empty"),
        ("x" * 501, "text has 501 characters, expected at most 500"),
        ("a\nb", r"text has the control character U\+000A at 1"),
        ("a\x00b", r"U\+0000 at 1"),
        ("\x1b[2Jgone", r"U\+001B at 0"),
        ("safe\u202egnp", r"U\+202E at 4"),
        ("a\u2028b", r"U\+2028 at 1"),
        ("a\ud800", r"U\+D800 at 1"),
    ],
)
def test_refused_text(store: LabelStore, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.write(1, person(text))
    assert store.labels_of([1]) == {}


def test_refused_sources_and_authors(store: LabelStore) -> None:
    with pytest.raises(ValueError, match="source is empty"):
        store.write(1, Label("x", ""))
    with pytest.raises(ValueError, match='source is "rule"'):
        store.write(1, Label("x", "rule"))
    with pytest.raises(ValueError, match="author has 101 characters"):
        store.write(1, person("x", "A" * 101))


def write_many(path: Path, worker: int) -> None:
    store = LabelStore(path, "mid", FINGERPRINT)
    for feature in range(20):
        store.write(feature, person(f"of worker {worker}"))


def test_processes_take_turns(store: LabelStore, path: Path) -> None:
    """Four processes make the file and write at once: every label is there, once, and the index agrees."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(path, worker)) for worker in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    labels = store.labels_of(range(30))
    assert sorted(labels) == list(range(20))
    assert all(len(several) == 1 for several in labels.values())
    assert len(store.search("worker", 100)) == 20
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO search (search) VALUES ('integrity-check')")


def test_another_writer_for_too_long(store: LabelStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(1, person("first"))
    store.close()
    real = database.connect
    monkeypatch.setattr("sae_runtime.catalogue.label_store.connect", lambda *a: real(*a, timeout_s=0))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TimeoutError, match=r"labels\.sqlite: another process is writing labels"):
        store.write(1, person("second"))
    assert store.labels_of([1]) == {1: (person("first"),)}  # reading goes on
    other.execute("ROLLBACK")
    assert store.write(1, person("second")) == person("first")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = LabelStore(tmp_path / "file" / "labels.sqlite", "mid", FINGERPRINT)
    with pytest.raises(CatalogueError, match=r"labels\.sqlite: cannot be made"):
        store.write(1, person("x"))
    assert store.labels_of([1]) == {}


@pytest.mark.parametrize("what", ["text", "truncated", "another application's"])
def test_broken_files(store: LabelStore, path: Path, what: str) -> None:
    store.write(1, person("first"))
    store.close()
    if what == "text":
        path.write_text("feature,label\n1,first\n" * 100)
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA application_id = 1")
    before = path.read_bytes()
    with pytest.raises(CatalogueError, match=r"labels\.sqlite: "):
        store.labels_of([1])
    with pytest.raises(CatalogueError, match=r"labels\.sqlite: "):
        store.write(1, person("second"))
    assert path.read_bytes() == before
