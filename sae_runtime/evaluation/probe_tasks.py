"""Binary tasks for probes: text-level ones from the labels of documents, token-level ones from rules on token text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_runtime.data.text_sample import TASK_LABELS, TextSample
from sae_runtime.evaluation.intervals import generator
from sae_runtime.evaluation.splice import slug

Integers = npt.NDArray[np.int64]

MIN_EXAMPLES = 20
"""Minimum examples of each class in each split; a task with fewer is left out."""

TOKEN_RULES: dict[str, Callable[[str], bool]] = {
    "equals_sign": lambda text: "=" in text,
    "digit": lambda text: any(c.isdigit() for c in text),
    "capital": lambda text: text.lstrip()[:1].isupper(),
    "newline": lambda text: "\n" in text,
    "punctuation": lambda text: text.strip() != "" and all(unicodedata.category(c)[0] == "P" for c in text.strip()),
    "not_ascii": lambda text: not text.isascii(),
    "word_start": lambda text: text[:1] == " " and text[1:2].isalpha(),
}
"""Token-level tasks: whether a rule holds of a token's text."""


@dataclass(frozen=True, eq=False)
class Task:
    """Balanced examples of a binary question, by their numbers, in the split to fit on and the one to score on."""

    name: str
    level: str
    """chunk: some tokens of one document, latents averaged; token: one token."""
    fit: Integers
    fit_labels: npt.NDArray[np.bool_]
    score: Integers
    score_labels: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Chunks:
    """Runs of tokens of one document within one row."""

    of_token: Integers
    """[N], the chunk of each token; -1 where it is in none."""
    document: Integers
    """[n_chunks]."""
    fit: npt.NDArray[np.bool_]
    """[n_chunks]."""

    def __len__(self) -> int:
        return len(self.document)


def cut_chunks(sample: TextSample, length: int) -> Chunks:
    """Runs of exactly `length` tokens; a shorter rest of a document at the end of a row is in no chunk."""
    of_token = np.full(sample.n_tokens, -1, np.int64)
    boundary = np.flatnonzero(np.diff(sample.document) | np.diff(sample.row)) + 1
    starts = np.concatenate([[0], boundary])
    ends = np.concatenate([boundary, [sample.n_tokens]])
    firsts = [
        first
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        if sample.document[start] >= 0
        for first in range(start, end - length + 1, length)
    ]
    for number, first in enumerate(firsts):
        of_token[first : first + length] = number
    return Chunks(of_token, sample.document[firsts], sample.fit[firsts])


def chunk_tasks(sample: TextSample, chunks: Chunks, max_examples: int, seed: int) -> list[Task]:
    """One task for each value of each label: chunks with it against chunks of the same kind with another value.

    `kind` itself is asked of all chunks. Of two values of a label within one kind only the first (by name) is asked.
    """
    labels = [sample.labels(int(document)) for document in chunks.document]
    tasks: list[Task] = []
    for label in TASK_LABELS:
        kinds = sorted({of_chunk["kind"] for of_chunk in labels if label in of_chunk}) if label != "kind" else [None]
        for kind in kinds:
            inside = np.array(
                [label in of_chunk and (kind is None or of_chunk["kind"] == kind) for of_chunk in labels], bool
            )
            values = sorted({of_chunk[label] for of_chunk, kept in zip(labels, inside, strict=True) if kept})
            if len(values) == 2:
                values = values[:1]
            for value in values:
                positive = np.array([of_chunk.get(label) == value for of_chunk in labels], bool) & inside
                name = f"{label}_{slug(value)}"
                if any(task.name == name for task in tasks):  # the same value in two kinds
                    name = f"{label}_{slug(str(kind))}_{slug(value)}"
                task = _balanced(name, "chunk", positive, inside & ~positive, chunks.fit, max_examples, seed)
                if task is not None:
                    tasks.append(task)
    return tasks


def token_tasks(
    sample: TextSample, token_text: Callable[[int], str], max_examples: int, seed: int
) -> tuple[list[Task], Integers]:
    """The tasks of TOKEN_RULES, and the tokens that are their examples: example i is token `tokens[i]` of the sample.

    End-of-text tokens are no examples.
    """
    unique, inverse = np.unique(sample.ids, return_inverse=True)
    texts = [token_text(int(token)) for token in unique]
    usable = (sample.document >= 0) & np.array([text != "" for text in texts], bool)[inverse]
    tasks = []
    for name, rule in TOKEN_RULES.items():
        holds = np.array([rule(text) for text in texts], bool)[inverse]
        task = _balanced(f"token_{name}", "token", usable & holds, usable & ~holds, sample.fit, max_examples, seed)
        if task is not None:
            tasks.append(task)
    if not tasks:
        return [], np.zeros(0, np.int64)
    tokens = np.unique(np.concatenate([split for task in tasks for split in (task.fit, task.score)]))
    renumbered = [
        Task(
            task.name,
            task.level,
            np.searchsorted(tokens, task.fit),
            task.fit_labels,
            np.searchsorted(tokens, task.score),
            task.score_labels,
        )
        for task in tasks
    ]
    return renumbered, tokens


def _balanced(
    name: str,
    level: str,
    positive: npt.NDArray[np.bool_],
    negative: npt.NDArray[np.bool_],
    fit: npt.NDArray[np.bool_],
    max_examples: int,
    seed: int,
) -> Task | None:
    """Equally many examples of both classes in each split, or None where there are too few."""
    rng = generator(seed, f"probe {name}")
    examples_and_labels = []
    for split in (fit, ~fit):
        classes = [np.flatnonzero(positive & split), np.flatnonzero(negative & split)]
        size = min(max_examples, *map(len, classes))
        if size < MIN_EXAMPLES:
            return None
        drawn = np.concatenate([np.sort(rng.permutation(members)[:size]) for members in classes])
        examples_and_labels += [drawn, np.arange(2 * size) < size]
    return Task(name, level, *examples_and_labels)
