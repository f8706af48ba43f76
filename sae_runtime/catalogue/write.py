"""Writes a catalogue: pages come one by one, and the file appears complete or not at all."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sae_runtime.atomic import atomic_file
from sae_runtime.catalogue.records import FLAGS, CatalogueInfo, Context, FeaturePage
from sae_runtime.catalogue.schema import APPLICATION_ID, INDEXES, PAGE_BYTES, SCHEMA_VERSION, TABLES

ACTIVATION_STEPS = 255
SEARCHED_CONTEXTS = 8
"""How many of a page's strongest contexts are searched."""
SEARCHED_BEFORE, SEARCHED_AFTER = 8, 4
"""Tokens around the peak of a context that are searched."""


def write_catalogue(path: Path, info: CatalogueInfo, pages: Iterable[FeaturePage]) -> None:
    """Writes the pages of a dictionary's features, in any order, to a new file at `path`; replaces what is there.

    Holds one page at a time. After an error, also one of `pages`, what was at `path` is as it was.

    Raises:
        ValueError: two pages of one feature, or a feature outside the dictionary.
        OSError: the file cannot be written.
    """
    with atomic_file(path) as file:
        connection = sqlite3.connect(file.name, isolation_level=None)
        try:
            # Until it is renamed nobody else reads the file: after a crash it is written again.
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.executescript(TABLES)
            connection.execute("BEGIN")
            _Writer(connection, info).write(pages)
            connection.execute("COMMIT")
            connection.executescript(INDEXES)
            connection.execute("INSERT INTO search (search) VALUES ('optimize')")
        except sqlite3.OperationalError as error:  # such as a full disk
            raise OSError(f"{path}: cannot be written: {error}") from error
        finally:
            connection.close()


class _Writer:
    """Fills the tables of a new catalogue."""

    def __init__(self, connection: sqlite3.Connection, info: CatalogueInfo) -> None:
        self._db = connection
        self._n_latents = info.n_latents
        self._pieces: dict[bytes, int] = {}
        self._sources: dict[str, int] = {}
        facts = [(key, json.dumps(value, allow_nan=False)) for key, value in asdict(info).items()]
        connection.executemany("INSERT INTO metadata VALUES (?, ?)", facts)

    def write(self, pages: Iterable[FeaturePage]) -> None:
        for page in pages:
            feature = page.summary.feature
            if not 0 <= feature < self._n_latents:
                raise ValueError(f"a page of feature {feature}, which is outside 0..{self._n_latents - 1}")
            try:
                self._write_feature(page)
            except sqlite3.IntegrityError as error:
                raise ValueError(f"two pages of feature {feature}") from error
            self._write_tokens(page)
            self._write_contexts(page)
            self._write_labels(page)
            self._insert(
                "neighbor",
                [
                    (feature, rank, near.how, near.dictionary, near.feature, near.score)
                    for rank, near in enumerate(page.neighbors)
                ],
            )
            self._db.execute(
                "INSERT INTO search (rowid, label, tokens, contexts) VALUES (?, ?, ?, ?)",
                (feature, *searched_texts(page)),
            )
        self._insert("piece", [(number, piece) for piece, number in self._pieces.items()])
        self._insert("source", [(number, name) for name, number in self._sources.items()])

    def _write_feature(self, page: FeaturePage) -> None:
        summary = page.summary
        self._insert(
            "feature",
            [
                (
                    summary.feature,
                    summary.label,
                    summary.label_source,
                    summary.label_f1,
                    summary.firing_rate,
                    page.document_rate,
                    page.n_firings,
                    summary.max_activation,
                    page.mean_active,
                    page.token_r2,
                    page.position_correlation,
                    sum(1 << FLAGS.index(flag) for flag in summary.flags),
                    self._piece_ids(summary.top_tokens),
                    np.array(page.histogram, "<u4").tobytes(),
                    np.array(page.rate_by_position, "<f4").tobytes(),
                    json.dumps(dict(page.rate_by_kind)),
                    json.dumps(dict(page.rate_by_language)),
                    page.ablation_kl,
                    page.output_score,
                )
            ],
        )

    def _write_tokens(self, page: FeaturePage) -> None:
        lists = {"active": page.active_tokens, "promoted": page.promoted, "suppressed": page.suppressed}
        self._insert(
            "feature_token",
            [
                (page.summary.feature, name, rank, token.token, self._piece_id(token.piece), token.value, token.count)
                for name, tokens in lists.items()
                for rank, token in enumerate(tokens)
            ],
        )

    def _write_contexts(self, page: FeaturePage) -> None:
        rows, documents = [], []
        for rank, context in enumerate(page.contexts):
            place = context.place
            source = self._sources.setdefault(place.source, len(self._sources))
            documents.append((source, place.record, place.text_kind, place.language))
            scale, steps = _in_steps(context.activations)
            rows.append(
                (
                    page.summary.feature,
                    rank,
                    context.kind,
                    context.quantile,
                    source,
                    place.record,
                    place.position,
                    place.character,
                    context.peak,
                    self._piece_ids(context.tokens),
                    scale,
                    steps,
                )
            )
        self._db.executemany("INSERT OR IGNORE INTO document VALUES (?, ?, ?, ?)", documents)
        self._insert("context", rows)

    def _write_labels(self, page: FeaturePage) -> None:
        self._insert(
            "label",
            [
                (
                    page.summary.feature,
                    rank,
                    label.source,
                    label.text,
                    label.f1,
                    label.precision,
                    label.recall,
                    label.n_positive,
                    label.n_negative,
                    json.dumps(dict(label.predicate)),
                    label.author,
                    label.created,
                )
                for rank, label in enumerate(page.labels)
            ],
        )

    def _insert(self, table: str, rows: Sequence[tuple[object, ...]]) -> None:
        if rows:
            values = ", ".join("?" * len(rows[0]))
            self._db.executemany(f"INSERT INTO {table} VALUES ({values})", rows)

    def _piece_id(self, piece: bytes) -> int:
        return self._pieces.setdefault(piece, len(self._pieces))

    def _piece_ids(self, pieces: Sequence[bytes]) -> bytes:
        return np.array([self._piece_id(piece) for piece in pieces], "<u4").tobytes()


def searched_texts(page: FeaturePage) -> tuple[str, str, str]:
    """What a search looks at: labels, tokens, and the text around the peaks of the strongest contexts."""
    labels = "\n".join(label.text for label in page.labels)
    tokens = " ".join(_text(token.piece) for token in (*page.active_tokens, *page.promoted))
    strongest = [context for context in page.contexts if context.kind == "strongest"]
    return labels, tokens, "\n".join(_around_peak(context) for context in strongest[:SEARCHED_CONTEXTS])


def _around_peak(context: Context) -> str:
    start = max(0, context.peak - SEARCHED_BEFORE)
    return _text(b"".join(context.tokens[start : context.peak + 1 + SEARCHED_AFTER]))


def _text(piece: bytes) -> str:
    """The characters of a piece; those cut inside their bytes are left out."""
    return piece.decode("utf-8", errors="ignore")


def _in_steps(activations: Sequence[float]) -> tuple[float, bytes]:
    """Activations as steps of the largest / 255. Negative ones count as silent."""
    values = np.maximum(np.array(activations, np.float64), 0)
    scale = float(values.max(initial=0))
    if scale == 0:
        return 0.0, bytes(len(values))
    steps = np.maximum(np.rint(values / scale * ACTIVATION_STEPS), values > 0)
    return scale, steps.astype(np.uint8).tobytes()
