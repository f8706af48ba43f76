"""The tokens of a vocabulary as text: how they are spelt, how they are shown, and what class they belong to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

CLASSES: dict[str, str] = {
    "digits": "digits",
    "punctuation": "punctuation",
    "line_break": "line breaks",
    "whitespace": "spaces",
    "word_start": "letters with a space before them",
    "word_piece": "letters with no space before them",
    "capitalised": "capitalised words",
    "capitals": "words in capitals",
    "single_letter": "single letters",
    "other_letters": "letters outside A to Z",
    "cut_character": "bytes of a character cut in two",
}
"""Classes of tokens, and what their members are called. A token may belong to several."""


class Vocabulary:
    """The tokens of a byte-level tokenizer, by id."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """Takes the bytes of every token id; empty where an id has no token."""
        self.pieces = tuple(pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def shown(self, token: int) -> str:
        """A token in quotes on one line: line breaks, control characters and lone bytes are escaped."""
        piece = self.pieces[token]
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            return f'"{repr(piece)[2:-1]}"'
        return quoted(text)

    @cached_property
    def spelling(self) -> tuple[str, ...]:
        """Of every token: lower case, without one space before it. Empty where the bytes are no whole characters."""
        return tuple(_core(_text(piece)).casefold() for piece in self.pieces)

    @cached_property
    def variants(self) -> dict[str, tuple[int, ...]]:
        """The tokens of each spelling that two or more tokens share: "King", " king" and so on."""
        groups: dict[str, list[int]] = defaultdict(list)
        for token, spelling in enumerate(self.spelling):
            if spelling.strip():
                groups[spelling].append(token)
        return {spelling: tuple(tokens) for spelling, tokens in groups.items() if len(tokens) > 1}

    @cached_property
    def classes(self) -> dict[str, Mask]:
        """[vocabulary] of every class: which tokens belong to it; one entry more, for id -1, that belongs to none."""
        table = {name: np.zeros(len(self.pieces) + 1, bool) for name in CLASSES}
        for token, piece in enumerate(self.pieces):
            for name in _classes(piece):
                table[name][token] = True
        return table

    def affixes(self, length: int, *, ends: bool = False) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """The first (last) letters of every token's spelling.

        Returns:
            [vocabulary + 1] numbers of these letters, -1 for shorter spellings, for ones with other characters than
            letters, and for id -1; and the letters of each number.
        """
        if (length, ends) not in self._affixes:
            numbers: dict[str, int] = {}
            table = np.full(len(self.pieces) + 1, -1)
            for token, spelling in enumerate(self.spelling):
                if len(spelling) >= length and spelling.isalpha():
                    affix = spelling[-length:] if ends else spelling[:length]
                    table[token] = numbers.setdefault(affix, len(numbers))
            self._affixes[length, ends] = table, tuple(numbers)
        return self._affixes[length, ends]

    def spelt(self, letters: str, *, ends: bool = False) -> Mask:
        """[vocabulary + 1]: the tokens whose spelling begins (ends) with these letters."""
        numbers, known = self.affixes(len(letters), ends=ends)
        mask: Mask = numbers == known.index(letters) if letters in known else np.zeros(len(numbers), bool)
        return mask

    @cached_property
    def _affixes(self) -> dict[tuple[int, bool], tuple[npt.NDArray[np.int64], tuple[str, ...]]]:
        return {}


def quoted(text: str) -> str:
    """Text in double quotes on one line."""
    quote = "'" if '"' in text else '"'
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return quote + (shown.replace("'", "\\'") if quote == "'" else shown) + quote


def _text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return ""


def _core(text: str) -> str:
    return text[1:] if text.startswith(" ") and len(text) > 1 else text


def _classes(piece: bytes) -> list[str]:
    text = _text(piece)
    if not text:
        return ["cut_character"] if piece else []
    core = _core(text)
    if text.isspace():
        return ["line_break" if "\n" in text else "whitespace"]
    if core.isdecimal():
        return ["digits"]
    if not any(c.isalnum() for c in core):
        return ["punctuation"]
    if not core.isalpha():
        return []
    names = ["word_piece" if core == text else "word_start"]
    if len(core) == 1:
        names.append("single_letter")
    if core[0].isupper() and (len(core) == 1 or core[1:].islower()):
        names.append("capitalised")
    elif core.isupper():
        names.append("capitals")
    if not core.isascii():
        names.append("other_letters")
    return names
