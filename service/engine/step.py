"""One forward pass for the rows of a generation step: their edits, the tokens that they sample, their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import BatchEdits, BatchRow, EditOutOfRange
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.kv_cache import KVCache
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site
from service.engine.errors import NonFiniteActivations
from service.engine.sampling import SampledToken, sample
from service.engine.selection import RowRange, select
from service.engine.sequence import GeneratedSequence
from service.engine.work import Csr, Selection, TokenFeatures


@dataclass(slots=True)
class Row:
    """A sequence and how many of its tokens run in a step."""

    sequence: GeneratedSequence
    n: int

    @property
    def completes(self) -> bool:
        """Whether the step reaches the sequence's last token, so that the next one can be sampled."""
        return self.sequence.past + self.n == len(self.sequence.tokens)

    @property
    def sampling(self) -> list[GeneratedSequence]:
        """The sequences that sample from the row's logits: none, its own, or all that share its prompt."""
        return [self.sequence, *self.sequence.followers] if self.completes else []


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a step gave one row."""

    sampled: list[SampledToken]
    """One for each of the row's `sampling`."""
    features: TokenFeatures | None
    """Of the row's tokens, where its request watches features."""


class StepRunner:
    """Runs the rows of a step together."""

    def __init__(self, backbone: Backbone, dictionaries: Mapping[str, Dictionary]) -> None:
        self._backbone = backbone
        self._dictionaries = dictionaries
        self._edits = BatchEdits()
        """Of the step before, and kept while the same sequences decode with the same edits."""

    def run(self, rows: Sequence[Row], cache: KVCache) -> list[RowResult]:
        """A result a row.

        Raises:
            EditOutOfRange: names the rows whose edits are too strong.
            NonFiniteActivations: of some row.
        None of the sequences has changed then.
        """
        sequences = [row.sequence for row in rows]
        packed = PackedTokens.from_rows(
            [s.tokens[s.past : s.past + row.n] for s, row in zip(sequences, rows, strict=True)],
            past=[s.past for s in sequences],
            slots=[s.slot for s in sequences],
        )
        self._edits = edits = self._edits.for_step(
            [BatchRow(s.edits, s.past, row.n, s.tokens) for s, row in zip(sequences, rows, strict=True)]
        )
        watched = self._watched_sites(sequences)
        result = self._backbone.forward(
            packed,
            capture=set(watched.values()),
            edit=_edit_function(edits) if edits else None,
            edit_sites=edits.sites,
            cache=cache,
            logits="last",
        )
        assert result.logits is not None
        sampled = self._sample(rows, result.logits)
        features = self._features(rows, watched, result.activations) if watched else [None] * len(rows)
        return list(map(RowResult, sampled, features))

    def _sample(self, rows: Sequence[Row], logits: Tensor) -> list[list[SampledToken]]:
        """Samples from the rows' logits [B, vocab]; one list a row."""
        sampling = [row.sampling for row in rows]
        index = [i for i, own in enumerate(sampling) for _ in own]
        if not index:
            return [[] for _ in rows]
        if index != list(range(len(rows))):
            logits = logits[index]
        sequences = [sequence for own in sampling for sequence in own]
        drawn = iter(sample(logits, [s.sampler for s in sequences], [s.request.work.top_logprobs for s in sequences]))
        return [[next(drawn) for _ in own] for own in sampling]

    # Watched features

    def _watched_sites(self, sequences: Sequence[GeneratedSequence]) -> dict[str, Site]:
        """Site of every dictionary that some request watches."""
        sites: dict[str, Site] = {}
        for sequence in sequences:
            watched = sequence.request.work.features
            for name in watched.dictionaries if watched else ():
                site = self._dictionaries[name].site
                assert site is not None, "checked before the work was queued"
                sites[name] = Site.parse(site)
        return sites

    def _features(
        self, rows: Sequence[Row], watched: Mapping[str, Site], activations: Mapping[Site, Tensor]
    ) -> list[TokenFeatures | None]:
        spans = []  # of each row: first and last token to tell of, in the row; and the row's start in the batch
        start = 0
        for row in rows:
            spans.append((_first_told(row), row.n, start))
            start += row.n
        found: list[dict[str, Csr]] = [{} for _ in rows]
        for name, site in watched.items():
            asking = [
                i
                for i, row in enumerate(rows)
                if (own := row.sequence.request.work.features)
                and name in own.dictionaries
                and spans[i][0] < spans[i][1]
            ]
            if not asking:
                continue
            index = torch.cat([torch.arange(spans[i][2] + spans[i][0], spans[i][2] + spans[i][1]) for i in asking])
            x = activations[site][index.to(activations[site].device)]
            ranges, n = [], 0
            for i in asking:
                own = rows[i].sequence.request.work.features
                assert own is not None
                count = spans[i][1] - spans[i][0]
                ranges.append(RowRange(n, n + count, Selection("top_k", k=own.top_k)))
                n += count
            try:
                encoded = self._dictionaries[name].encode(x)
            except ValueError as error:
                raise NonFiniteActivations(f"the features of {name!r} cannot be read: {error}") from error
            for i, csr in zip(asking, select(encoded, ranges), strict=True):
                found[i][name] = csr
        told: list[TokenFeatures | None] = []
        for row, span, own_features in zip(rows, spans, found, strict=True):
            if not own_features:
                told.append(None)
                continue
            first, s = row.sequence.past + span[0], row.sequence
            order = row.sequence.request.work.features
            assert order is not None
            by_name = {name: own_features[name] for name in order.dictionaries}
            told.append(TokenFeatures(first, tuple(s.tokens[first : s.past + row.n]), by_name))
        return told


def _first_told(row: Row) -> int:
    """The first of the row's tokens whose features are told."""
    sequence = row.sequence
    watched = sequence.request.work.features
    if watched is None:
        return row.n
    if watched.prompt and sequence.sample == 0:
        return 0
    return min(max(len(sequence.request.work.prompt) - sequence.past, 0), row.n)


def _edit_function(edits: BatchEdits) -> Callable[[Site, Tensor], Tensor]:
    def edit(site: Site, x: Tensor) -> Tensor:
        try:
            return edits.apply(site, x)
        except EditOutOfRange:
            raise
        except ValueError as error:
            # The edits were checked before they were queued; what is left is activations that cannot be encoded.
            raise NonFiniteActivations(f"{site} cannot be edited: {error}") from error

    return edit
