"""Rows of tokens from documents: mixing files, setting held-out documents apart, cutting rows of the context length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.documents import Document, DocumentFile, mix
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens

Encode = Callable[[list[str]], list[list[int]]]
"""Texts to token ids, without special tokens. ValueError: one of them cannot be tokenized."""


def encode_texts(backbone: Backbone) -> tuple[Encode, int]:
    """The backbone's tokenizer as a function of texts, and its end-of-text id.

    Raises:
        ValueError: the backbone has no tokenizer, or one without an end-of-text token or that changes text. The
            function raises it for a text that spells a token without an embedding.
    """
    tokenizer = backbone.tokenizer
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(f"backbone {backbone.name!r} has no tokenizer with an end-of-text token: text cannot be read")
    backend, vocabulary = tokenizer.backend_tokenizer, backbone.text_tokenizer

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            raise ValueError("holds half of a surrogate pair") from error
        for of_text in ids if vocabulary.n_ids > backbone.vocab_size else ():
            if (largest := max(of_text, default=0)) >= backbone.vocab_size:
                spelt = vocabulary.token_bytes(largest).decode(errors="replace")
                raise ValueError(
                    f"holds {spelt!r}, token id {largest} of the tokenizer, which is outside the model's vocabulary of "
                    f"{backbone.vocab_size}"
                )
        return ids

    return encode, int(tokenizer.eos_token_id)


_BATCH_CHARACTERS = 1 << 18  # text tokenized at a time: enough for the tokenizer's threads, little to hold


def mixed_documents(
    paths: Sequence[str | Path], bad: BadDocuments | None = None, sizes: Sequence[int] | None = None
) -> Iterator[Document]:
    """Documents of all files (see read_documents), mixed in proportion to their sizes, or to `sizes` (see mix)."""
    files = [DocumentFile(Path(path), bad=bad or BadDocuments()) for path in paths]
    return mix(zip(sizes or [file.size for file in files], map(iter, files), strict=True))


def with_text(text_hash: str, document: Document) -> str:
    """sha256 of all texts up to a document's, from that of the texts before it."""
    return hashlib.sha256(text_hash.encode() + document.text.encode(errors="surrogatepass")).hexdigest()


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
    text_hash: str = ""
    """Of those documents (see with_text); not of documents that were tokens already."""


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
    bad: BadDocuments = field(default_factory=BadDocuments)
    """What becomes of documents that cannot be tokenized."""

    def cut(self, documents: Iterable[Document], state: CutterState) -> Iterator[list[int]]:
        """Rows of these documents; `state` says at every moment what a later call needs to go on from there.

        In packed mode a last row that is not full stays in `state.remainder`.
        """

        def tokens() -> Iterator[list[int]]:
            for document, ids in encoded(documents, self.encode, self.bad):
                state.text_hash = with_text(state.text_hash, document)
                yield ids

        return self.cut_tokens(tokens(), state)

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


def encoded(
    documents: Iterable[Document], encode: Encode, bad: BadDocuments | None = None
) -> Iterator[tuple[Document, list[int]]]:
    """Each document and its token ids, tokenized many at a time. A document that is skipped has none.

    Raises:
        ValueError: a document cannot be tokenized, and `bad` does not say skip; names its place.
    """
    bad = bad or BadDocuments()
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from zip(batch, _encode(batch, encode, bad), strict=True)
            batch, characters = [], 0
    if batch:
        yield from zip(batch, _encode(batch, encode, bad), strict=True)


def _encode(documents: list[Document], encode: Encode, bad: BadDocuments) -> list[list[int]]:
    try:
        return encode([document.text for document in documents])
    except ValueError:
        ids: list[list[int]] = [[] for _ in documents]
        for i, document in enumerate(documents):  # one by one, to see which it is
            with bad.at(document.place or "a text"):
                ids[i] = encode([document.text])[0]
        return ids


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
        self._sizes = [Path(path).stat().st_size for path in paths]
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
        return {**vars(self._state), "remainder": list(self._state.remainder), "sizes": list(self._sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; skipped documents are read again but not tokenized.

        The files may have changed since, as when a bad line was mended, but not in the documents that were read: the
        next row is a ValueError otherwise.
        """
        # Files are mixed by their sizes of before, so that a changed one gives the same order.
        fields = {"sizes": self._sizes, **state}
        self._sizes = fields.pop("sizes")
        self._state = CutterState(**fields)
        self._rows = self._endless()

    def _endless(self) -> Iterator[list[int]]:
        state = self._state
        while True:
            every = mixed_documents(self._paths, self._cutter.bad, self._sizes)
            documents = (d for d in every if not is_held_out(d, self._held_out_fraction))
            text_hash = reduce(with_text, islice(documents, state.documents), "")
            if state.text_hash not in ("", text_hash):  # older states have none
                raise ValueError(
                    f"the {state.documents:,} documents that were read before have changed in {self._named()}: restore "
                    "them, or start anew"
                )
            state.text_hash = text_hash
            for row in self._cutter.cut(documents, state):
                state.rows += 1
                yield row
            # Every epoch has the same rows: what is left of a last row is dropped. But text that is shorter than a row
            # fills one after some epochs; no text at all never does.
            if state.rows:
                state.remainder = []
            elif not state.remainder:
                raise ValueError(f"no text to train on in {self._named()}")
            state.epoch, state.documents, state.rows, state.text_hash = state.epoch + 1, 0, 0, ""

    def _named(self) -> str:
        return ", ".join(map(str, self._paths))
