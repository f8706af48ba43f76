"""Causal measurements as work of the engine: rounds of the token budget's size, so that they take turns with the rest.

An ablation study or an attribution first runs its rows, a batch of them at a time, then the variants that this shows to
be needed, a few batches at a time: other work gets its turns in between, the queue is never flooded, and a
cancelled call leaves at most one batch to run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch

from sae_runtime.causal.ablation import (
    AblationStudy,
    Variant,
    VariantEffect,
    in_batches,
    ranked_totals,
    strongest_features,
    total_activation,
)
from sae_runtime.causal.ablation_summary import StudyResult, summarize
from sae_runtime.causal.attribution import AttributionStudy, Target
from sae_runtime.causal.contrast import contrast_features
from sae_runtime.causal.report import (
    Attribution,
    FeatureAttribution,
    FeatureContrast,
    FeatureId,
    SetScore,
    SuggestionTrial,
)
from sae_runtime.causal.score import ScoredRow
from sae_runtime.causal.suggestion import STRENGTH_FACTORS, at_strength, set_score, suggest_edit
from sae_runtime.dictionary.dictionary import Dictionary, find_dictionary
from sae_runtime.edits import Edit, resolve_references
from sae_runtime.edits.edit import terms
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from service.engine.admission import check_row_edits, check_rows, check_tokens
from service.engine.batch import Scoring
from service.engine.measure_work import (
    AblateResult,
    AblateWork,
    AttributeResult,
    AttributeWork,
    ContrastResult,
    ContrastWork,
    ScoreResult,
    ScoreWork,
)
from service.engine.settings import EngineSettings
from service.engine.work import Csr, DictionaryRows, ExtractResult, ExtractWork, Selection, WorkTiming

BATCHES_AT_ONCE = 2
"""Batches of variants of one study that wait in the queue together."""


class Run(Protocol):
    """Engine._run."""

    def __call__(
        self, kind: tuple[str, Hashable], content: Any, sizes: Sequence[int], *, under_way: bool = False
    ) -> Awaitable[tuple[list[Any], WorkTiming]]: ...


class Extract(Protocol):
    """Engine.extract."""

    def __call__(self, work: ExtractWork, *, under_way: bool = False) -> Awaitable[ExtractResult]: ...


@dataclass(slots=True)
class _Timer:
    """The timing of work that runs in several rounds."""

    queue_s: float = 0.0
    compute_s: float = 0.0

    def add(self, timing: WorkTiming) -> None:
        self.queue_s = max(self.queue_s, timing.queue_s)
        self.compute_s += timing.compute_s

    @property
    def under_way(self) -> bool:
        """Whether a round has run: the later ones are queued where a new request would be refused."""
        return self.compute_s > 0

    @property
    def timing(self) -> WorkTiming:
        return WorkTiming(self.queue_s, self.compute_s)


@dataclass(slots=True)
class Measurements:
    """The engine's measurements of effects. They run on its event loop."""

    backbone: Backbone
    dictionaries: Mapping[str, Dictionary]
    settings: EngineSettings
    run: Run
    """Queues the rows of one round and waits for their results."""
    extract: Extract
    _budget: int = field(init=False)

    def __post_init__(self) -> None:
        self._budget = self.settings.max_batch_tokens

    # Reference texts

    async def resolve_references(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """The edits with every "resample" made a "set"; references are token ids. Errors: those of the engine."""
        pieces = []
        for edit in edits:
            if edit.reference is not None:
                text = edit.reference.text
                assert isinstance(text, tuple), "references are token ids"
                check_rows([text], self.backbone)
                pieces.append((len(text), partial(resolve_references, [edit], self.dictionaries, self.backbone)))
        resolved = iter(await self._compute("resample", pieces, _Timer()))
        return tuple(edit if edit.reference is None else next(resolved)[0] for edit in edits)

    # Score

    async def score(self, work: ScoreWork, *, under_way: bool = False) -> ScoreResult:
        """Errors: those of the engine; EditConflict and InvalidEdit (ValueErrors)."""
        check_rows(work.rows, self.backbone, at_least=2)
        check_tokens(work.logit_tokens, self.backbone)
        edits = work.edits or ((),) * len(work.rows)
        if len(edits) != len(work.rows):
            raise ValueError(f"there are edits of {len(edits)} rows, expected {len(work.rows)}")
        for row, row_edits in zip(work.rows, edits, strict=True):
            check_row_edits(row_edits, self.dictionaries, len(row), self.backbone)
        all_edits = list(chain.from_iterable(edits))
        named = {edit.dictionary for edit in all_edits}
        named |= {term.dictionary for edit in all_edits for term in terms(edit.condition) if term.dictionary}
        dictionaries = {name: self.dictionaries[name] for name in named}
        rows = [
            ScoredRow(row, row_edits, work.logit_tokens, work.max_relative_change)
            for row, row_edits in zip(work.rows, edits, strict=True)
        ]
        sizes = [len(row.tokens) * (2 if row.edits else 1) for row in rows]  # an edited row runs twice
        results, timing = await self.run(("score", None), Scoring(rows, dictionaries), sizes, under_way=under_way)
        return ScoreResult(list(chain.from_iterable(results)), timing)

    # Ablation

    async def ablate(self, work: AblateWork) -> AblateResult:
        """Errors: those of the engine; ValueError for a mean that the dictionary has no statistics of."""
        check_rows(work.rows, self.backbone, at_least=2)
        check_tokens(work.logit_tokens, self.backbone)
        timer = _Timer()
        features = work.features
        if not features:
            features = tuple(await self._strongest(work, timer))
        names = sorted({feature.dictionary for feature in features})
        dictionaries = {name: self._dictionary(name) for name in names}
        for feature in features:
            dictionaries[feature.dictionary].check_latents([feature.feature])
        for name, dictionary in dictionaries.items():
            if "mean" in work.ablations and dictionary.statistics is None:
                raise ValueError(f"dictionary {name!r} has no statistics, which the ablation to the mean needs")

        def begin(rows: Sequence[tuple[int, ...]]) -> AblationStudy:
            return AblationStudy(
                self.backbone,
                dictionaries,
                rows,
                features,
                work.ablations,
                tokens=work.logit_tokens,
                single_tokens=work.single_tokens,
            )

        results: list[StudyResult] = []
        n_variants = 0
        # One batch of rows after the other: a study holds the activations of its rows while its variants run.
        for rows in split_rows(work.rows, self._budget):
            (study,) = await self._compute("ablate", [(_size(rows), partial(begin, rows))], timer)
            batches = in_batches(study.variants, self._budget)
            n_variants += len(study.variants)
            computed: list[list[VariantEffect]]
            computed = await self._compute("ablate", [_variants(study, batch) for batch in batches], timer)
            results.append(StudyResult.of(study, list(chain.from_iterable(computed))))
        report = await asyncio.to_thread(
            summarize,
            features,
            work.ablations,
            results,
            n_chosen=len(work.logit_tokens),
            rank_by=work.rank_by,
        )
        return AblateResult(report, n_variants, timer.timing)

    async def _strongest(self, work: AblateWork, timer: _Timer) -> list[FeatureId]:
        dictionaries = {name: self._dictionary(name) for name in work.dictionaries}
        if not dictionaries or work.strongest < 1:
            raise ValueError("an ablation needs features, or how many of the strongest features of which dictionaries")
        pieces = [
            (_size(rows), partial(total_activation, self.backbone, dictionaries, rows))
            for rows in split_rows(work.rows, self._budget)
        ]
        activations: list[dict[str, torch.Tensor]] = await self._compute("ablate", pieces, timer)
        totals = {name: torch.stack([piece[name] for piece in activations]).sum(0) for name in dictionaries}
        return strongest_features(ranked_totals(totals, dictionaries, work.strongest_by), work.strongest)

    # Attribution

    async def attribute(self, work: AttributeWork) -> AttributeResult:
        """Errors: those of the engine."""
        check_rows([work.row], self.backbone)
        check_tokens([token for token in (work.target, work.foil) if token is not None], self.backbone)
        dictionaries = {name: self._dictionary(name) for name in work.dictionaries}
        if not dictionaries or work.count < 1:
            raise ValueError("an attribution needs at least one dictionary and a count of at least 1")
        timer = _Timer()

        def begin() -> tuple[AttributionStudy, int]:
            target = _likeliest(self.backbone, work.row) if work.target is None else work.target
            wanted = Target(target, work.foil)
            study = AttributionStudy(
                self.backbone, dictionaries, work.row, wanted, count=work.count, rank_by=work.rank_by
            )
            return study, target

        # Forward and backward are about three forwards.
        ((study, target),) = await self._compute("attribute", [(3 * len(work.row), begin)], timer)
        step = max(1, self._budget // study.length)
        pairs = study.attributions
        pieces = [pairs[start : start + step] for start in range(0, len(pairs), step)]
        attributions = await self._compute("attribute", [_ablations(study, piece) for piece in pieces], timer)
        report = study.report(list(chain.from_iterable(attributions)))
        return AttributeResult(report, target, timer.timing)

    # Contrast

    async def contrast(self, work: ContrastWork) -> ContrastResult:
        """Errors: those of the engine."""
        if min(len(work.a), len(work.b)) < 2:
            raise ValueError(f"the sets have {len(work.a)} and {len(work.b)} rows, expected at least 2 each")
        check_rows([*work.a, *work.b], self.backbone)
        for name in work.dictionaries:
            self._dictionary(name)
        timer = _Timer()
        inputs: list[list[DictionaryRows]] = []
        for rows in split_rows(work.a + work.b, BATCHES_AT_ONCE * self._budget):
            inputs += await self._extract(
                ExtractWork(tuple(rows), work.dictionaries, aggregation=work.aggregation), timer
            )
        features = await asyncio.to_thread(self._contrasts, work, inputs)
        edits: tuple[Edit, ...] = ()
        trials: list[SuggestionTrial] = []
        if work.suggest:
            edits = await self._suggest(work, features, timer)
        if edits and work.validate:
            factors = STRENGTH_FACTORS if any(edit.operation == "set" for edit in edits) else (1.0,)
            trials = [await self._try(work, at_strength(edits, factor), timer) for factor in factors]
            edits = max(trials, key=lambda trial: trial.shift).edits
        return ContrastResult(features, edits, trials, timer.timing)

    def _contrasts(self, work: ContrastWork, inputs: Sequence[Sequence[DictionaryRows]]) -> list[FeatureContrast]:
        sets = {}
        for place, name in enumerate(work.dictionaries):
            rows = [entry[place].features for entry in inputs]
            active = sorted({int(latent) for row in rows for latent in row.indices})
            dense = _dense(rows, active)
            sets[name] = (torch.tensor(active, dtype=torch.int64), dense[: len(work.a)], dense[len(work.a) :])
        return contrast_features(sets)

    async def _suggest(
        self, work: ContrastWork, features: Sequence[FeatureContrast], timer: _Timer
    ) -> tuple[Edit, ...]:
        """Edits with the surest features that can be turned towards set a."""
        chosen: list[tuple[FeatureContrast, float]] = []
        for contrast in features:
            statistics = self._dictionary(contrast.feature.dictionary).statistics
            maximum = 0.0 if statistics is None else float(statistics.max[contrast.feature.feature])
            if contrast.auc != 0.5 and (contrast.auc < 0.5 or maximum > 0):
                chosen.append((contrast, maximum))
            if len(chosen) == work.suggest:
                break
        edits = []
        for contrast, maximum in chosen:
            selection = Selection("features", features=(contrast.feature.feature,))
            peaks: list[float] = []
            for rows in split_rows(work.a, BATCHES_AT_ONCE * self._budget):
                extract_work = ExtractWork(tuple(rows), (contrast.feature.dictionary,), selection, aggregation="max")
                extracted = await self._extract(extract_work, timer)
                peaks += [float(entry[0].features.values.max(initial=0.0)) for entry in extracted]
            edits.append(suggest_edit(contrast, peaks, maximum))
        return tuple(edits)

    async def _try(self, work: ContrastWork, edits: tuple[Edit, ...], timer: _Timer) -> SuggestionTrial:
        async def score(rows: Sequence[tuple[int, ...]]) -> SetScore:
            long_enough = tuple(row for row in rows if len(row) > 1)
            result = await self.score(ScoreWork(long_enough, (edits,) * len(long_enough)), under_way=timer.under_way)
            timer.add(result.timing)
            losses = []
            for row in result.rows:
                assert row.edited is not None
                assert row.kl is not None
                change = float((row.edited.loss.astype(float) - row.unedited.loss).sum())
                losses.append((change, float(row.kl.sum(dtype=float)), len(row.unedited.loss), len(row.kl)))
            return set_score(losses)

        a, b = await score(work.a), await score(work.b)
        return SuggestionTrial(edits, a, b, shift=b.delta_loss - a.delta_loss)

    # Rounds

    async def _compute(self, kind: str, pieces: Sequence[tuple[int, Callable[[], Any]]], timer: _Timer) -> list[Any]:
        """Runs pieces (tokens, function) with only a few in the queue at a time. Returns one result a piece."""
        results: list[Any] = []
        for at in range(0, len(pieces), BATCHES_AT_ONCE):
            chunk = pieces[at : at + BATCHES_AT_ONCE]
            sizes, runs = zip(*chunk, strict=True)
            # object() makes the kind unique, so that this work shares no batch with others.
            computed, timing = await self.run((kind, object()), runs, sizes, under_way=timer.under_way)
            timer.add(timing)
            results += chain.from_iterable(computed)
        return results

    async def _extract(self, work: ExtractWork, timer: _Timer) -> list[list[DictionaryRows]]:
        result = await self.extract(work, under_way=timer.under_way)
        timer.add(result.timing)
        return result.inputs

    def _dictionary(self, name: str) -> Dictionary:
        dictionary = find_dictionary(name, self.dictionaries)
        dictionary.site_in(self.backbone)
        if dictionary.transcoder:
            raise ValueError(f"dictionary {name!r} is a transcoder: it decodes to another site than it reads")
        return dictionary


def split_rows(rows: Sequence[tuple[int, ...]], budget: int) -> list[Sequence[tuple[int, ...]]]:
    """Consecutive rows of at most `budget` tokens together; a longer row stands alone."""
    rounds: list[Sequence[tuple[int, ...]]] = []
    start = tokens = 0
    for i, row in enumerate(rows):
        if i > start and tokens + len(row) > budget:
            rounds.append(rows[start:i])
            start, tokens = i, 0
        tokens += len(row)
    return [*rounds, rows[start:]]


def _size(rows: Sequence[tuple[int, ...]]) -> int:
    return sum(map(len, rows))


def _variants(study: AblationStudy, batch: Sequence[Variant]) -> tuple[int, Callable[[], list[VariantEffect]]]:
    return sum(variant.length for variant in batch), lambda: study.run(batch)


def _ablations(
    study: AttributionStudy, batch: Sequence[Attribution]
) -> tuple[int, Callable[[], list[FeatureAttribution]]]:
    return len(batch) * study.length, lambda: study.run(batch)


def _likeliest(backbone: Backbone, row: tuple[int, ...]) -> int:
    logits = backbone.forward(PackedTokens.from_rows([row]), logits="last").logits
    assert logits is not None
    return int(logits[0].argmax())


def _dense(rows: Sequence[Csr], active: Sequence[int]) -> torch.Tensor:
    """The aggregated rows as a dense tensor [n, len(active)]. Every Csr has one row."""
    place = {latent: column for column, latent in enumerate(active)}
    dense = torch.zeros(len(rows), len(active))
    for i, row in enumerate(rows):
        columns = [place[int(latent)] for latent in row.indices]
        dense[i, columns] = torch.from_numpy(row.values)
    return dense
