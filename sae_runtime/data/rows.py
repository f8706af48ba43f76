"""Rows of tokens from documents: mixing files, setting held-out documents apart, cutting rows of the context length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from sae_runtime.data.documents import Document, DocumentFile, mix
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens

Encode = Callable[[list[str]], list[list[int]]]
"""Texts to token ids, without special tokens."""


def encode_texts(backbone: Backbone) -> tuple[Encode, int]:
    """The backbone's tokenizer as a function of texts, and its end-of-text id.

    Raises:
        ValueError: the backbone has no tokenizer, or that has no end-of-text token.
    """
    tokenizer = backbone.tokenizer
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(f"backbone {backbone.name!r} has no tokenizer with an end-of-text token: text cannot be read")
    backend = tokenizer.backend_tokenizer

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode, int(tokenizer.eos_token_id)


_BATCH_CHARACTERS = 1 << 18  # text tokenized at a time: enough for the tokenizer's threads, little to hold


def mixed_documents(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Documents of all files (see read_documents), mixed in proportion to their sizes (see mix)."""
    files = [DocumentFile(Path(path)) for path in paths]
    return mix((file.size, iter(file)) for file in files)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out share. Decided by its text alone, so no order or epoch changes it."""
    if fraction == 0:
        return False
    digest = hashlib.sha256(document.text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def shuffled_held_out(documents: Iterable[Document], max_characters: int, seed: int) -> list[Document]:
    """Documents in a seeded order, so that the first of them are a fair sample of all kinds; holds them in memory.

    Reading stops after `max_characters`.
    """
    kept, characters = [], 0
    for document in documents:
        kept.append(document)
        characters += len(document.text)
        if characters >= max_characters:
            break
    random.Random(seed).shuffle(kept)
    return kept


@dataclass
class CutterState:
    """Position in the text: rows given and documents read in this epoch, tokens read but not yet given in a row."""

    epoch: int = 0
    rows: int = 0
    documents: int = 0
    remainder: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RowCutter:
    """How documents become rows of at most `context_length` tokens."""

    encode: Encode
    end_of_text: int
    context_length: int
    mode: Literal["packed", "documents"] = "packed"
    """packed: documents joined by end-of-text, all rows full; documents: every row belongs to one document."""
    prepend_end_of_text: bool = False
    """Begin every row with end-of-text (one of the context_length tokens)."""

    def cut(self, documents: Iterable[Document], state: CutterState) -> Iterator[list[int]]:
        """Rows of these documents; `state` says at every moment what a later call needs to go on from there.

        In packed mode a last row that is not full stays in `state.remainder`.
        """
        return self.cut_tokens(encoded(documents, self.encode), state)

    def cut_tokens(self, documents: Iterable[list[int]], state: CutterState) -> Iterator[list[int]]:
        """The same for documents that are tokens already, without special tokens."""
        yield from self._full_rows(state)
        for ids in documents:
            # A document counts as read once its tokens are in the remainder.
            state.documents += 1
            if ids:  # an empty document is nothing between two others
                state.remainder += [*ids, self.end_of_text] if self.mode == "packed" else ids
            yield from self._full_rows(state)

    def _full_rows(self, state: CutterState) -> Iterator[list[int]]:
        prefix = [self.end_of_text] if self.prepend_end_of_text else []
        fresh = self.context_length - len(prefix)  # tokens of text in a full row
        least = fresh if self.mode == "packed" else 1
        while len(state.remainder) >= least:
            row, state.remainder = prefix + state.remainder[:fresh], state.remainder[fresh:]
            if len(row) > 1:  # a single token has no context and predicts nothing
                yield row


def encoded(documents: Iterable[Document], encode: Encode) -> Iterator[list[int]]:
    """The token ids of each document, tokenized many at a time."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from encode(batch)
            batch, characters = [], 0
    if batch:
        yield from encode(batch)


def packed_passes(rows: Iterable[Sequence[int]], tokens_per_pass: int) -> Iterator[PackedTokens]:
    """Rows in their order, as many in a pass as stay within `tokens_per_pass` tokens (at least one)."""
    batch: list[Sequence[int]] = []
    size = 0
    for row in rows:
        if batch and size + len(row) > tokens_per_pass:
            yield PackedTokens.from_rows(batch)
            batch, size = [], 0
        batch.append(row)
        size += len(row)
    if batch:
        yield PackedTokens.from_rows(batch)


def take_tokens(rows: Iterable[list[int]], n_tokens: int) -> Iterator[list[int]]:
    """Rows until at least `n_tokens` tokens were given."""
    taken = 0
    for row in islice(rows, n_tokens):
        yield row
        taken += len(row)
        if taken >= n_tokens:
            return


class TrainingRows:
    """Endless rows of tokens from files, epoch after epoch; its position can be saved and restored exactly.

    Raises (from iteration):
        ValueError: the files hold no text to train on.
    """

    def __init__(self, paths: Sequence[str | Path], cutter: RowCutter, held_out_fraction: float = 0.0) -> None:
        self._paths = paths
        self._cutter = cutter
        self._held_out_fraction = held_out_fraction
        self._state = CutterState()
        self._rows = self._endless()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        return next(self._rows)

    @property
    def epoch(self) -> int:
        """Epoch of the row given last, from 0."""
        return self._state.epoch

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self._state), "remainder": list(self._state.remainder)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; skipped documents are read again but not tokenized."""
        self._state = CutterState(**state)
        self._rows = self._endless()

    def _endless(self) -> Iterator[list[int]]:
        state = self._state
        while True:
            first = state.documents
            documents = (d for d in mixed_documents(self._paths) if not is_held_out(d, self._held_out_fraction))
            for row in self._cutter.cut(islice(documents, first, None), state):
                state.rows += 1
                yield row
            # Every epoch has the same rows: what is left of a last row is dropped. But text that is shorter than a row
            # fills one after some epochs; no text at all never does.
            if state.rows:
                state.remainder = []
            elif not state.remainder:
                raise ValueError(f"no text to train on in {', '.join(str(p) for p in self._paths)}")
            state.epoch, state.documents, state.rows = state.epoch + 1, 0, 0
