"""The text of a search is data, whatever is in it."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_runtime.catalogue.search_query import MAX_WORDS, SearchQuery

HOSTILE = [
    "", " ", "\x00", '"', "'", "*", "^", "a*b", 'a" OR "b', "NEAR(a b, 2)", "label : x", "{label tokens} : x", "a AND",
    "NOT", "-a", "a\x00b", ".*+?[]()", "(?:a|b){9999}", "\ud800", "🦜🦜", "e\u0301", "\u202e",
    "'; DROP TABLE search; --",
    "x" * 1_000_000, "x " * 500_000, "=", "{ } = ==",
]  # fmt: skip


def matched(text: str) -> list[str]:
    """What of a small index an expression matches; an error of FTS5 fails the test."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE search USING fts5 (label, tokens, tokenize='unicode61')")
    db.executemany("INSERT INTO search VALUES (?, ?)", [("Spanish text", "de la"), ("NEAR OR", "a b"), ("don't", "x")])
    query = SearchQuery.parse(text)
    if not query.words:
        return []
    return [row[0] for row in db.execute("SELECT label FROM search WHERE search MATCH ?", (query.match("AND"),))]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_hostile_text_is_no_syntax(text: str) -> None:
    matched(text)


@given(st.text())
def test_any_text_is_no_syntax(text: str) -> None:
    matched(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("spanish", ["Spanish text"]),
        ("text spanish", ["Spanish text"]),
        ("spa", ["Spanish text"]),  # the last word may be the beginning of one
        ("spa text", []),  # the others may not
        ("near or", ["NEAR OR"]),
        ("don't", ["don't"]),
        ("label:spanish", []),
        ("spanish\x00text", ["Spanish text"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert matched(text) == expected


def test_symbols_are_apart_from_words() -> None:
    query = SearchQuery.parse("def { }")
    assert (query.words, query.symbols, query.ends_with_word) == (("def",), ("{", "}"), False)
    assert query.pieces == (b"{", b" {", b"}", b" }")
    assert query.match("AND") == '"def"'


def test_a_query_is_bounded() -> None:
    assert len(SearchQuery.parse("x " * 500_000).words) == MAX_WORDS
    assert len(SearchQuery.parse("x" * 1_000_000).match("OR")) < 110
