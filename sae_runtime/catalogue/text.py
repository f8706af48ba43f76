"""The text of a catalogue: documents cut into rows for the model, and where every token of them came from.

Tokens of text are numbered over all documents, in the order in which they are read. End-of-text tokens that are put
before rows or between documents are read by the model and have no number. A *stretch* is what one row holds of one
document: within it tokens follow one another and see one another. Contexts never leave their stretch.

    number      0 1 2 3 4   5 6 7   8 9
    document    0 0 0 0 0   0 0 0   1 1
    row         0 0 0 0 0   1 1 1   2 2     rows of 5, each of one document
    position    0 1 2 3 4   0 1 2   0 1     in the row
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.documents import Document, mix
from sae_runtime.data.rows import Encode, encode_texts, encoded
from sae_runtime.data.sources import DocumentSource, find_sources
from sae_runtime.model.backbone import Backbone

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentEntry:
    """What is kept of a document."""

    source: str
    record: int
    """Number of the document in its source, from 0."""
    kind: str
    language: str


@dataclass(frozen=True, eq=False)
class TextPass:
    """Rows for one forward pass, with N tokens, n of them text."""

    rows: list[list[int]]
    is_text: npt.NDArray[np.bool_]
    """[N], False at the end-of-text tokens that were put in."""
    first: int
    """Number of the first of the n tokens."""
    ids: Integers
    """[n]."""
    position: Integers
    """[n] in the row."""
    document: Integers
    """[n], index into `Text.documents`."""
    begin: Integers
    """[n], index into these n of the first token of the stretch."""
    end: Integers
    """[n], index after the last one."""
    document_began: int
    """Number of the first token of the first document here: below `first` if an earlier pass holds its beginning."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class Text:
    """All that was read: 2 or 4 bytes a token, and some numbers for each stretch and document."""

    id_dtype: Any
    documents: list[DocumentEntry] = field(default_factory=list)
    n_tokens: int = 0
    _ids: list[Array] = field(default_factory=list)
    _stretches: list[Array] = field(default_factory=list)
    _newest: tuple[int, int] = (-1, 0)

    def began(self, document: int, token: int) -> int:
        """Number of the first token of a document, of which `token` is one; asked before it is added."""
        return self._newest[1] if document == self._newest[0] else token

    def add(self, ids: Integers, stretches: Integers) -> None:
        """Adds tokens, and stretches [m, 3]: number of the first token, document, position of the first in the row."""
        self._ids.append(ids.astype(self.id_dtype))
        self._stretches.append(stretches)
        self.n_tokens += len(ids)
        for document in stretches[-1:, 1].tolist():
            same = stretches[stretches[:, 1] == document]
            self._newest = (document, self.began(document, int(same[0, 0])))

    @cached_property
    def ids(self) -> Array:
        """[n_tokens]; once all is read."""
        self._ids = [np.concatenate([np.zeros(0, self.id_dtype), *self._ids])]  # not kept twice
        return self._ids[0]

    @cached_property
    def _table(self) -> Integers:
        """int64 [m, 3], the stretches."""
        return np.concatenate([np.zeros((0, 3), np.int64), *self._stretches])

    @cached_property
    def _stretch_ends(self) -> Integers:
        return np.append(self._table[1:, 0], self.n_tokens)

    @cached_property
    def _document_start(self) -> Integers:
        """Number of each document's first token; -1 for one without tokens."""
        starts = np.full(len(self.documents), -1, np.int64)
        documents, first = np.unique(self._table[:, 1], return_index=True)
        starts[documents] = self._table[first, 0]
        return starts

    def stretch(self, tokens: Integers) -> tuple[Integers, Integers]:
        """Numbers of the first token of each token's stretch, and after the last."""
        index = self._stretch_of(tokens)
        return self._table[index, 0], self._stretch_ends[index]

    def document(self, tokens: Integers) -> Integers:
        documents: Integers = self._table[self._stretch_of(tokens), 1]
        return documents

    def position(self, tokens: Integers) -> Integers:
        """Position in the row."""
        table = self._table[self._stretch_of(tokens)]
        positions: Integers = table[:, 2] + tokens - table[:, 0]
        return positions

    def position_in_document(self, tokens: Integers) -> Integers:
        return tokens - self._document_start[self.document(tokens)]

    def characters(self, tokens: Integers, pieces: Sequence[bytes]) -> Integers:
        """Character of its document at which each token begins, as `TokenizedText.char_starts` has it.

        Args:
            tokens: ascending.
            pieces: the bytes of every token id.
        """
        # Bytes 10xxxxxx continue a character; a token that begins with one begins inside a character.
        begun = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces], np.int64)
        inside = np.array([bool(piece) and piece[0] & 0xC0 == 0x80 for piece in pieces], np.int64)
        starts = self._document_start[self.document(tokens)]
        before = _sums_before(np.concatenate([starts, tokens]), lambda a, b: begun[self.ids[a:b]], self.n_tokens)
        return before[len(starts) :] - before[: len(starts)] - inside[self.ids[tokens]]

    def _stretch_of(self, tokens: Integers) -> Integers:
        return np.searchsorted(self._table[:, 0], tokens, side="right") - 1


def _sums_before(places: Integers, values: Callable[[int, int], Integers], n: int) -> Integers:
    """The sum of values[0 : place] for each place, where `values` gives any range of all n."""
    step = 1 << 22
    unique, index = np.unique(places, return_inverse=True)
    sums, total = np.zeros(len(unique), np.int64), 0
    for a in range(0, n, step):
        cumulative = np.concatenate([[0], values(a, min(a + step, n)).cumsum()])
        here = slice(*np.searchsorted(unique, [a, a + step]))
        sums[here] = total + cumulative[unique[here] - a]
        total += int(cumulative[-1])
    return sums[index]


@dataclass(frozen=True, eq=False)
class TextReader:
    """Reads documents of all sources, mixed, as rows for the model."""

    sources: Sequence[DocumentSource]
    encode: Encode
    end_of_text: int
    settings: CatalogueSettings
    bad: BadDocuments

    @classmethod
    def open(cls, backbone: Backbone, settings: CatalogueSettings, bad: BadDocuments | None = None) -> TextReader:
        """For the text of the settings, whose context_length must be given.

        `bad`: what becomes of documents that cannot be read; the first is an error if not given. ValueError: there is
        no tokenizer. FileNotFoundError: there is no such text.
        """
        bad = bad or BadDocuments()
        return cls(find_sources(settings.data, bad=bad), *encode_texts(backbone), settings, bad)

    def passes(self, text: Text, n_tokens: int | None = None) -> Iterator[TextPass]:
        """Passes until `n_tokens` (`settings.tokens` if not given) were read, in whole rows; fills `text`."""
        s = self.settings
        assert s.context_length is not None
        documents = mix((source.size, _listed(text, source)) for source in self.sources)
        tokenized = (ids for _, ids in encoded(documents, self.encode, self.bad))
        cut = _documents if s.rows == "documents" else _packed
        batch: list[_Row] = []
        size = 0
        left = s.tokens if n_tokens is None else n_tokens
        for row in cut(tokenized, s.context_length, self.end_of_text, prepend=bool(s.prepend_end_of_text)):
            if batch and size + len(row.ids) > s.tokens_per_pass:
                yield _pass(batch, text)
                batch, size = [], 0
            batch.append(row)
            size += len(row.ids)
            left -= int((row.document >= 0).sum())
            if left <= 0:
                break
        if batch:
            yield _pass(batch, text)


@dataclass(frozen=True, eq=False)
class _Row:
    ids: Integers
    document: Integers
    """-1 at end-of-text that was put in."""


def _listed(text: Text, source: DocumentSource) -> Iterator[Document]:
    """The documents of a source; each gets its entry in the order in which `mix` gives them out.

    `mix` asks for a document only when it gives it out, so that entries are numbered as the tokenized documents are.
    """
    for record, document in enumerate(source):
        text.documents.append(DocumentEntry(source.name, record, document.kind, document.labels.get("lang", "")))
        yield document


def _documents(documents: Iterable[list[int]], length: int, end_of_text: int, *, prepend: bool) -> Iterator[_Row]:
    """Rows of one document each. A single token is left out: it has no context."""
    fresh = length - prepend
    for number, tokens in enumerate(documents):
        ids = np.array(tokens, np.int64)
        for start in range(0, len(ids), fresh):
            row = _row(
                ids[start : start + fresh], np.full(len(ids[start : start + fresh]), number), end_of_text, prepend
            )
            if len(row.ids) > 1:
                yield row


def _packed(documents: Iterable[list[int]], length: int, end_of_text: int, *, prepend: bool) -> Iterator[_Row]:
    """Rows of documents joined by end-of-text; the last row may be shorter."""
    fresh = length - prepend
    rest = np.zeros((2, 0), np.int64)  # ids, and the document of each
    for number, tokens in enumerate(documents):
        if tokens:
            added = np.array([[*tokens, end_of_text], [number] * len(tokens) + [-1]], np.int64)
            rest = np.concatenate([rest, added], axis=1)
        while rest.shape[1] >= fresh:
            yield _row(rest[0, :fresh], rest[1, :fresh], end_of_text, prepend)
            rest = rest[:, fresh:]
    if (rest[1] >= 0).sum() > 1:
        yield _row(rest[0], rest[1], end_of_text, prepend)


def _row(ids: Integers, document: Integers, end_of_text: int, prepend: bool) -> _Row:
    if not prepend:
        return _Row(ids, document)
    return _Row(np.concatenate([[end_of_text], ids]), np.concatenate([[-1], document]))


def _pass(rows: list[_Row], text: Text) -> TextPass:
    lengths = np.array([len(row.ids) for row in rows])
    document = np.concatenate([row.document for row in rows])
    is_text = document >= 0
    position = np.concatenate([np.arange(n) for n in lengths])[is_text]
    row = np.repeat(np.arange(len(rows)), lengths)[is_text]
    ids = np.concatenate([row.ids for row in rows])[is_text]
    document = document[is_text]
    n = len(ids)
    changes = (np.diff(document) != 0) | (np.diff(row) != 0)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1]) if n else np.zeros(0, np.int64)
    sizes = np.diff(np.append(starts, n))
    first = text.n_tokens
    began = text.began(int(document[0]), first) if n else first
    text.add(ids, np.stack([starts + first, document[starts], position[starts]], axis=1))
    return TextPass(
        rows=[row.ids.tolist() for row in rows],
        is_text=is_text,
        first=first,
        ids=ids,
        position=position,
        document=document,
        begin=np.repeat(starts, sizes),
        end=np.repeat(starts + sizes, sizes),
        document_began=began,
    )
