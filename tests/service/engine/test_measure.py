"""Causal measurements as work of the engine: batches, budgets, waiting, cancellation, and failures that stay alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from sae_runtime import Edit, EditConflict, InvalidEdit, UnknownDictionary
from sae_runtime.causal.report import FeatureId
from sae_runtime.edits import Reference, resolve_references
from service.engine.engine import Engine
from service.engine.errors import EngineStopped, NonFiniteActivations, QueueFull
from service.engine.measure_work import AblateWork, AttributeWork, ContrastWork, ScoreWork
from service.engine.settings import EngineSettings
from service.engine.work import ExtractWork
from tests.builders import random_rows, small_backbone, small_dictionaries

BACKBONE = small_backbone()
DICTIONARIES = small_dictionaries()
ROWS = tuple(random_rows(6, (5, 30), seed=0))


class Log:
    """An observer that remembers its batches."""

    features = None

    def __init__(self) -> None:
        self.batches: list[tuple[str, int, int]] = []

    def batch_done(self, kind: str, items: int, tokens: int, seconds: float) -> None:
        self.batches.append((kind, items, tokens))

    def waited(self, kind: str, seconds: float) -> None:
        assert seconds >= 0


@asynccontextmanager
async def running(log: Log | None = None, **settings: int) -> AsyncIterator[Engine]:
    engine = Engine(BACKBONE, DICTIONARIES, EngineSettings(**settings), log)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def test_scores_of_several_requests_share_batches_and_keep_to_the_budget() -> None:
    edits = [
        (Edit("mid", 3, "set", value=4.0),),
        (Edit("wide", 7, "ablate_zero"), Edit("mid", 1, "add", value=1.0)),
        (),
    ]
    works = [ScoreWork((row,), (own,)) for row in ROWS for own in edits]
    async with running(max_batch_tokens=10_000) as engine:
        alone = [await engine.score(work) for work in works]
    log = Log()
    async with running(log, max_batch_tokens=200) as engine:
        together = await asyncio.gather(*(engine.score(work) for work in works))
    assert len(log.batches) < len(works)
    assert max(items for _, items, _ in log.batches) > 2
    assert max(tokens for _, _, tokens in log.batches) <= 200
    for one, other in zip(alone, together, strict=True):
        for own, theirs in ((one.rows[0].unedited, other.rows[0].unedited), (one.rows[0].edited, other.rows[0].edited)):
            assert (own is None) == (theirs is None)
            if own is not None and theirs is not None:
                np.testing.assert_allclose(own.loss, theirs.loss, atol=1e-5)


async def test_a_row_out_of_range_fails_alone() -> None:
    good, wild = Edit("mid", 3, "set", value=2.0), Edit("mid", 3, "set", value=3e38)
    async with running() as engine:
        works = [ScoreWork((ROWS[0],), ((edit,),)) for edit in (good, wild, good)]
        first, bad, last = await asyncio.gather(*(engine.score(work) for work in works), return_exceptions=True)
    assert isinstance(bad, NonFiniteActivations)
    np.testing.assert_allclose(first.rows[0].edited.loss, last.rows[0].edited.loss, atol=1e-6)


async def test_a_study_takes_turns_with_other_work() -> None:
    log = Log()
    async with running(log, max_batch_tokens=64) as engine:
        study = asyncio.ensure_future(
            engine.ablate(AblateWork(ROWS, strongest=10, dictionaries=("mid", "wide"), single_tokens=2))
        )
        while not study.done():
            await engine.extract(ExtractWork((ROWS[0],), ("mid",)))
        result = await study
    kinds = [kind for kind, _, _ in log.batches]
    first, last = kinds.index("ablate"), len(kinds) - kinds[::-1].index("ablate")
    assert kinds[first:last].count("extract") >= 5
    assert max(tokens for kind, _, tokens in log.batches if kind == "ablate") <= 64
    assert len(result.report.effects) == 10
    assert result.timing.compute_s > 0


async def test_a_study_that_is_under_way_goes_on_where_a_new_call_is_refused() -> None:
    async with running(max_batch_tokens=32, max_queued_tokens=40) as engine:
        work = AblateWork(ROWS, features=(FeatureId("mid", 3), FeatureId("mid", 8)), ablations=("mean",))
        quiet = await engine.ablate(work)

        refused = 0

        async def press() -> None:
            nonlocal refused
            while not study.done():
                try:
                    await asyncio.gather(*(engine.extract(ExtractWork((row,), ("mid",))) for row in ROWS))
                except QueueFull:
                    refused += 1
                    await asyncio.sleep(0)

        study = asyncio.ensure_future(engine.ablate(work))
        await asyncio.gather(study, press())
        pressed = study.result()
    assert refused > 0
    assert [e.everywhere.kl for e in pressed.report.effects] == pytest.approx(
        [e.everywhere.kl for e in quiet.report.effects], abs=1e-6
    )


async def test_a_cancelled_study_runs_no_further() -> None:
    log = Log()
    async with running(log, max_batch_tokens=32) as engine:
        study = asyncio.ensure_future(
            engine.ablate(AblateWork(ROWS, strongest=40, dictionaries=("mid",), single_tokens=4))
        )
        while "ablate" not in [kind for kind, _, _ in log.batches]:
            await engine.extract(ExtractWork((ROWS[0],), ("mid",)))
        study.cancel()
        with pytest.raises(asyncio.CancelledError):
            await study
        before = [kind for kind, _, _ in log.batches].count("ablate")
        for _ in range(10):
            await engine.extract(ExtractWork((ROWS[0],), ("mid",)))
        assert [kind for kind, _, _ in log.batches].count("ablate") <= before + 1  # the one that was running
        assert engine.snapshot().queued_items == 0


async def test_references_are_run_among_other_work() -> None:
    plain = Edit("mid", 3, "set", value=4.0)
    texts = (ROWS[0], ROWS[1], ROWS[0])
    edits = [Edit("wide", i, "resample", reference=Reference(text, "max")) for i, text in enumerate(texts)]
    log = Log()
    async with running(log, max_batch_tokens=200) as engine:
        resolved = await engine.resolve_references([plain, *edits])
        with pytest.raises(ValueError, match="leave the vocabulary"):
            await engine.resolve_references([Edit("wide", 1, "resample", reference=Reference((999,)))])
    assert {kind for kind, _, _ in log.batches} == {"resample"}
    assert sum(tokens for _, _, tokens in log.batches) == sum(map(len, texts))
    assert resolved == (plain, *resolve_references(edits, DICTIONARIES, BACKBONE))


async def test_work_that_cannot_run_is_refused_before_it_is_queued() -> None:
    async with running() as engine:
        feature = FeatureId("mid", 3)
        with pytest.raises(ValueError, match="a row has 1 tokens, expected 2 to 96"):
            await engine.score(ScoreWork(((1,),)))
        with pytest.raises(ValueError, match="edits of 1 rows, expected 6"):
            await engine.score(ScoreWork(ROWS, ((Edit("mid", 1, "ablate_zero"),),)))
        with pytest.raises(InvalidEdit):
            await engine.score(ScoreWork(ROWS[:1], ((Edit("mid", 999, "ablate_zero"),),)))
        with pytest.raises(EditConflict):
            await engine.score(ScoreWork(ROWS[:1], ((Edit("mid", 1, "ablate_zero"), Edit("mid", 1, "ablate_mean")),)))
        unresolved = Edit("mid", 1, "resample", reference=Reference((1, 2)))
        with pytest.raises(InvalidEdit, match=r"edits\[0\]\.reference: has not been run"):
            await engine.score(ScoreWork(ROWS[:1], ((unresolved,),)))
        with pytest.raises(ValueError, match="leave the vocabulary of 257"):
            await engine.score(ScoreWork(ROWS, logit_tokens=(257,)))
        with pytest.raises(UnknownDictionary):
            await engine.ablate(AblateWork(ROWS, features=(FeatureId("nowhere", 3),)))
        with pytest.raises(ValueError, match=r"latent 96 is outside 0\.\.95"):
            await engine.ablate(AblateWork(ROWS, features=(FeatureId("mid", 96),)))
        with pytest.raises(ValueError, match="needs features, or how many"):
            await engine.ablate(AblateWork(ROWS))
        with pytest.raises(ValueError, match="at least one dictionary and a count"):
            await engine.attribute(AttributeWork(ROWS[0], ()))
        with pytest.raises(ValueError, match="the sets have 1 and 6 rows"):
            await engine.contrast(ContrastWork(ROWS[:1], ROWS, ("mid",)))
    with pytest.raises(EngineStopped):
        await engine.ablate(AblateWork(ROWS, features=(feature,)))
