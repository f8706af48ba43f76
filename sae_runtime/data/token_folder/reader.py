"""Token folders for training: rows of the train split, documents of the held-out split."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae_runtime.data.rows import RowCutter
from sae_runtime.data.token_folder.manifest import Split, TokenManifest, read_manifest
from sae_runtime.data.token_folder.shard_files import check_sums, map_shard
from sae_runtime.model.backbone import Backbone


class TokenFolder:
    """A folder that `saeserve tokenize` wrote, its shards memory-mapped. Safe for several processes."""

    def __init__(self, path: Path) -> None:
        """Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: the manifest cannot be read, or the size of a file differs from it.
        """
        self.path = path
        self.manifest: TokenManifest = read_manifest(path)
        splits: tuple[Split, ...] = ("train", "held_out")
        self._shards = {
            split: [map_shard(path, shard, self.manifest.dtype) for shard in self.manifest.shards(split)]
            for split in splits
        }

    def check(self, backbone: Backbone) -> None:
        """ValueError, naming both, unless the tokens are those of this backbone's tokenizer."""
        made_by, fingerprint = self.manifest.tokenizer, backbone.tokenizer_fingerprint
        if made_by.fingerprint != fingerprint:
            raise ValueError(
                f"{self.path} was tokenized with tokenizer {made_by.fingerprint} (of backbone {made_by.backbone!r}), "
                f"found backbone {backbone.name!r} with tokenizer {fingerprint or 'none'}"
            )

    def check_sums(self) -> None:
        """Reads every file. ValueError names the first whose checksum differs from the manifest's."""
        for shard in (*self.manifest.train, *self.manifest.held_out):
            check_sums(self.path, shard)

    def n_documents(self, split: Split) -> int:
        return self.manifest.documents(split)

    def document(self, split: Split, index: int) -> list[int]:
        """The token ids of a document as they are stored, special tokens included."""
        for tokens, ends in self._shards[split]:
            if index < len(ends):
                return tokens[ends[index - 1] if index else 0 : ends[index]].tolist()  # type: ignore[no-any-return]
            index -= len(ends)
        raise IndexError(f"{self.path} has {self.n_documents(split)} documents in {split}")

    def text_tokens(self, document: list[int]) -> list[int]:
        """A stored document's tokens without the end-of-text that follows each, which a RowCutter adds itself."""
        return document[:-1] if self.manifest.append_end_of_text else document

    def documents_from(self, split: Split, first: int) -> Iterator[list[int]]:
        """Stored documents in order, from the `first`."""
        for tokens, ends in self._shards[split]:
            for index in range(min(first, len(ends)), len(ends)):
                yield tokens[ends[index - 1] if index else 0 : ends[index]].tolist()
            first = max(0, first - len(ends))

    def stored_tokens(self, split: Split) -> _JoinedTokens:
        return _JoinedTokens([tokens for tokens, _ in self._shards[split]])


def shuffled_documents(folder: TokenFolder, seed: int) -> list[int]:
    """The held-out documents in a seeded order."""
    order = list(range(folder.n_documents("held_out")))
    random.Random(seed).shuffle(order)
    return order


class _JoinedTokens:
    """The tokens of all shards as one sequence."""

    def __init__(self, shards: list[Any]) -> None:
        self._shards = shards
        self._starts = [0, *np.cumsum([len(shard) for shard in shards]).tolist()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> list[int]:
        tokens: list[int] = []
        shard = bisect_right(self._starts, start) - 1
        while start < stop:
            offset = start - self._starts[shard]
            piece = self._shards[shard][offset : offset + stop - start].tolist()
            tokens += piece
            start += len(piece)
            shard += 1
        return tokens


class PackedFolderRows:
    """Endless full rows of the train split, documents one after the other as they are stored; a RowSource.

    Row i of an epoch is at a place that can be computed, so a position is restored without reading. The tokens of a
    last row that would not be full are left out, as in TrainingRows.
    """

    def __init__(self, folder: TokenFolder, cutter: RowCutter) -> None:
        """Raises:
        ValueError: the folder has fewer tokens than a row.
        """
        self._tokens = folder.stored_tokens("train")
        self._prefix = [cutter.end_of_text] if cutter.prepend_end_of_text else []
        self._fresh = cutter.context_length - len(self._prefix)
        self._per_epoch = len(self._tokens) // self._fresh
        if self._per_epoch == 0:
            raise ValueError(
                f"{folder.path} has {len(self._tokens)} training tokens, expected at least a row of {self._fresh}"
            )
        self._next = 0  # rows given, all epochs

    @property
    def epoch(self) -> int:
        return max(self._next - 1, 0) // self._per_epoch

    def __iter__(self) -> PackedFolderRows:
        return self

    def __next__(self) -> list[int]:
        start = self._next % self._per_epoch * self._fresh
        self._next += 1
        return self._prefix + self._tokens.read(start, start + self._fresh)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]


class DocumentFolderRows:
    """Endless rows of the train split that belong to one document each; a RowSource."""

    def __init__(self, folder: TokenFolder, cutter: RowCutter) -> None:
        self._folder = folder
        self._prefix = [cutter.end_of_text] if cutter.prepend_end_of_text else []
        self._fresh = cutter.context_length - len(self._prefix)
        self.epoch = 0
        self._document, self._offset = 0, 0  # where the next row begins
        self._rows = self._endless()

    def __iter__(self) -> DocumentFolderRows:
        return self

    def __next__(self) -> list[int]:
        return next(self._rows)

    def _endless(self) -> Iterator[list[int]]:
        epoch = self.epoch
        while True:
            first, has_row = (self._document, self._offset), False
            for stored in self._folder.documents_from("train", first[0]):
                tokens = self._folder.text_tokens(stored)
                while self._offset < len(tokens):
                    row = self._prefix + tokens[self._offset : self._offset + self._fresh]
                    self._offset += self._fresh
                    if len(row) > 1:  # a single token has no context and predicts nothing
                        has_row, self.epoch = True, epoch
                        yield row
                self._document, self._offset = self._document + 1, 0
            if first == (0, 0) and not has_row:
                raise ValueError(f"{self._folder.path} has no document of two tokens to train on")
            epoch, self._document = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "document": self._document, "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self._document, self._offset = state["epoch"], state["document"], state["offset"]
        self._rows = self._endless()
