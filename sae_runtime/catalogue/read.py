"""Reads a catalogue: pages, lists and searches of the features of one dictionary."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from sae_runtime.catalogue.database import check_version, connect, errors_of
from sae_runtime.catalogue.read_page import read_neighbors, read_page, read_summaries
from sae_runtime.catalogue.records import (
    FLAGS,
    SORTS,
    CatalogueInfo,
    FeatureFilter,
    FeaturePage,
    FeatureSummary,
    Neighbor,
    SearchHit,
    Sort,
)
from sae_runtime.catalogue.schema import APPLICATION_ID, SEARCH_WEIGHTS
from sae_runtime.catalogue.search_query import SearchQuery
from sae_runtime.errors import CatalogueError

_KIND = "a catalogue of features"
_PROMOTED_SHARE = 0.1
"""What the first token of those that a feature promotes counts in a search, as a share of firings on it."""

_COMBINED = 1_000
"""Features with the words, and features with the symbols, that are looked through for those with both."""

Rows = list[tuple[Any, ...]]


class Catalogue:
    """A catalogue's file, open for reading. Every method may be called from several threads; they take turns.

    All methods raise CatalogueError, which names the file, where it is damaged.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, info: CatalogueInfo) -> None:
        self.path = path
        self.info = info
        self._db = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, fingerprint: str | None = None) -> Self:
        """Opens the file at `path`, which must not change while it is open (it may be replaced).

        Args:
            fingerprint: of the dictionary; the catalogue must have been made for it.

        Raises:
            CatalogueError: there is no file; it is no SQLite file, truncated, of another application, of a newer schema
                version, or of another dictionary.
        """
        if not path.is_file():
            raise CatalogueError(f"{path}: no such file, expected {_KIND}")
        with errors_of(path, _KIND):
            connection = connect(path, "ro&immutable=1")
            try:
                check_version(connection, path, _KIND, APPLICATION_ID)
                _check_size(connection, path)
                values = {key: json.loads(value) for key, value in connection.execute("SELECT * FROM metadata")}
                info = CatalogueInfo(**values | {"sources": tuple(values["sources"])})
                if fingerprint is not None and info.fingerprint != fingerprint:
                    raise CatalogueError(
                        f"{path}: was made for dictionary {info.dictionary!r} with fingerprint {info.fingerprint}, "
                        f"the dictionary beside it has {fingerprint}; build the catalogue again"
                    )
            except BaseException:
                connection.close()
                raise
        return cls(path, connection, info)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def page(self, feature: int) -> FeaturePage | None:
        """All that is known of a feature; None if the catalogue has no such feature."""
        with self._lock, errors_of(self.path, _KIND):
            return read_page(self._db, feature)

    def summaries(
        self,
        chosen: FeatureFilter = FeatureFilter(),  # noqa: B008  # immutable
        *,
        sort: Sort = "feature",
        descending: bool = False,
        offset: int = 0,
        limit: int = 100,
    ) -> tuple[FeatureSummary, ...]:
        """The features that a filter lets through, from `offset` on; past the end there are none.

        Equal ones are in the order of their numbers, and those without the figure come last. ValueError: unknown sort.
        """
        if sort not in SORTS:
            raise ValueError(f"sort is {sort!r}, expected one of {', '.join(SORTS)}")
        where, values = _condition(chosen)
        order = f"{sort} {'DESC' if descending else 'ASC'} NULLS LAST, feature"
        sql = f"SELECT feature FROM feature INDEXED BY figures WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?"
        with self._lock, errors_of(self.path, _KIND):
            return self._summaries_of([feature for (feature,) in self._query(sql, *values, limit, offset)])

    def count(self, chosen: FeatureFilter) -> int:
        """The number of features that a filter lets through."""
        where, values = _condition(chosen)
        with self._lock, errors_of(self.path, _KIND):
            return int(self._query(f"SELECT count(*) FROM feature INDEXED BY figures WHERE {where}", *values)[0][0])

    def summaries_of(self, features: Iterable[int]) -> tuple[FeatureSummary, ...]:
        """The summaries of these features, in their order; unknown ones are left out."""
        wanted = list(features)
        with self._lock, errors_of(self.path, _KIND):
            return self._summaries_of(wanted)

    def neighbors(self, feature: int) -> tuple[Neighbor, ...]:
        """The features near one, in its page's order."""
        with self._lock, errors_of(self.path, _KIND):
            return read_neighbors(self._db, feature)

    def search(self, text: str, limit: int = 20) -> tuple[SearchHit, ...]:
        """The features whose labels, tokens or contexts have the words of a text, the best first.

        All should occur; if they nowhere do together, any of them. Contexts are searched where labels and tokens do not
        fill the limit, and then also words that begin with the last one. A symbol, such as "=" or "{", means the token
        that is just this symbol.
        """
        query = SearchQuery.parse(text)
        most = max(limit, _COMBINED) if query.words and query.symbols else limit
        with self._lock, errors_of(self.path, _KIND):
            words, symbols = self._with_words(query, most), self._with_symbols(query, most)
            together = words.keys() & symbols.keys() or words.keys() | symbols.keys()
            scores = {feature: words.get(feature, 0.0) + symbols.get(feature, 0.0) for feature in together}
            best = sorted(scores, key=lambda feature: (-scores[feature], feature))[:limit]
            return tuple(SearchHit(summary, scores[summary.feature]) for summary in self._summaries_of(best))

    def _with_words(self, query: SearchQuery, limit: int) -> dict[int, float]:
        """Scores by BM25."""
        if not query.words:
            return {}
        scores = self._matches(query.match("AND", prefix=False), limit)
        if len(scores) < limit and query.ends_with_word:
            scores = self._matches(query.match("AND"), limit) | scores
        if not scores and len(query.words) > 1:
            scores = self._matches(query.match("OR"), limit)
        return scores

    def _matches(self, expression: str, limit: int) -> dict[int, float]:
        scores: dict[int, float] = {}
        *of_labels, of_contexts = SEARCH_WEIGHTS
        for table, weights in (("search", of_labels), ("search_context", [of_contexts])):
            if len(scores) < limit:
                score = f"-bm25({table}, {', '.join(map(str, weights))})"
                sql = f"SELECT rowid, {score} FROM {table} WHERE {table} MATCH ? ORDER BY 2 DESC LIMIT ?"
                for feature, value in self._query(sql, expression, limit):
                    scores[feature] = scores.get(feature, 0.0) + value
        return scores

    def _with_symbols(self, query: SearchQuery, limit: int) -> dict[int, float]:
        """Scores: the share of a feature's firings that are on the symbols, weighted as tokens are."""
        if not query.symbols:
            return {}
        marks = ", ".join("?" * len(query.pieces))
        sql = f"""
            SELECT feature, {SEARCH_WEIGHTS[1]} * sum(
                CASE list WHEN 'active' THEN CAST(count AS REAL) / max(n_firings, 1)
                ELSE {_PROMOTED_SHARE} / (1 + rank) END
            ) AS score
            FROM feature_token JOIN feature INDEXED BY figures USING (feature)
            WHERE list <> 'suppressed' AND piece IN (SELECT id FROM piece WHERE bytes IN ({marks}))
            GROUP BY feature ORDER BY score DESC, feature LIMIT ?
        """
        return dict(self._query(sql, *query.pieces, limit))

    def _query(self, sql: str, *values: object) -> Rows:
        return self._db.execute(sql, values).fetchall()

    def _summaries_of(self, features: Sequence[int]) -> tuple[FeatureSummary, ...]:
        """In the order of `features`. The caller holds the lock."""
        numbers = json.dumps([int(feature) for feature in features])
        found = read_summaries(self._db, "WHERE feature IN (SELECT value FROM json_each(?))", numbers)
        by_number = {summary.feature: summary for summary in found}
        return tuple(by_number[feature] for feature in features if feature in by_number)


def _check_size(connection: sqlite3.Connection, path: Path) -> None:
    """CatalogueError if the file's end is missing: SQLite would notice only when it reads that far."""
    (pages,), (page_bytes,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    if (size := path.stat().st_size) < pages * page_bytes:
        raise CatalogueError(f"{path}: is truncated: found {size:,} bytes, expected {pages * page_bytes:,}")


def _condition(chosen: FeatureFilter) -> tuple[str, list[float]]:
    """An SQL condition on rows of `feature`, and its values."""
    have, lack = (
        sum(1 << FLAGS.index(flag) for flag in set(flags)) for flags in (chosen.with_flags, chosen.without_flags)
    )
    condition = "flags & ? = ? AND flags & ? = 0 AND firing_rate BETWEEN ? AND ?"
    values: list[float] = [have, have, lack, chosen.min_rate, chosen.max_rate]
    if chosen.min_f1 > 0:
        condition += " AND label_f1 >= ?"
        values.append(chosen.min_f1)
    return condition, values
