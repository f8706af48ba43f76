"""What people type into a search, as a query of SQLite's FTS5. The text is data: nothing in it is syntax."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal

MAX_WORDS = 32
MAX_WORD_CHARACTERS = 100
_READ_CHARACTERS = 2 * MAX_WORDS * MAX_WORD_CHARACTERS


@dataclass(frozen=True)
class SearchQuery:
    """The words of a query, and its symbols: what has neither letters nor digits, which FTS5 does not index."""

    words: tuple[str, ...]
    symbols: tuple[str, ...]
    ends_with_word: bool
    """Whether a word is last, which then stands for all words that begin with it."""

    @classmethod
    def parse(cls, text: str) -> SearchQuery:
        """The first MAX_WORDS words and symbols of a text. Never fails; an empty text has none."""
        readable = text[:_READ_CHARACTERS].encode("utf-8", errors="ignore").decode("utf-8")
        cleaned = "".join(" " if unicodedata.category(char) == "Cc" else char for char in readable)
        terms = [term[:MAX_WORD_CHARACTERS] for term in cleaned.split()[:MAX_WORDS]]
        is_word = [any(_is_indexed(char) for char in term) for term in terms]
        return cls(
            words=tuple(term for term, word in zip(terms, is_word, strict=True) if word),
            symbols=tuple(term for term, word in zip(terms, is_word, strict=True) if not word),
            ends_with_word=bool(is_word) and is_word[-1],
        )

    def match(self, operator: Literal["AND", "OR"]) -> str:
        """The words as an FTS5 expression: every word is a string in quotes."""
        quoted = ['"' + word.replace('"', '""') + '"' for word in self.words]
        return f" {operator} ".join(quoted) + ("*" if self.ends_with_word else "")

    @property
    def pieces(self) -> tuple[bytes, ...]:
        """The symbols as tokens, with and without a space before them."""
        return tuple(piece for symbol in self.symbols for piece in (symbol.encode(), b" " + symbol.encode()))


def _is_indexed(char: str) -> bool:
    """Whether FTS5's tokenizer unicode61 takes a character to be part of a word."""
    category = unicodedata.category(char)
    return category[0] in "LN" or category == "Co"
