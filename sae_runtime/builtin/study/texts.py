"""The texts of the study: questions that set two kinds of text apart, and documents split in two by a seed."""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_runtime.builtin import HELD_OUT
from sae_runtime.model.backbone import Backbone

WINDOW = 64
"""Most tokens of a text."""
MOST_TEXTS = 80
"""Texts of a set, in each half."""

Row = list[int]
Belongs = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Question:
    """Two sets of texts; the features that tell them apart are what is studied."""

    kind: str
    a: str
    b: str
    belongs_to_a: Belongs
    belongs_to_b: Belongs
    pieces: Callable[[dict[str, Any]], list[str]] = lambda document: [document["text"]]
    """Texts of a document."""
    piece_in_a: Callable[[str], bool] = lambda piece: True
    piece_in_b: Callable[[str], bool] = lambda piece: True


def _sentences(document: dict[str, Any]) -> list[str]:
    return [piece for piece in re.split(r"(?<=[.;?!]) ", document["text"]) if len(piece) > 30]


def _equations(document: dict[str, Any]) -> list[str]:
    """Runs of four lines that all are equations, or that all are comparisons."""
    lines = [line for line in document["text"].split("\n") if line]
    groups = [lines[i : i + 4] for i in range(0, len(lines), 4)]
    # Short enough for one window, which then holds all four.
    return [text for group in groups if len(group) == 4 and len(text := "\n".join(group)) <= WINDOW]


def _all_lines(piece: str, has: str, lacks: str) -> bool:
    return all(re.search(has, line) and not re.search(lacks, line) for line in piece.split("\n"))


def _bible(document: dict[str, Any], *languages: str) -> bool:
    return document["kind"] == "parallel" and document["lang"] in languages


OTHER_LANGUAGES = ("de", "en", "es", "it", "nl", "pt")
QUESTIONS = (
    Question(
        "proper name",
        "English Bible sentences with the name Jesus",
        "English Bible sentences without it",
        lambda document: _bible(document, "en"),
        lambda document: _bible(document, "en"),
        _sentences,
        lambda piece: "Jesus" in piece,
        lambda piece: "Jesus" not in piece,
    ),
    Question(
        "language",
        "French Bible passages",
        "the same Bible in de, en, es, it, nl and pt",
        lambda document: _bible(document, "fr"),
        lambda document: _bible(document, *OTHER_LANGUAGES),
    ),
    Question(
        "operator",
        "four lines of equations",
        "four lines of comparisons (<, >, ≤, ≥)",
        lambda document: document["kind"] == "maths",
        lambda document: document["kind"] == "maths",
        _equations,
        lambda piece: _all_lines(piece, " = ", "[<>≤≥≈!]"),
        lambda piece: _all_lines(piece, "[<>≤≥]", "(?<![<>!])=(?!=)|≈"),
    ),
    Question(
        "topic",
        "Python code",
        "books and encyclopedia articles",
        lambda document: document["kind"] == "code",
        lambda document: document["kind"] in ("book", "wiki"),
    ),
)


@dataclass(frozen=True)
class Halves:
    """Texts to find features on, and texts to measure them on; of different documents."""

    find: list[Row]
    measure: list[Row]


class Texts:
    """The builtin model's held-out documents."""

    def __init__(self, backbone: Backbone, seed: int) -> None:
        self._backbone = backbone
        self._seed = seed
        with lzma.open(HELD_OUT, "rt", encoding="utf-8") as lines:
            self._documents: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def halves(
        self, belongs: Belongs, pieces: Callable[[dict[str, Any]], list[str]], keep: Callable[[str], bool]
    ) -> Halves:
        """Windows of the documents' pieces. A document, with its translations, is wholly in one half."""
        halves: dict[bool, list[Row]] = {True: [], False: []}
        for document in self._documents:
            if not belongs(document):
                continue
            # By the passage and not the document: its translations say the same.
            key = f"{self._seed}/{document.get('group', document['id'])}"
            rows = [row for piece in pieces(document) if keep(piece) for row in self._windows(piece)]
            halves[random.Random(key).random() < 0.5] += rows
        for rows in halves.values():
            random.Random(self._seed).shuffle(rows)
        return Halves(halves[True][:MOST_TEXTS], halves[False][:MOST_TEXTS])

    def _windows(self, text: str) -> list[Row]:
        ids = self._backbone.encode_text(text).ids
        rows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        return [row for row in rows if len(row) >= 8][:8]

    def others(self, *sets: Belongs) -> list[Row]:
        """Windows of documents that are in neither set."""
        apart = self.halves(
            lambda document: not any(belongs(document) for belongs in sets),
            lambda document: [document["text"]],
            lambda piece: True,
        )
        return apart.measure
