"""Labels that people and models wrote, in a file beside the catalogue or elsewhere (`labels.sqlite`).

Several processes may use one file. A write waits for another's to end, and later reads of all processes see it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sae_runtime.catalogue.database import check_version, connect, errors_of
from sae_runtime.catalogue.records import Label, best_first
from sae_runtime.catalogue.schema import LABEL_TABLES, LABELS_APPLICATION_ID, SCHEMA_VERSION, SEARCH_WEIGHTS
from sae_runtime.catalogue.search_query import SearchQuery
from sae_runtime.errors import CatalogueError

MAX_LABEL_CHARACTERS = 500
MAX_NAME_CHARACTERS = 100
"""Of a label's source and author."""

_KIND = "a file of labels"
# Characters that do not show but that words are written with: joiners, and marks of the direction of writing.
_UNSEEN_BUT_ALLOWED = frozenset("\u200c\u200d\u200e\u200f\u061c")
_COLUMNS = "text, source, f1, precision, recall, n_positive, n_negative, author, created"


class LabelStore:
    """The labels of one dictionary, as it is now: those of another fingerprint are kept, but not shown.

    Every method may be called from several threads. All raise CatalogueError, which names the file, if it is damaged.
    """

    def __init__(self, path: Path, dictionary: str, fingerprint: str) -> None:
        """The file at `path` is made by the first write."""
        self.path = path
        self._dictionary = dictionary
        self._fingerprint = fingerprint
        self._db: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def labels_of(self, features: Iterable[int]) -> dict[int, tuple[Label, ...]]:
        """The labels of each of these features that has any, the best first."""
        numbers = json.dumps([int(feature) for feature in features])
        sql = (
            f"SELECT feature, {_COLUMNS} FROM label "
            "WHERE fingerprint = ? AND feature IN (SELECT value FROM json_each(?))"
        )
        labels: dict[int, tuple[Label, ...]] = {}
        for feature, *columns in self._read(sql, self._fingerprint, numbers):
            labels[feature] = (*labels.get(feature, ()), _label(columns))
        return {feature: best_first(several) for feature, several in labels.items()}

    def search(self, text: str, limit: int) -> list[tuple[int, float]]:
        """(feature, score) of labels with all words of a text, by BM25; the last word may be the beginning of one."""
        query = SearchQuery.parse(text)
        if not query.words:
            return []
        sql = (
            f"SELECT feature, -bm25(search, {SEARCH_WEIGHTS[0]}) AS score FROM search JOIN label ON id = search.rowid "
            "WHERE search MATCH ? AND fingerprint = ? ORDER BY score DESC, feature LIMIT ?"
        )
        return [(feature, score) for feature, score in self._read(sql, query.match("AND"), self._fingerprint, limit)]

    def n_hidden(self) -> int:
        """Labels of this dictionary's name with another fingerprint: of an earlier or a later version of it."""
        sql = "SELECT count(*) FROM label WHERE dictionary = ? AND fingerprint <> ?"
        rows = self._read(sql, self._dictionary, self._fingerprint)
        return int(rows[0][0]) if rows else 0

    def write(self, feature: int, label: Label) -> Label | None:
        """Stores a label, with the time; returns the one of the same source that it replaces, if there was one.

        Raises:
            ValueError: the text, source or author is too long, empty, or has control characters; or the source is
                "rule": labels of rules are in the catalogue.
            CatalogueError: the file or its folder cannot be written.
            TimeoutError: another process has been writing all the while.
        """
        text = checked_text(label.text)
        source = checked_text(label.source, "source", MAX_NAME_CHARACTERS)
        author = checked_text(label.author, "author", MAX_NAME_CHARACTERS) if label.author else ""
        if source == "rule":
            raise ValueError('source is "rule", whose labels only a catalogue has')
        row = (
            self._fingerprint,
            self._dictionary,
            feature,
            source,
            text,
            label.f1,
            label.precision,
            label.recall,
            label.n_positive,
            label.n_negative,
            author,
            label.created or datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return self._replace(feature, source, row)

    def remove(self, feature: int, source: str) -> Label | None:
        """Removes a feature's label of a source; returns it, if there was one. Errors as `write`."""
        return self._replace(feature, source, None)

    def _replace(self, feature: int, source: str, row: tuple[Any, ...] | None) -> Label | None:
        try:
            with self._lock, errors_of(self.path, _KIND):
                db = self._open_or_make()
                db.execute("BEGIN IMMEDIATE")
                try:
                    key = (self._fingerprint, feature, source)
                    where = "WHERE fingerprint = ? AND feature = ? AND source = ?"
                    old = db.execute(f"SELECT {_COLUMNS} FROM label {where}", key).fetchone()
                    db.execute(f"DELETE FROM label {where}", key)
                    if row is not None:
                        db.execute(f"INSERT INTO label VALUES (NULL{', ?' * len(row)})", row)
                    db.execute("COMMIT")
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                return None if old is None else _label(old)
        except CatalogueError as error:
            if isinstance(error.__cause__, sqlite3.Error) and error.__cause__.sqlite_errorname == "SQLITE_BUSY":
                raise TimeoutError(f"{self.path}: another process is writing labels") from error
            raise

    # The file

    def _read(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock, errors_of(self.path, _KIND):
            db = self._open()
            return [] if db is None else db.execute(sql, values).fetchall()

    def _open(self) -> sqlite3.Connection | None:
        """None if there is no file yet, or another process is just making it. A read-only file is fine."""
        if self._db is None and self.path.exists():
            db = connect(self.path, "rw")
            try:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    db.close()
                    return None
                check_version(db, self.path, _KIND, LABELS_APPLICATION_ID)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _open_or_make(self) -> sqlite3.Connection:
        if (db := self._open()) is not None:
            return db
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CatalogueError(f"{self.path}: cannot be made: {error}") from error
        db = connect(self.path, "rwc")
        try:
            pragmas = f"PRAGMA application_id = {LABELS_APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
            db.executescript(f"BEGIN IMMEDIATE; {LABEL_TABLES} {pragmas} COMMIT;")
        finally:
            db.close()
        opened = self._open()
        assert opened is not None
        return opened


def checked_text(text: str, field: str = "text", limit: int = MAX_LABEL_CHARACTERS) -> str:
    """A label's text without the white space around it.

    Raises:
        ValueError: it is empty, too long, or has control characters, line breaks or characters that do not show.
    """
    stripped = text.strip(" ")
    if not stripped:
        raise ValueError(f"{field} is empty")
    if len(stripped) > limit:
        raise ValueError(f"{field} has {len(stripped):,} characters, expected at most {limit}")
    for place, char in enumerate(stripped):
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _UNSEEN_BUT_ALLOWED:
            raise ValueError(f"{field} has the control character U+{ord(char):04X} at {place}")
    return stripped


def _label(columns: Iterable[Any]) -> Label:
    text, source, f1, precision, recall, n_positive, n_negative, author, created = columns
    return Label(text, source, f1, precision, recall, n_positive, n_negative, author=author, created=created)
