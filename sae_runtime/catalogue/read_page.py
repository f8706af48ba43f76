"""Puts the page of a feature together from the rows of a catalogue."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from sae_runtime.catalogue.records import (
    FLAGS,
    Context,
    FeaturePage,
    FeatureSummary,
    Flag,
    Label,
    Neighbor,
    Place,
    TokenFigure,
)
from sae_runtime.catalogue.write import ACTIVATION_STEPS

Row = tuple[Any, ...]

_SUMMARY = "SELECT feature, label, label_source, label_f1, firing_rate, max_activation, flags, top_tokens FROM feature"


def read_page(db: sqlite3.Connection, feature: int) -> FeaturePage | None:
    """All that is known of a feature; None if the catalogue has no such feature."""
    summaries = read_summaries(db, "WHERE feature = ?", feature)
    if not summaries:
        return None
    figures = db.execute(
        "SELECT document_rate, n_firings, mean_active, token_r2, position_correlation, ablation_kl, output_score, "
        "histogram, rate_by_position, rate_by_kind, rate_by_language FROM feature WHERE feature = ?",
        (feature,),
    ).fetchone()
    document_rate, n_firings, mean_active, token_r2, position_correlation, ablation_kl, output_score = figures[:7]
    histogram, by_position, by_kind, by_language = figures[7:]
    return FeaturePage(
        summary=summaries[0],
        labels=_labels(db, feature),
        document_rate=document_rate,
        n_firings=n_firings,
        mean_active=mean_active,
        token_r2=token_r2,
        position_correlation=position_correlation,
        histogram=tuple(np.frombuffer(histogram, "<u4").tolist()),
        rate_by_position=tuple(np.frombuffer(by_position, "<f4").tolist()),
        rate_by_kind=json.loads(by_kind),
        rate_by_language=json.loads(by_language),
        active_tokens=_tokens(db, feature, "active"),
        promoted=_tokens(db, feature, "promoted"),
        suppressed=_tokens(db, feature, "suppressed"),
        neighbors=read_neighbors(db, feature),
        ablation_kl=ablation_kl,
        output_score=output_score,
        contexts=_contexts(db, feature),
    )


def read_summaries(db: sqlite3.Connection, clauses: str, *values: object) -> tuple[FeatureSummary, ...]:
    """The summaries of the rows of `feature` that SQL clauses (WHERE, ORDER BY, LIMIT) choose, in their order."""
    rows = db.execute(f"{_SUMMARY} {clauses}", values).fetchall()
    tops = [np.frombuffer(row[-1], "<u4").tolist() for row in rows]
    pieces = _pieces(db, (number for top in tops for number in top))
    return tuple(_summary(row, tuple(pieces[number] for number in top)) for row, top in zip(rows, tops, strict=True))


def _summary(row: Row, top_tokens: tuple[bytes, ...]) -> FeatureSummary:
    feature, label, source, f1, rate, largest, flags, _ = row
    return FeatureSummary(feature, label, source, f1, rate, largest, _flags(flags), top_tokens)


def read_neighbors(db: sqlite3.Connection, feature: int) -> tuple[Neighbor, ...]:
    sql = "SELECT dictionary, other, score, how FROM neighbor WHERE feature = ? ORDER BY rank"
    return tuple(Neighbor(*row) for row in db.execute(sql, (feature,)))


def _labels(db: sqlite3.Connection, feature: int) -> tuple[Label, ...]:
    sql = (
        "SELECT text, source, f1, precision, recall, n_positive, n_negative, predicate, author, created "
        "FROM label WHERE feature = ? ORDER BY rank"
    )
    return tuple(_label(row) for row in db.execute(sql, (feature,)))


def _label(row: Row) -> Label:
    text, source, f1, precision, recall, n_positive, n_negative, predicate, author, created = row
    return Label(text, source, f1, precision, recall, n_positive, n_negative, json.loads(predicate), author, created)


def _tokens(
    db: sqlite3.Connection, feature: int, name: Literal["active", "promoted", "suppressed"]
) -> tuple[TokenFigure, ...]:
    sql = (
        "SELECT token, bytes, value, count FROM feature_token JOIN piece ON piece.id = feature_token.piece "
        "WHERE feature = ? AND list = ? ORDER BY rank"
    )
    return tuple(TokenFigure(*row) for row in db.execute(sql, (feature, name)))


def _contexts(db: sqlite3.Connection, feature: int) -> tuple[Context, ...]:
    rows = db.execute(
        "SELECT context.kind, quantile, peak, pieces, scale, activations, "
        "name, record, position, character, document.kind, language "
        "FROM context JOIN document USING (source, record) JOIN source ON source.id = context.source "
        "WHERE feature = ? ORDER BY rank",
        (feature,),
    ).fetchall()
    windows = [np.frombuffer(row[3], "<u4").tolist() for row in rows]
    pieces = _pieces(db, (number for window in windows for number in window))
    return tuple(
        _context(row, tuple(pieces[number] for number in window)) for row, window in zip(rows, windows, strict=True)
    )


def _context(row: Row, tokens: tuple[bytes, ...]) -> Context:
    kind, quantile, peak, _, scale, steps, *place = row
    activations = np.frombuffer(steps, np.uint8) * (scale / ACTIVATION_STEPS)
    if len(activations) != len(tokens):
        raise ValueError(f"a context has {len(tokens)} tokens and {len(activations)} activations")
    return Context(kind, quantile, tokens, tuple(activations.tolist()), peak, Place(*place))


def _pieces(db: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, bytes]:
    """The bytes of pieces by their number."""
    wanted = json.dumps(sorted(set(numbers)))
    return dict(db.execute("SELECT id, bytes FROM piece WHERE id IN (SELECT value FROM json_each(?))", (wanted,)))


def _flags(bits: int) -> tuple[Flag, ...]:
    return tuple(flag for i, flag in enumerate(FLAGS) if bits >> i & 1)
