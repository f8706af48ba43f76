"""What the engine tells of its readings: each made once, the right rows and requests, the right numbers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.edits import BatchEdits, BatchRow, Condition, Edit, RowEdits
from sae_runtime.model.packed import PackedTokens
from service.engine.engine import Engine
from service.engine.measure_work import ScoreWork
from service.engine.observer import ObservedReading
from service.engine.settings import EngineSettings
from service.engine.work import EncodeWork, ExtractWork, GenerateWork, SamplingOptions, WatchedFeatures
from tests.builders import random_rows, small_backbone, small_dictionaries
from tests.service.engine.runner import Runner

BACKBONE = small_backbone()
DICTIONARIES = small_dictionaries()
NAMES = {dictionary: name for name, dictionary in DICTIONARIES.items()}
GREEDY = SamplingOptions(temperature=0)


class Watcher:
    """An observer that keeps the readings."""

    def __init__(self) -> None:
        self.seen: list[ObservedReading] = []

    def features(self, reading: ObservedReading) -> None:
        self.seen.append(reading)

    def batch_done(self, kind: str, items: int, tokens: int, seconds: float) -> None:
        pass

    def waited(self, kind: str, seconds: float) -> None:
        pass


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The dictionary and number of tokens of every encoding from here on."""
    calls: list[tuple[str, int]] = []
    encode = Dictionary.encode

    def counted(self: Dictionary, x: Tensor) -> SparseFeatures:
        calls.append((NAMES[self], len(x)))
        return encode(self, x)

    monkeypatch.setattr(Dictionary, "encode", counted)
    return calls


def keys(seen: list[ObservedReading]) -> list[tuple[str, bool]]:
    return [(NAMES[observed.reading.dictionary], observed.reading.edited) for observed in seen]


def dense_by_token(seen: list[ObservedReading], name: str, *, edited: bool = False) -> dict[tuple[int, int], Tensor]:
    """The latents that were read, by request and position; a token that is read twice is an error."""
    latents: dict[tuple[int, int], Tensor] = {}
    for observed in seen:
        reading = observed.reading
        if NAMES[reading.dictionary] != name or reading.edited != edited:
            continue
        assert len(observed.rows) == len(observed.positions) == len(reading.tokens) == len(reading.features)
        for row, position, z in zip(observed.rows, observed.positions, reading.features.to_dense(), strict=True):
            key = observed.requests[row], int(position)
            assert key not in latents
            latents[key] = z
    return latents


def library(row: tuple[int, ...], name: str) -> Tensor:
    """All latents [T, n_latents] of a text, by the library alone."""
    site = str(DICTIONARIES[name].site)
    return DICTIONARIES[name].encode_dense(BACKBONE.activations(torch.tensor([row]), sites=[site])[site][0])


async def test_extraction_is_told_once_a_dictionary_with_the_request_of_each_row(
    encoded: list[tuple[str, int]],
) -> None:
    watcher = Watcher()
    engine = Engine(BACKBONE, DICTIONARIES, EngineSettings(torch_threads=1), watcher)
    await engine.start()
    first, second = tuple(random_rows(2, (3, 9), seed=1)), tuple(random_rows(2, (3, 9), seed=2))
    works = (
        ExtractWork(first, ("mid", "wide"), reconstruction_error=True),
        ExtractWork(second, ("mid",), aggregation="last"),
    )
    await asyncio.gather(*map(engine.extract, works))
    await engine.stop()

    seen, calls = list(watcher.seen), list(encoded)
    assert [(NAMES[o.reading.dictionary], len(o.reading.features)) for o in seen] == calls
    batches = {observed.requests for observed in seen}
    assert len(seen) <= 3  # two for the first request, and one more if the second ran in another batch
    assert {observed.kind for observed in seen} == {"extract"}
    assert {request for batch in batches for request in batch} == {0, 1}
    for name in ("mid", "wide"):
        # Rows of one request share its number: its texts are told apart by `rows`.
        for observed in seen:
            if NAMES[observed.reading.dictionary] != name:
                continue
            texts = [row for request in dict.fromkeys(observed.requests) for row in (first, second)[request]]
            for row, position, z in zip(
                observed.rows, observed.positions, observed.reading.features.to_dense(), strict=True
            ):
                torch.testing.assert_close(z, library(texts[row], name)[position])
    last = [(o.requests[r], int(p)) for o in seen for r, p in zip(o.rows, o.positions, strict=True)]
    expected = [(0, p) for row in first for p in range(len(row))] * 2 + [(1, len(row) - 1) for row in second]
    assert sorted(last) == sorted(expected)


async def test_given_activations_are_told_too() -> None:
    watcher = Watcher()
    engine = Engine(BACKBONE, DICTIONARIES, EngineSettings(torch_threads=1), watcher)
    await engine.start()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    await engine.encode(EncodeWork("mid", x.numpy()))
    await engine.stop()
    (observed,) = watcher.seen
    assert (observed.kind, observed.rows.tolist()) == ("encode", [0, 1, 2, 3, 4])
    assert observed.requests == (0,) * 5
    torch.testing.assert_close(observed.reading.features.to_dense(), DICTIONARIES["mid"].encode_dense(x))


async def test_scores_tell_what_the_edits_of_edited_rows_read(encoded: list[tuple[str, int]]) -> None:
    watcher = Watcher()
    engine = Engine(BACKBONE, DICTIONARIES, EngineSettings(torch_threads=1), watcher)
    await engine.start()
    plain, edited = random_rows(2, (9, 11), seed=4)
    replace = Edit("mid", 0, "replace")  # reads all tokens of its row, whatever fires
    await engine.score(ScoreWork((plain, edited), ((), (replace,))))
    await engine.stop()
    (observed,) = watcher.seen
    assert encoded == [("mid", len(edited))]
    assert (observed.kind, observed.requests, set(observed.rows.tolist())) == ("score", (0,), {0})
    assert observed.positions.tolist() == list(range(len(edited)))
    torch.testing.assert_close(observed.reading.features.to_dense(), library(edited, "mid"))


def test_generation_reads_each_activation_once_for_edits_conditions_and_watchers(
    encoded: list[tuple[str, int]],
) -> None:
    """Edits at "mid" under a condition on "wide", both watched beside "early"; another request watches "wide"."""
    edited_row, plain_row = random_rows(2, (12, 14), seed=3)
    common = {
        name: int((library(edited_row, name) > 0).sum(0).argmax()) for name in ("mid", "wide", "early")
    }  # latents that fire often
    edits = (
        Edit("mid", common["mid"], "scale", 2.0),
        Edit("mid", 5, "add", 1.0, condition=Condition(common["wide"], 0.0, "wide")),
        Edit("mid", 6, "add", 1.0, condition=Condition(common["early"], 0.0, "early")),
    )
    watch = WatchedFeatures(("mid", "wide", "early"), 96, prompt=True)
    works = [
        GenerateWork(edited_row, 6, GREEDY, edits=edits, features=watch, ignore_end_of_text=True),
        GenerateWork(plain_row, 6, GREEDY, features=WatchedFeatures(("wide",), 4), ignore_end_of_text=True),
    ]
    watcher = Watcher()
    encoded.clear()
    runner = Runner(BACKBONE, DICTIONARIES, *works, observe=watcher.features, prefill_chunk_tokens=10)
    all_seen: list[ObservedReading] = []
    while not runner.done:
        watcher.seen.clear()
        encoded.clear()
        runner.step()
        seen = watcher.seen
        assert len(set(keys(seen))) == len(seen)
        assert [(NAMES[o.reading.dictionary], len(o.reading.features)) for o in seen] == encoded
        assert set(keys(seen)) <= {("mid", False), ("mid", True), ("wide", False), ("early", False)}
        all_seen += seen
    assert {("mid", False), ("mid", True), ("wide", False), ("early", False)} == set(keys(all_seen))

    # The numbers, from one forward of each whole text; the last token that is sampled is never run.
    tokens = [tuple(request.sequences[0].tokens[:-1]) for request in runner.requests]
    row_edits = RowEdits(edits, DICTIONARIES, len(edited_row), token_bytes=BACKBONE.token_bytes)
    batch = BatchEdits([BatchRow(row_edits, 0, len(tokens[0]), tokens[0])])
    sites = {name: DICTIONARIES[name].require_site() for name in common}
    result = BACKBONE.forward(
        PackedTokens.from_rows([tokens[0]]),
        edit=batch.apply,
        edit_sites=batch.sites,
        capture=sites.values(),
        pause=[sites["mid"]],
    )
    expected = {
        ("mid", False): DICTIONARIES["mid"].encode_dense(result.paused[sites["mid"]].activation),
        **{(n, n == "mid"): DICTIONARIES[n].encode_dense(result.activations[s]) for n, s in sites.items()},
    }
    for (name, edited), z in expected.items():
        read = dense_by_token(all_seen, name, edited=edited)
        positions = [position for request, position in read if request == 0]
        if (name, edited) != ("mid", False):  # which is read only where an edited latent may be kept
            assert sorted(positions) == list(range(len(tokens[0])))
        assert len(positions) > 5
        for position in positions:
            torch.testing.assert_close(read[0, position], z[position], rtol=1e-4, atol=1e-4)
    plain = dense_by_token(all_seen, "wide")
    assert sorted(p for request, p in plain if request == 1) == list(range(len(plain_row), len(tokens[1])))
    for position in range(len(plain_row), len(tokens[1])):
        torch.testing.assert_close(plain[1, position], library(tokens[1], "wide")[position], rtol=1e-4, atol=1e-4)


def test_a_step_that_runs_again_is_told_once() -> None:
    """One row's edits are out of range; the others' step runs a second time without it."""
    rows = random_rows(2, (6, 8), seed=4)
    watch = WatchedFeatures(("mid",), 4, prompt=True)
    works = [
        GenerateWork(rows[0], 2, GREEDY, edits=(Edit("wide", 3, "add", 1e3),), max_relative_change=1e-3),
        GenerateWork(rows[1], 2, GREEDY, features=watch, ignore_end_of_text=True),
    ]
    watcher = Watcher()
    runner = Runner(BACKBONE, DICTIONARIES, *works, observe=watcher.features)
    runner.step()
    assert isinstance(runner.events[runner.requests[0]][0], Exception)
    (observed,) = watcher.seen
    assert observed.requests == (1,)
    assert np.array_equal(observed.positions, np.arange(len(rows[1])))
