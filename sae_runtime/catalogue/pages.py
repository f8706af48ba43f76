"""Puts together what was gathered and measured of every latent: its page, and the contexts that measurements need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.collect import Collection
from sae_runtime.catalogue.contexts import ChosenContexts
from sae_runtime.catalogue.logit_tokens import LogitTokens
from sae_runtime.catalogue.records import (
    DENSE_RATE,
    POSITIONAL_CORRELATION,
    SINGLE_TOKEN_R2,
    Context,
    FeaturePage,
    FeatureSummary,
    Flag,
    Kind,
    Label,
    Neighbor,
    Place,
    TokenFigure,
)
from sae_runtime.catalogue.row_sample import RowSample
from sae_runtime.catalogue.settings import CatalogueSettings

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]
Ranked = tuple[Integers, npt.NDArray[np.float32]]
"""Latents [n, c], -1 where there are fewer, and their scores."""

HALVES = (0, 1)
_TOP_TOKENS = 5


@dataclass(frozen=True, eq=False)
class Measured:
    """What is measured of latents beside the pass over the text."""

    nearest: Mapping[str, Ranked]
    """By the name of a dictionary."""
    together: Ranked
    logits: LogitTokens | None
    ablation_kl: Mapping[int, float] = field(default_factory=dict)
    output_score: Mapping[int, float] = field(default_factory=dict)
    labels: Mapping[int, Label] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the tokens lie that a context can be shown of: arrays [n]."""

    token: Integers
    """Ascending."""
    begin: Integers
    """The first token of its stretch."""
    end: Integers
    """After the last."""
    document: Integers
    position: Integers
    """In its document."""
    character: Integers


class PageMaker:
    """Makes the pages of one dictionary."""

    def __init__(self, name: str, collection: Collection, pieces: Sequence[bytes], settings: CatalogueSettings) -> None:
        """`pieces`: the bytes of every token id."""
        self.name, self.collection, self.pieces, self.settings = name, collection, pieces, settings
        self.text, self.rates = collection.text, collection.rates
        self.sample: RowSample = collection.rows.sample()
        self._position_correlation = self.rates.position_correlation()

    @property
    def n_latents(self) -> int:
        return self.rates.n_latents

    @cached_property
    def token_r2(self) -> list[float | None]:
        """Of every latent."""
        sums = zip(self.rates.total.tolist(), self.rates.squares.tolist(), strict=True)
        return [self.collection.token_sums.explained(latent, *of_latent) for latent, of_latent in enumerate(sums)]

    def flags(self, latent: int) -> tuple[Flag, ...]:
        if not self.rates.fired[latent]:
            return ("dead",)
        flags: list[Flag] = []
        if self.rates.fired[latent] > DENSE_RATE * self.rates.n_tokens:
            flags.append("dense")
        if abs(self._position_correlation[latent]) >= POSITIONAL_CORRELATION:
            flags.append("positional")
        if (self.token_r2[latent] or 0.0) >= SINGLE_TOKEN_R2:
            flags.append("single_token")
        return tuple(flags)

    def page(self, latent: int, measured: Measured) -> FeaturePage:
        rates, fired = self.rates, int(self.rates.fired[latent])
        active = self._active_tokens(latent)
        label = measured.labels.get(latent)
        summary = FeatureSummary(
            feature=latent,
            label=label.text if label else "",
            label_source=label.source if label else "",
            label_f1=label.f1 if label else None,
            firing_rate=fired / max(rates.n_tokens, 1),
            max_activation=float(rates.largest[latent]),
            flags=self.flags(latent),
            top_tokens=tuple(figure.piece for figure in active[:_TOP_TOKENS]),
        )
        promoted, suppressed = self._logit_tokens(latent, measured.logits)
        return FeaturePage(
            summary=summary,
            labels=(label,) if label else (),
            document_rate=float(rates.documents[latent] / max(rates.n_documents, 1)),
            n_firings=fired,
            mean_active=float(rates.total[latent] / max(fired, 1)),
            token_r2=self.token_r2[latent],
            position_correlation=float(self._position_correlation[latent]),
            histogram=tuple(rates.histogram[latent].tolist()),
            rate_by_position=tuple((rates.by_position[latent] / rates.position_tokens.clip(min=1)).tolist()),
            rate_by_kind=rates.kinds.rates(latent),
            rate_by_language=rates.languages.rates(latent),
            active_tokens=active,
            promoted=promoted,
            suppressed=suppressed,
            neighbors=tuple(self._neighbors(latent, measured)),
            ablation_kl=measured.ablation_kl.get(latent),
            output_score=measured.output_score.get(latent),
            contexts=self.contexts(latent),
        )

    def contexts(self, latent: int) -> tuple[Context, ...]:
        """The contexts on the page: the strongest, of each quantile, random ones, silent ones; none twice."""
        collector, s = self.collection.contexts, self.settings
        chosen: list[tuple[Kind, int, ChosenContexts]] = [("strongest", -1, self.strongest(latent, s.shown_strongest))]
        for quantile in range(collector.n_quantiles):
            halves = [collector.of_quantile(latent, half, quantile) for half in HALVES]
            chosen.append(("quantile", quantile, _alternating(halves)[: s.shown_quantile]))
        random = _alternating([collector.random(latent, half) for half in HALVES])[: s.shown_random]
        chosen += [("random", -1, random), ("silent", -1, self._silent(latent, s.shown_silent))]
        joined = ChosenContexts.joined([contexts for _, _, contexts in chosen])
        kinds = [(kind, quantile) for kind, quantile, contexts in chosen for _ in contexts.token]
        _, first = np.unique(joined.token, return_index=True)
        first.sort()
        return tuple(self._contexts([kinds[i] for i in first], joined[first]))

    def strongest(self, latent: int, count: int) -> ChosenContexts:
        """Its strongest contexts, at most one a document, the strongest first."""
        halves = [self.collection.contexts.strongest(latent, half) for half in HALVES]
        joined = ChosenContexts.joined(halves)
        peak = joined.activations[:, self.settings.tokens_before]
        return joined[np.lexsort((joined.token, -peak))[:count]]

    def row_until(self, token: int, length: int) -> list[int]:
        """Token ids of a stretch up to a token, at most `length` of them; at least two where the stretch has two."""
        (start,), (end,) = self.text.stretch(np.array([token]))
        after = min(max(token + 1, start + 2), end)
        row: list[int] = self.text.ids[max(start, after - length) : after].tolist()
        return row

    def _silent(self, latent: int, count: int) -> ChosenContexts:
        sample, before = self.sample, self.settings.tokens_before
        shares = (count - count // 2, count // 2)
        index = np.concatenate(
            [sample.silent(latent, h, n, self.settings.seed) for h, n in zip(HALVES, shares, strict=True)]
        )
        around = index[:, None] + np.arange(-before, self.settings.tokens_after + 1)
        inside = (around >= sample.begin[index][:, None]) & (around < sample.end[index][:, None])
        values = sample.firings.at(np.where(inside, around, index[:, None]), np.array([[latent]])) * inside
        return ChosenContexts(sample.token[index], values, np.zeros(len(index), np.uint64))

    def _contexts(self, kinds: Sequence[tuple[Kind, int]], chosen: ChosenContexts) -> Iterator[Context]:
        s, places = self.settings, self._places
        index = np.searchsorted(places.token, chosen.token)
        first = np.maximum(places.begin[index], chosen.token - s.tokens_before)
        after = np.minimum(places.end[index], chosen.token + s.tokens_after + 1)
        skipped = first - (chosen.token - s.tokens_before)  # of the window, before the stretch begins
        for i, (kind, quantile) in enumerate(kinds):
            n, place = int(after[i] - first[i]), int(index[i])
            document = self.text.documents[places.document[place]]
            yield Context(
                kind=kind,
                quantile=quantile,
                tokens=tuple([self.pieces[token] for token in self.text.ids[first[i] : after[i]].tolist()]),
                activations=tuple(chosen.activations[i, skipped[i] : skipped[i] + n].tolist()),
                peak=int(chosen.token[i] - first[i]),
                place=Place(
                    source=document.source,
                    record=document.record,
                    position=int(places.position[place]),
                    character=int(places.character[place]),
                    text_kind=document.kind,
                    language=document.language,
                ),
            )

    @cached_property
    def _places(self) -> _Places:
        token = np.unique(np.concatenate([self.collection.contexts.tokens(), self.sample.token]))
        return _Places(
            token,
            *self.text.stretch(token),
            document=self.text.document(token),
            position=self.text.position_in_document(token),
            character=self.text.characters(token, self.pieces),
        )

    def _active_tokens(self, latent: int) -> tuple[TokenFigure, ...]:
        tokens, sums, counts = self.collection.token_sums.tokens(latent)
        order = np.lexsort((tokens, -sums))[: self.settings.active_tokens]
        return tuple(
            TokenFigure(int(tokens[i]), self.pieces[tokens[i]], float(sums[i] / counts[i]), int(counts[i]))
            for i in order
        )

    def _logit_tokens(
        self, latent: int, logits: LogitTokens | None
    ) -> tuple[tuple[TokenFigure, ...], tuple[TokenFigure, ...]]:
        if logits is None:
            return (), ()
        lists = (
            (logits.promoted[latent], logits.promoted_change[latent]),
            (logits.suppressed[latent], logits.suppressed_change[latent]),
        )
        promoted, suppressed = (
            tuple(
                TokenFigure(token, self.pieces[token] if token < len(self.pieces) else b"", change)
                for token, change in zip(tokens.tolist(), changes.tolist(), strict=True)
            )
            for tokens, changes in lists
        )
        return promoted, suppressed

    def _neighbors(self, latent: int, measured: Measured) -> list[Neighbor]:
        neighbors = [
            Neighbor(name, other, score, "decoder")
            for name, (latents, cosines) in measured.nearest.items()
            for other, score in zip(latents[latent].tolist(), cosines[latent].tolist(), strict=True)
            if other >= 0
        ]
        partners, phi = measured.together
        neighbors += [
            Neighbor(self.name, other, score, "together")
            for other, score in zip(partners[latent].tolist(), phi[latent].tolist(), strict=True)
            if other >= 0
        ]
        return neighbors


def _alternating(halves: Sequence[ChosenContexts]) -> ChosenContexts:
    """The contexts of both halves by turns, each in its (random) order."""
    joined = ChosenContexts.joined(list(halves))
    turn = np.concatenate([2 * np.arange(len(h.token)) + i for i, h in enumerate(halves)])
    return joined[np.argsort(turn)]
