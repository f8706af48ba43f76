"""How well the shuffle buffer mixes, in numbers, against what an ideal shuffle in the same memory would give.

In units of half a buffer H: a token of half k of the stream enters with round k - 1 and leaves, in each round, with
probability 1/2. So it waits G rounds, P(G = g) = 2^-(g+1), and comes out at a uniform place of its round, independently
of where in the half it was and of every other token. That is as independent as a bounded buffer can be.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sae_runtime.model.sites import Site
from sae_runtime.training.activations.shuffle import ShuffleBuffer

pytestmark = pytest.mark.any_cpu

SITE = Site.parse("0.resid_pre")
CAPACITY, BATCH, DOCUMENT = 4096, 128, 64
HALF = CAPACITY // 2
N = 40 * CAPACITY
STEADY = slice(4 * CAPACITY, N - 12 * CAPACITY)


@pytest.fixture(scope="module")
def order() -> Tensor:
    """Places in the stream of the tokens given out, in the order they were."""

    def stream() -> Iterator[dict[Site, Tensor]]:
        for first in range(0, N, 512):
            yield {SITE: torch.arange(first, first + 512, dtype=torch.float64)[:, None]}

    buffer = ShuffleBuffer(stream(), CAPACITY, seed=0)
    return torch.cat([buffer.next_batch(BATCH)[SITE][:, 0] for _ in range((N - CAPACITY) // BATCH)]).long()


@pytest.fixture(scope="module")
def places(order: Tensor) -> npt.NDArray[np.int64]:
    """Where the tokens of the steady state were given out, in the order of the stream."""
    place = np.full(N, -1)
    place[order.numpy()] = np.arange(len(order))
    steady: npt.NDArray[np.int64] = place[STEADY]
    assert (steady >= 0).all()
    return steady


def ideal(n: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Places, in tokens, of n tokens relative to the beginning of the round they entered with."""
    generator = np.random.default_rng(seed)
    waited = generator.geometric(0.5, n) - 1
    return (waited + generator.random(n)) * HALF


def test_tokens_wait_as_long_as_the_mathematics_says(places: npt.NDArray[np.int64]) -> None:
    entered = np.arange(STEADY.start, STEADY.stop) // HALF * HALF - HALF
    assert kolmogorov_smirnov(places - entered, ideal(200_000)) < 0.01
    # On the whole a token is neither early nor late, and its wait varies by more than half a buffer.
    delays = places - np.arange(STEADY.start, STEADY.stop)
    assert delays.mean() == pytest.approx(0, abs=0.02 * CAPACITY)
    assert delays.std() > HALF


def test_neighbours_come_out_as_far_apart_as_strangers(places: npt.NDArray[np.int64]) -> None:
    for apart in (1, 2, 10, DOCUMENT):
        halves = places.reshape(-1, HALF)
        distances = np.abs(halves[:, apart:] - halves[:, :-apart]).ravel()
        expected = np.abs(ideal(200_000) - ideal(200_000, seed=1))
        assert kolmogorov_smirnov(distances, expected) < 0.01
        # Two of them share a batch when they wait equally long (probability 1/3) and meet in that round.
        same = (halves[:, apart:] // BATCH == halves[:, :-apart] // BATCH).mean()
        assert same == pytest.approx(BATCH / HALF / 3, rel=0.1)
    # The measure would see a rest of order: a buffer a quarter as large is far off.
    assert kolmogorov_smirnov(distances / 4, expected) > 0.2


def test_documents_per_batch(order: Tensor) -> None:
    batches = (order[STEADY] // DOCUMENT).view(-1, BATCH)
    found = np.mean([len(batch.unique()) for batch in batches])
    # A document that entered g rounds ago is in the batch unless all of its tokens are gone or not drawn.
    drawn = [2.0**-g * BATCH / CAPACITY for g in range(20)]
    expected = sum(HALF / DOCUMENT * (1 - (1 - p) ** DOCUMENT) for p in drawn)
    assert found == pytest.approx(expected, rel=0.02)
    # Without shuffling a batch has 2 documents; a uniform draw from as many tokens as the buffer holds has fewer than
    # it, as the geometric waits reach further back; every token from another document would be the whole batch.
    uniform = CAPACITY / DOCUMENT * (1 - (1 - BATCH / CAPACITY) ** DOCUMENT)
    assert BATCH / DOCUMENT < uniform < found < BATCH


def test_within_a_batch_nothing_is_left_of_the_text_s_order(order: Tensor) -> None:
    batches = order[STEADY].view(-1, BATCH)
    ranks = batches.argsort(1).argsort(1).double() - (BATCH - 1) / 2
    ramp = torch.arange(BATCH, dtype=torch.float64) - (BATCH - 1) / 2
    correlations = (ranks @ ramp) / (ramp @ ramp)
    # Spearman's correlation of independent orders has mean 0 and variance 1 / (n - 1).
    assert abs(float(correlations.mean())) < 4 / math.sqrt((BATCH - 1) * len(batches))
    assert float(correlations.std()) == pytest.approx(1 / math.sqrt(BATCH - 1), rel=0.1)


def test_the_seed_decides_the_order() -> None:
    def first(seed: int) -> Tensor:
        stream = ({SITE: torch.arange(512.0)[:, None]} for _ in range(1))
        return ShuffleBuffer(stream, 512, seed=seed).next_batch(64)[SITE]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def kolmogorov_smirnov(a: npt.NDArray[np.number], b: npt.NDArray[np.number]) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.concatenate([a, b])
    below_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    below_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())
