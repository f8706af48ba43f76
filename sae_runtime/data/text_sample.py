"""The text of an evaluation: rows of tokens that know which document each token came from, in two splits."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.documents import Document
from sae_runtime.data.rows import encode_texts, encoded, mixed_documents, shuffled_held_out
from sae_runtime.data.token_folder.manifest import lone_token_folder
from sae_runtime.data.token_folder.reader import TokenFolder, shuffled_documents
from sae_runtime.model.backbone import Backbone

Integers = npt.NDArray[np.int64]

TASK_LABELS = ("kind", "lang", "author", "page")
"""Fields of the held-out records that probe tasks are made from. A record may lack any but its kind."""

_CHARACTERS_PER_TOKEN = (
    16  # read so much text for a token, so that the choice is a fair sample; as the training job does
)


@dataclass(frozen=True, eq=False)
class TextSample:
    """Rows of held-out tokens, N tokens together, and the document of each token."""

    rows: list[list[int]]
    documents: list[Document]
    document: Integers
    """[N], index into `documents`; -1 at an end-of-text token that was put before a row."""
    fit: npt.NDArray[np.bool_]
    """[N], whether a token belongs to the split that probes and explanations are fitted on; the rest scores them."""

    @property
    def n_tokens(self) -> int:
        return len(self.document)

    @cached_property
    def ids(self) -> Integers:
        """[N] token ids."""
        return np.array([token for row in self.rows for token in row], np.int64)

    @cached_property
    def row(self) -> Integers:
        """[N], the row of each token."""
        return np.repeat(np.arange(len(self.rows)), [len(row) for row in self.rows])

    @cached_property
    def row_start(self) -> Integers:
        """[N], the first token of each token's row."""
        lengths = np.array([len(row) for row in self.rows])
        return np.repeat(np.cumsum(lengths) - lengths, lengths)

    @cached_property
    def position(self) -> Integers:
        """[N], position of each token in its row."""
        return np.arange(self.n_tokens) - self.row_start

    def labels(self, document: int) -> dict[str, str]:
        """The fields of a document that tasks are made from."""
        record = self.documents[document]
        labels = {name: record.labels[name] for name in TASK_LABELS if name in record.labels}
        return labels | {"kind": record.kind}

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of text that occur, sorted."""
        present = np.unique(self.document[self.document >= 0])
        return sorted({self.documents[int(i)].kind for i in present})

    @cached_property
    def kind(self) -> Integers:
        """[N], index into `kinds`; -1 where there is no document."""
        number = {kind: i for i, kind in enumerate(self.kinds)}
        of_document = np.array([number.get(d.kind, -1) for d in self.documents] + [-1])
        return of_document[self.document]  # document -1 reads the last entry

    def first(self, n_tokens: int) -> TextSample:
        """The first whole rows that hold at least `n_tokens` tokens together, or all there are."""
        ends = np.cumsum([len(row) for row in self.rows])
        n_rows = min(int(np.searchsorted(ends, n_tokens)) + 1, len(self.rows))
        end = int(ends[n_rows - 1])
        return TextSample(self.rows[:n_rows], self.documents, self.document[:end], self.fit[:end])


def read_sample(
    backbone: Backbone,
    paths: Sequence[str | Path],
    n_tokens: int,
    *,
    context_length: int | None = None,
    rows: Literal["packed", "documents"] = "packed",
    prepend_end_of_text: bool = False,
    seed: int = 0,
    bad: BadDocuments | None = None,
) -> TextSample:
    """At least `n_tokens` tokens in whole rows, or all there is: a seeded mixture of the documents of all files.

    `paths` may be one token folder instead (see `saeserve tokenize`): then the documents are its held-out ones, which
    have no text and no label but the folder's name. The default row length is then the folder's.

    `bad` says what becomes of documents that cannot be used; the first is an error if not given.

    The rows are those that the training job evaluates on for the same seed (`held_out_rows`).

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: no row of two tokens, or a context length over the backbone's; or no tokenizer; a folder that is not
            a token folder, is of another tokenizer, or stands beside other paths.
    """
    folder = _token_folder(paths, backbone)
    length = context_length or (backbone.context_length if folder is None else folder.manifest.context_length)
    if length > backbone.context_length:
        raise ValueError(f"context_length is {length}, the backbone reads at most {backbone.context_length}")
    encode, end_of_text = encode_texts(backbone)
    if folder is None:
        documents = shuffled_held_out(mixed_documents(paths, bad), n_tokens * _CHARACTERS_PER_TOKEN, seed)
        tokenized = (ids for _, ids in encoded(documents, encode, bad))
    else:
        order = shuffled_documents(folder, seed)
        documents = [Document("", folder.path.name)] * len(order)
        tokenized = (folder.text_tokens(folder.document("held_out", i)) for i in order)
    prefix = [end_of_text] if prepend_end_of_text else []
    fresh = length - len(prefix)
    cut: list[list[int]] = []
    owners: list[list[int]] = []
    rest: list[int] = []
    rest_owners: list[int] = []
    size = 0
    for number, ids in enumerate(tokenized):
        if size >= n_tokens:
            break
        rest = rest + ids + ([end_of_text] if rows == "packed" and ids else [])
        rest_owners += [number] * (len(rest) - len(rest_owners))
        while size < n_tokens and len(rest) >= (fresh if rows == "packed" else 1):
            row, row_owners = prefix + rest[:fresh], [-1] * len(prefix) + rest_owners[:fresh]
            rest, rest_owners = rest[fresh:], rest_owners[fresh:]
            if len(row) > 1:  # a single token has no context and predicts nothing
                cut.append(row)
                owners.append(row_owners)
                size += len(row)
    if not cut and len(rest) > 1:
        cut, owners = [rest], [rest_owners]  # less text than one row: it alone
    if not cut:
        raise ValueError(f"no held-out text of two tokens or more in {', '.join(map(str, paths)) or 'no files'}")
    document = np.array([owner for row in owners for owner in row], np.int64)
    return TextSample(cut, documents, document, _fit_split(documents, document, owners, seed))


def _token_folder(paths: Sequence[str | Path], backbone: Backbone) -> TokenFolder | None:
    path = lone_token_folder([Path(path) for path in paths])
    if path is None:
        return None
    folder = TokenFolder(path)
    folder.check(backbone)
    return folder


def _fit_split(
    documents: list[Document], document: Integers, owners: list[list[int]], seed: int
) -> npt.NDArray[np.bool_]:
    """Half of the documents of every combination of labels, in a seeded order; a lone document is split by rows."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number in sorted(set(document.tolist()) - {-1}):
        record = documents[number]
        groups[(record.kind, *(record.labels.get(name) for name in TASK_LABELS))].append(number)
    in_fit = np.zeros(len(documents) + 1, bool)  # the last entry is that of no document
    lone = np.zeros(len(documents) + 1, bool)
    order = random.Random(seed)
    for group in sorted(groups.items(), key=str):
        numbers = group[1]
        if len(numbers) == 1:
            lone[numbers] = True
        else:
            order.shuffle(numbers)
            in_fit[numbers[::2]] = True
    row = np.repeat(np.arange(len(owners)), [len(of_row) for of_row in owners])
    return np.where(lone[document], row % 2 == 0, in_fit[document])
