"""One forward pass for the rows of a generation step: their edits, the tokens that they sample, their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.readings import Places, Readings
from sae_runtime.edits import BatchEdits, BatchRow, EditOutOfRange
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.kv_cache import KVCache
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site
from service.engine.errors import NonFiniteActivations
from service.engine.observer import FeatureObserver, observe_readings
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
        """The sequences that sample from the row's logits: none, the row's sequence, or it and its followers."""
        return [self.sequence, *self.sequence.followers] if self.completes else []


@dataclass(frozen=True, slots=True)
class RowResult:
    """The result of one row of a step."""

    sampled: list[SampledToken]
    """One token for each sequence of the row's `sampling`."""
    features: TokenFeatures | None
    """Of the row's tokens, where its request watches features."""


@dataclass(frozen=True, slots=True)
class _Watched:
    """A dictionary that a request of the step watches."""

    dictionary: Dictionary
    site: Site
    edited: bool
    """Whether the step edits the site. Then the features are those of the edited model."""
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By row: places [start, end) in the packed batch of the tokens whose features are returned."""

    @property
    def tokens(self) -> Places:
        return np.concatenate([np.arange(start, end) for start, end in self.spans.values()])


class StepRunner:
    """Runs the rows of a step together."""

    def __init__(
        self, backbone: Backbone, dictionaries: Mapping[str, Dictionary], observe: FeatureObserver | None = None
    ) -> None:
        self._backbone = backbone
        self._dictionaries = dictionaries
        self._observe = observe
        self._edits = BatchEdits()
        """Edits of the last step. They are kept while the same sequences decode with the same edits."""

    def run(self, rows: Sequence[Row], cache: KVCache) -> list[RowResult]:
        """Runs the rows in one forward pass and returns one result a row. An error leaves all sequences unchanged.

        Raises:
            EditOutOfRange: names the rows whose edits are too strong.
            NonFiniteActivations: the activations of a row cannot be edited or encoded.
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
        # A watched dictionary at a site that is not edited shares its reading with conditions on it.
        watched, readings = self._watched(rows), Readings()
        for dictionary in watched.values():
            readings.want(dictionary.dictionary, dictionary.tokens, edited=dictionary.edited)
        result = self._backbone.forward(
            packed,
            capture={dictionary.site for dictionary in watched.values()},
            edit=_edit_function(edits, readings) if edits else None,
            edit_sites=edits.sites,
            cache=cache,
            logits="last",
        )
        assert result.logits is not None
        sampled = self._sample(rows, result.logits)
        features = _features(rows, watched, readings, result.activations)
        if self._observe is not None:
            requests = [s.request.number for s in sequences]
            observe_readings(self._observe, "generate", readings, requests, packed.lengths, packed.past)
        return list(map(RowResult, sampled, features))

    def _sample(self, rows: Sequence[Row], logits: Tensor) -> list[list[SampledToken]]:
        """Samples from the rows' logits [B, vocab]. Returns one list a row.

        The logits of a row repeat once for each of its sequences:

            sampling   [[a], [], [b, b1, b2]]   row 1 is in the midst of its prompt; b1 and b2 follow b
            index      [0, 2, 2, 2]
        """
        sampling = [row.sampling for row in rows]
        index = [i for i, receivers in enumerate(sampling) for _ in receivers]
        if not index:
            return [[] for _ in rows]
        if index != list(range(len(rows))):
            logits = logits[index]
        sequences = list(chain.from_iterable(sampling))
        drawn = iter(sample(logits, [s.sampler for s in sequences], [s.request.work.top_logprobs for s in sequences]))
        return [[next(drawn) for _ in receivers] for receivers in sampling]

    def _watched(self, rows: Sequence[Row]) -> dict[str, _Watched]:
        """The dictionaries that the rows' requests watch on tokens of this step."""
        watched: dict[str, _Watched] = {}
        start = 0
        for i, row in enumerate(rows):
            order, first = row.sequence.request.work.features, _first_watched(row)
            for name in order.dictionaries if order and first < row.n else ():
                if name not in watched:
                    dictionary = self._dictionaries[name]
                    site = dictionary.require_site()
                    watched[name] = _Watched(dictionary, site, site in self._edits.edited_sites)
                watched[name].spans[i] = start + first, start + row.n
            start += row.n
        return watched


def _features(
    rows: Sequence[Row], watched: Mapping[str, _Watched], readings: Readings, activations: Mapping[Site, Tensor]
) -> list[TokenFeatures | None]:
    """The features that the rows' requests watch, on this step's tokens; one entry a row."""
    by_row: list[dict[str, Csr]] = [{} for _ in rows]
    for name, dictionary in watched.items():
        try:
            reading = readings.read(dictionary.dictionary, activations[dictionary.site], edited=dictionary.edited)
        except ValueError as error:
            raise NonFiniteActivations(f"the features of {name!r} cannot be read: {error}") from error
        ranges, n = [], 0
        for i, (start, end) in dictionary.spans.items():
            order = rows[i].sequence.request.work.features
            assert order is not None
            ranges.append(RowRange(n, n + end - start, Selection("top_k", k=order.top_k, rank_by=order.rank_by)))
            n += end - start
        for i, csr in zip(
            dictionary.spans,
            select(reading.rows(dictionary.tokens), ranges, dictionary.dictionary.statistics),
            strict=True,
        ):
            by_row[i][name] = csr
    token_features: list[TokenFeatures | None] = []
    for row, features in zip(rows, by_row, strict=True):
        sequence, order = row.sequence, row.sequence.request.work.features
        if not features or order is None:
            token_features.append(None)
            continue
        first = sequence.past + _first_watched(row)
        tokens = tuple(sequence.tokens[first : sequence.past + row.n])
        token_features.append(TokenFeatures(first, tokens, {name: features[name] for name in order.dictionaries}))
    return token_features


def _first_watched(row: Row) -> int:
    """The first of the row's tokens whose features its request watches; row.n if there are none."""
    sequence = row.sequence
    watched = sequence.request.work.features
    if watched is None:
        return row.n
    if watched.prompt and sequence.sample == 0:
        return 0
    return min(max(len(sequence.request.work.prompt) - sequence.past, 0), row.n)


def _edit_function(edits: BatchEdits, readings: Readings) -> Callable[[Site, Tensor], Tensor]:
    def edit(site: Site, x: Tensor) -> Tensor:
        try:
            return edits.apply(site, x, readings)
        except EditOutOfRange:
            raise
        except ValueError as error:
            # The edits were checked before they were queued, so this error is about activations that cannot be encoded.
            raise NonFiniteActivations(f"{site} cannot be edited: {error}") from error

    return edit
