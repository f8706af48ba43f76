"""The strongest contexts of every latent: the quickest way to see what a feature means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runtime.data.documents import Document
from sae_runtime.data.rows import encode_texts, encoded, packed_passes
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.model.backbone import Backbone

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class FeatureContext:
    """One place where a latent is active, with the tokens around it."""

    value: float
    """Activation at the peak."""
    document: int
    """Number of the document, in the order given."""
    kind: str
    position: int
    """Token position of the peak in the document."""
    tokens: tuple[str, ...]
    """The text of the tokens around the peak; a token with part of a character shows U+FFFD."""
    activations: tuple[float, ...]
    """The latent's activation on each of them."""
    peak: int
    """Index of the peak in `tokens`."""


@torch.no_grad()
def top_contexts(
    backbone: Backbone,
    dictionary: Dictionary,
    documents: Iterable[Document],
    n_contexts: int = 5,
    window: int = 12,
    *,
    tokens_per_pass: int = 8_192,
) -> list[list[FeatureContext]]:
    """For each latent its strongest contexts, strongest first, at most one of each document.

    Documents are read once, in rows of the backbone's context length; memory grows with n_latents × n_contexts only.
    A context holds up to `window` tokens on either side of the peak.

    Raises:
        ValueError: the dictionary does not say which site it reads, or the backbone lacks that site or a tokenizer.
    """
    site = dictionary.site_in(backbone)
    best = _Table(dictionary.n_latents, n_contexts, window)
    kinds: list[str] = []
    for batch in _batches(backbone, documents, tokens_per_pass):
        length = backbone.context_length
        rows = [ids[start : start + length] for _, ids in batch for start in range(0, len(ids), length)]
        chunks = [
            dictionary.encode(backbone.forward(packed, capture=[site]).activations[site])
            for packed in packed_passes(rows, tokens_per_pass)
        ]
        indices = torch.cat([_padded(c.indices, chunks, -1) for c in chunks])
        values = torch.cat([_padded(c.values, chunks, 0) for c in chunks])
        best.add(indices.cpu(), values.float().cpu(), [ids for _, ids in batch], first_document=len(kinds))
        kinds += [kind for kind, _ in batch]
    tokenizer = backbone.tokenizer
    assert tokenizer is not None
    return best.contexts(kinds, lambda token: str(tokenizer.decode([token])))


def _padded(tensor: Tensor, chunks: list[SparseFeatures], value: int) -> Tensor:
    """Columns of ReLU dictionaries differ between chunks: all are brought to the widest."""
    width = max(c.indices.shape[1] for c in chunks)
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)


def _batches(
    backbone: Backbone, documents: Iterable[Document], tokens_per_batch: int
) -> Iterator[list[tuple[str, list[int]]]]:
    """Kinds and tokens of whole documents, together about `tokens_per_batch` tokens or one document."""
    encode, _ = encode_texts(backbone)
    batch: list[tuple[str, list[int]]] = []
    size = 0
    for document, ids in encoded(documents, encode):
        batch.append((document.kind, ids))
        size += len(ids)
        if size >= tokens_per_batch:
            yield batch
            batch, size = [], 0
    if size:
        yield batch


class _Table:
    """The best contexts so far: n slots for each latent, filled from the strongest down."""

    def __init__(self, n_latents: int, n_contexts: int, window: int) -> None:
        self._window = window
        shape, around = (n_latents, n_contexts), 2 * window + 1
        self._values = np.zeros(shape, np.float32)  # 0: empty slot
        self._documents = np.full(shape, -1, np.int64)
        self._positions = np.zeros(shape, np.int64)  # of the peak in its document
        self._tokens = np.full((*shape, around), -1, np.int64)  # -1 beyond the document's ends
        self._activations = np.zeros((*shape, around), np.float32)

    def add(self, indices: Tensor, values: Tensor, documents: list[list[int]], first_document: int) -> None:
        """Features [N, k] of the documents' N tokens, one document after the other."""
        lengths = np.array([len(ids) for ids in documents])
        starts = np.concatenate([[0], lengths.cumsum()])
        document_of_token = np.repeat(np.arange(len(documents)), lengths)
        n_contexts = self._values.shape[1]
        tokens, columns = np.nonzero((values > 0).numpy())
        active, latents = values.numpy()[tokens, columns], indices.numpy()[tokens, columns]

        # The strongest token of each (latent, document): the last of its group when sorted by value.
        pairs = latents * len(documents) + document_of_token[tokens]
        order = np.lexsort((-tokens, active, pairs))
        last = np.flatnonzero(np.diff(pairs[order], append=-1))
        chosen = order[last]
        # The strongest documents of each latent: sorted by value downwards, the first n_contexts of its group.
        chosen = chosen[np.lexsort((chosen, -active[chosen], latents[chosen]))]
        group = latents[chosen]
        rank = np.arange(len(chosen)) - np.searchsorted(group, group)
        chosen = chosen[(rank < n_contexts) & (active[chosen] > self._values[group, -1])]
        rank = np.arange(len(chosen)) - np.searchsorted(latents[chosen], latents[chosen])
        latent, peak = latents[chosen], tokens[chosen]

        around = peak[:, None] + np.arange(-self._window, self._window + 1)  # (m, 2w+1) tokens of this batch
        document = document_of_token[peak]
        inside = (around >= starts[document][:, None]) & (around < starts[document + 1][:, None])
        around = np.where(inside, around, peak[:, None])
        all_ids = np.concatenate([np.asarray(ids, np.int64) for ids in documents])
        nearby = ((indices.numpy()[around] == latent[:, None, None]) * values.numpy()[around]).sum(-1)

        # New candidates get n_contexts slots beside the old ones; the best n_contexts of both stay.
        touched, line = np.unique(latent, return_inverse=True)

        def merge(table: Array, new: Array, keep: Array | None = None) -> Array:
            wide = np.concatenate([table[touched], np.zeros_like(table[touched])], axis=1)
            wide[line, n_contexts + rank] = new
            return wide if keep is None else wide[np.arange(len(touched))[:, None], keep]

        strengths = merge(self._values, active[chosen])
        keep = np.argsort(-strengths, axis=1, kind="stable")[:, :n_contexts]
        self._values[touched] = merge(self._values, active[chosen], keep)
        self._documents[touched] = merge(self._documents, first_document + document, keep)
        self._positions[touched] = merge(self._positions, peak - starts[document], keep)
        self._tokens[touched] = merge(self._tokens, np.where(inside, all_ids[around], -1), keep)
        self._activations[touched] = merge(self._activations, np.where(inside, nearby, 0), keep)

    def contexts(self, kinds: list[str], decode: Callable[[int], str]) -> list[list[FeatureContext]]:
        words = {int(token): decode(int(token)) for token in np.unique(self._tokens) if token >= 0}
        return [
            [self._context(latent, int(slot), kinds, words) for slot in np.flatnonzero(strengths > 0)]
            for latent, strengths in enumerate(self._values)
        ]

    def _context(self, latent: int, slot: int, kinds: list[str], words: dict[int, str]) -> FeatureContext:
        tokens = self._tokens[latent, slot]
        shown = np.flatnonzero(tokens >= 0)
        document = int(self._documents[latent, slot])
        return FeatureContext(
            value=float(self._values[latent, slot]),
            document=document,
            kind=kinds[document],
            position=int(self._positions[latent, slot]),
            tokens=tuple(words[int(token)] for token in tokens[shown]),
            activations=tuple(float(a) for a in self._activations[latent, slot][shown]),
            peak=self._window - int(shown[0]),
        )
