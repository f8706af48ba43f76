"""A batch shared out over threads: the same results in the same places, and errors that come through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain

import pytest
import torch

from sae_runtime import Backbone, Dictionary, Site
from sae_runtime.dictionary.readings import Readings
from service.engine import lanes as module
from service.engine.batch import Extraction, run_extract
from service.engine.lanes import Lanes, extract_in_lanes
from service.engine.work import Selection


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.random(n_layers=2, d_model=16, n_heads=2, vocab_size=50, context_length=64, seed=1)


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(40, 16, generator=generator)
    return Dictionary(
        encoder=encoder,
        decoder=encoder,
        pre_bias=torch.zeros(16),
        latent_bias=torch.zeros(40),
        activation="topk",
        k=4,
        site="1.resid_post_mlp",
    )


def pieces_of(dictionary: Dictionary, lengths: list[list[int]]) -> list[Extraction]:
    generator = torch.Generator().manual_seed(3)
    return [
        Extraction(
            rows=[tuple(torch.randint(0, 50, (n,), generator=generator).tolist()) for n in rows],
            dictionaries=[("d", dictionary, Site(1, "resid_post_mlp"))],
            selection=Selection("all"),
            aggregation="none",
            reconstruction_error=True,
        )
        for rows in lengths
    ]


@pytest.mark.parametrize("lengths", [[[40], [3, 50, 7], [64], [1]], [[64, 64]], [[30] * 9]])
def test_results_and_their_places_are_those_of_one_thread(
    backbone: Backbone, dictionary: Dictionary, lanes: Lanes, lengths: list[list[int]]
) -> None:
    pieces = pieces_of(dictionary, lengths)
    with torch.inference_mode():
        expected = run_extract(backbone, pieces, Readings())
        results, lane_readings = extract_in_lanes(backbone, pieces, lanes)
    assert [len(piece) for piece in results] == [len(piece) for piece in expected]
    told = sorted(row for lane in lane_readings for row in lane.rows)
    assert told == [(p, r) for p, rows in enumerate(lengths) for r in range(len(rows))]
    for lane in lane_readings:
        (reading,) = lane.readings.made
        assert len(reading.tokens) == sum(lengths[p][r] for p, r in lane.rows)
    for one, other in zip(chain(*results), chain(*expected), strict=True):
        assert (one[0].features.indices == other[0].features.indices).all()
        torch.testing.assert_close(
            torch.from_numpy(one[0].features.values), torch.from_numpy(other[0].features.values), atol=1e-5, rtol=1e-5
        )
        assert len(one[0].reconstruction_error) == len(other[0].reconstruction_error)


def test_the_lanes_share_the_tokens_evenly_and_keep_torchs_threads_apart(
    backbone: Backbone, dictionary: Dictionary, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, int]] = []

    def watched(backbone: Backbone, pieces: list[Extraction], readings: Readings) -> object:
        tokens = sum(len(row) for piece in pieces for row in piece.rows)
        runs.append((tokens, torch.get_num_threads()))
        return run_extract(backbone, pieces, readings)

    monkeypatch.setattr(module, "run_extract", watched)
    before = torch.get_num_threads()
    extract_in_lanes(backbone, pieces_of(dictionary, [[40], [10, 50], [30], [20], [64]]), lanes)
    assert torch.get_num_threads() == before
    tokens, threads = zip(*runs, strict=True)
    assert sum(tokens) == 214
    assert max(tokens) - min(tokens) <= 20
    assert threads == (1, 1)


def test_little_work_is_not_shared_out(
    backbone: Backbone, dictionary: Dictionary, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "run", lambda shares: pytest.fail("shared out"))
    extract_in_lanes(backbone, pieces_of(dictionary, [[10], [20]]), lanes)
    extract_in_lanes(backbone, pieces_of(dictionary, [[64]]), lanes)
    extract_in_lanes(backbone, pieces_of(dictionary, [[64], [64]]), None)


def test_a_failed_share_fails_the_batch_after_all_have_ended(lanes: Lanes) -> None:
    ended = threading.Event()

    def fails() -> None:
        raise ValueError("this share")

    with pytest.raises(ValueError, match="this share"):
        lanes.run([fails, ended.set])
    assert ended.is_set()
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]


def test_each_lane_computes_on_one_thread(lanes: Lanes) -> None:
    """torch resets a thread's number of threads at its first parallel operation, unless it was asked for before."""

    def threads() -> int:
        torch.nn.functional.gelu(torch.ones(300, 300))
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert lanes.run([threads, threads]) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
