"""Makes the catalogue of a dictionary: reads text once, and measures what its latents lie near to and do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from sae_runtime.catalogue.collect import Collection, collect, measure_first
from sae_runtime.catalogue.effects import ablation_kl, output_scores
from sae_runtime.catalogue.label_examples import ExampleMaker, FindLabel
from sae_runtime.catalogue.labels import find_label
from sae_runtime.catalogue.logit_tokens import LogitTokens, logit_tokens
from sae_runtime.catalogue.neighbors import companions, fires_together, nearest_latents
from sae_runtime.catalogue.pages import Measured, PageMaker, Ranked
from sae_runtime.catalogue.predicates import family, from_json
from sae_runtime.catalogue.random_keys import random_bits
from sae_runtime.catalogue.records import FLAGS, CatalogueInfo, FeaturePage, Label
from sae_runtime.catalogue.schema import SCHEMA_VERSION
from sae_runtime.catalogue.settings import CatalogueSettings, complete_settings
from sae_runtime.catalogue.text import TextReader
from sae_runtime.catalogue.vocabulary import Vocabulary
from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.fingerprint import fingerprint_of
from sae_runtime.model.backbone import Backbone
from sae_runtime.progress import ProgressCallback, ProgressMeter
from sae_runtime.version import code_version

KINDS_SHOWN = 5
"""Commonest kinds of statement whose shares are among the figures."""
LABELLED_F1 = 0.7
"""Least F1 of a label that counts in the figures."""


def build_catalogue(
    backbone: Backbone,
    dictionary: Dictionary,
    settings: CatalogueSettings,
    checkpoint: Path,
    *,
    others: Mapping[str, Dictionary] | None = None,
    find_label: FindLabel = find_label,
    progress: ProgressCallback | None = None,
) -> tuple[CatalogueInfo, Iterator[FeaturePage]]:
    """What a catalogue says of itself, and the pages of all latents, which are made one at a time.

    Args:
        checkpoint: a file for what was gathered so far. An interrupted call that is made again goes on from there, with
            the same result to the bit. Remove it when the pages are written.
        others: dictionaries in which nearest latents are looked up as well, by name.
        find_label: finds the label of a latent, if `settings.labels`.

    Raises:
        ValueError: no site is known, a dictionary does not fit the backbone, there is no tokenizer or no text.
        FileNotFoundError: there is no such text.
        OSError: the checkpoint cannot be written.
    """
    with BadDocuments(settings.bad_documents) as bad:
        build = _Build(backbone, dictionary, complete_settings(settings, dictionary), bad, ProgressMeter(progress))
        nearest = build.nearest(others or {})
        maker = build.collect(nearest[build.name], checkpoint)
    measured = build.measure(maker, nearest)
    if settings.labels:
        measured = replace(measured, labels=build.labels(maker, measured, find_label))
    return build.info(maker, measured), build.pages(maker, measured)


class _Build:
    def __init__(
        self,
        backbone: Backbone,
        dictionary: Dictionary,
        settings: CatalogueSettings,
        bad: BadDocuments,
        meter: ProgressMeter,
    ) -> None:
        self.site = dictionary.site_in(backbone)
        length = min(settings.context_length or backbone.context_length, backbone.context_length)
        self.settings = settings.model_copy(update={"context_length": length})
        self.backbone, self.dictionary, self.meter = backbone, dictionary, meter
        self.name = dictionary.name or "dictionary"
        self.reader = TextReader.open(backbone, self.settings, bad)
        self.fingerprint = fingerprint_of(dictionary)

    def nearest(self, others: Mapping[str, Dictionary]) -> dict[str, Ranked]:
        """Nearest latents by the name of a dictionary, its own first."""
        if self.name in others:
            raise ValueError(f"two dictionaries are called {self.name!r}")
        tables = {}
        count, decoder = self.settings.neighbors, self.dictionary.decoder
        for name, other in {self.name: self.dictionary, **others}.items():
            if other.d_in != self.dictionary.d_in:
                raise ValueError(f"{other} has rows of {other.d_in}, {self.dictionary} of {self.dictionary.d_in}")
            progress = self._stage("neighbors", self.dictionary.n_latents, "latents")
            rows = None if other is self.dictionary else other.decoder
            tables[name] = nearest_latents(decoder, rows, count, progress)
        return tables

    def collect(self, nearest: Ranked, checkpoint: Path) -> PageMaker:
        statistics = self.dictionary.statistics
        if statistics is None:
            statistics = measure_first(self.backbone, self.dictionary, self.reader)
        collection = Collection(self.backbone, self.dictionary, statistics, companions(*nearest), self.settings)
        identity = {"dictionary": self.fingerprint, "backbone": self.backbone.fingerprint, **self.settings.recorded()}
        collect(collection, self.backbone, self.dictionary, self.reader, checkpoint, identity, self.meter)
        if not collection.text.n_tokens:
            raise ValueError(f"no text of two tokens or more in {', '.join(self.settings.data)}")
        tokenizer = self.backbone.text_tokenizer
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.n_ids)]
        pieces += [b""] * (self.backbone.vocab_size - len(pieces))  # rows of the embedding that no token has
        return PageMaker(self.name, collection, pieces, self.settings)

    def measure(self, maker: PageMaker, nearest: Mapping[str, Ranked]) -> Measured:
        logits: LogitTokens | None = None
        s = self.settings
        if s.promoted_tokens and not self.dictionary.transcoder:
            progress = self._stage("logits", maker.n_latents, "latents")
            logits = logit_tokens(self.backbone, self.site, self.dictionary.decoder, s.promoted_tokens, progress)
        measured = Measured(nearest, fires_together(maker.sample.firings, s.together), logits)
        if not s.effect_latents or self.dictionary.transcoder:  # the rows of a transcoder belong to another site
            return measured
        return self._effects(maker, measured, logits)

    def labels(self, maker: PageMaker, measured: Measured, find_label: FindLabel) -> dict[int, Label]:
        progress = self._stage("labels", maker.n_latents, "latents")
        examples = ExampleMaker(maker, measured.nearest[self.name][0])
        vocabulary, labels = Vocabulary(maker.pieces), {}
        for latent in range(maker.n_latents):
            if maker.rates.fired[latent]:
                promoted = () if measured.logits is None else measured.logits.promoted[latent].tolist()
                label = find_label(examples.of(latent), vocabulary, promoted)
                if label is not None:
                    labels[latent] = label
            progress.reach(latent + 1)
        return labels

    def info(self, maker: PageMaker, measured: Measured) -> CatalogueInfo:
        return CatalogueInfo(
            schema_version=SCHEMA_VERSION,
            dictionary=self.name,
            fingerprint=self.fingerprint,
            backbone=self.backbone.name,
            backbone_fingerprint=self.backbone.fingerprint,
            n_latents=maker.n_latents,
            n_tokens=maker.rates.n_tokens,
            n_documents=maker.rates.n_documents,
            sources=tuple(source.name for source in self.reader.sources),
            seed=self.settings.seed,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            code_version=code_version(),
            settings=self.settings.recorded(),
            figures=_figures(maker, measured),
        )

    def pages(self, maker: PageMaker, measured: Measured) -> Iterator[FeaturePage]:
        progress = self._stage("pages", maker.n_latents, "latents")
        for latent in range(maker.n_latents):
            yield maker.page(latent, measured)
            progress.reach(latent + 1)

    def _effects(self, maker: PageMaker, measured: Measured, logits: LogitTokens | None) -> Measured:
        s = self.settings
        live = np.flatnonzero((maker.rates.fired > 0) & (maker.rates.largest > 0))
        drawn = np.sort(live[np.argsort(random_bits(s.seed, "effects", live))][: s.effect_latents]).tolist()
        rows: dict[int, list[list[int]]] = {}
        for latent in drawn:
            contexts = maker.strongest(latent, s.effect_contexts)
            of_latent = [maker.row_until(token, s.effect_window) for token in contexts.token.tolist()]
            rows[latent] = [row for row in of_latent if len(row) > 1]
        rows = {latent: of_latent for latent, of_latent in rows.items() if of_latent}
        kl = ablation_kl(self.backbone, self.dictionary, rows, self._stage("ablation", len(rows), "latents"))
        if logits is None:
            return replace(measured, ablation_kl=kl)
        scores = output_scores(
            self.backbone,
            self.dictionary,
            {latent: float(maker.rates.largest[latent]) for latent in drawn},
            {latent: logits.promoted[latent] for latent in drawn},
            self._neutral_rows(maker),
            self._stage("output score", len(drawn), "latents"),
        )
        return replace(measured, ablation_kl=kl, output_score=scores)

    def _neutral_rows(self, maker: PageMaker) -> list[list[int]]:
        """Rows up to random tokens of the sample."""
        s = self.settings
        order = np.argsort(random_bits(s.seed, "neutral", maker.sample.token))[: s.effect_contexts]
        return [maker.row_until(token, s.effect_window) for token in maker.sample.token[order].tolist()]

    def _stage(self, name: str, total: int, unit: str) -> ProgressMeter:
        self.meter.begin(name, total, unit)
        return self.meter


def _figures(maker: PageMaker, measured: Measured) -> dict[str, float]:
    """Shares of live latents, but "dead", which is of all; and medians of token_r2 and of the labels' precision.

    "labelled" is the share with a label of LABELLED_F1 or more, "labelled_by_…" that of each kind of statement.
    """
    live = np.flatnonzero(maker.rates.fired).tolist()
    flags = [maker.flags(latent) for latent in live]
    figures: dict[str, float] = {"dead": 1 - len(live) / maker.n_latents}
    figures |= {name: sum(name in of for of in flags) / max(len(live), 1) for name in FLAGS if name != "dead"}
    r2 = [value for latent in live if (value := maker.token_r2[latent]) is not None]
    figures["median_token_r2"] = float(np.median(r2)) if r2 else 0.0
    labels = [label for label in measured.labels.values() if (label.f1 or 0.0) >= LABELLED_F1]
    figures["label_precision"] = float(np.median([label.precision or 0.0 for label in labels])) if labels else 0.0
    figures["labelled"] = len(labels) / max(len(live), 1)
    kinds = Counter(family(from_json(label.predicate)) for label in labels if label.predicate)
    for kind, count in kinds.most_common(KINDS_SHOWN):
        figures[f"labelled_by_{kind}"] = count / len(live)
    return figures
