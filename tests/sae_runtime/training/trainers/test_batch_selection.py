"""Selection over a batch against sorting all of its pre-activations, in every way that the guess of a level can go.

Matrix products of different shapes may differ in their last bits, so tiles and replicas give the bits of the whole
batch only where no sum is rounded. Most inputs here are whole numbers so small that every sum is exact.
"""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime.training import choose_latents
from sae_runtime.training.choose_latents import indices_above
from sae_runtime.training.communicator import SINGLE, Communicator, SingleProcess
from sae_runtime.training.trainers import batch_selection
from sae_runtime.training.trainers.batch_selection import Entries, entries_above, largest_of_batch

N, D = 192, 8


LARGEST = {torch.float32: 64, torch.bfloat16: 1}
"""Of the whole numbers in inputs. In bfloat16 nearly all values are equal to others, at the threshold too."""


def whole_numbers(shape: tuple[int, ...], largest: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def weights(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    largest = LARGEST[dtype]
    return whole_numbers((N, D), largest, dtype, seed=0), whole_numbers((N,), largest**2, dtype, seed=1)


def rows(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return whole_numbers((n, D), LARGEST[dtype], dtype, seed=2)


def dense(entries: Sequence[Entries], sizes: Sequence[int]) -> Tensor:
    """(tokens, N) with the chosen values, else 0."""
    parts = []
    for e, size in zip(entries, sizes, strict=True):
        part = torch.zeros(size, N)
        part[e.rows, e.latents] = e.values
        assert torch.equal(torch.argsort(e.rows * N + e.latents), torch.arange(len(e.rows)))  # in order
        parts.append(part)
    return torch.cat(parts)


def expected(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    pre = (x.double() @ weight.double().T + bias.double()).float()
    wanted = min(k * len(x), int((pre > 0).sum()))
    order = pre.flatten().sort(descending=True, stable=True).indices[:wanted]
    return torch.zeros(pre.numel()).scatter(0, order, pre.flatten()[order]).view_as(pre)


@pytest.fixture(params=["one tile", "tiles of 7 tokens"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one tile":
        monkeypatch.setattr(choose_latents, "TILE_ELEMENTS", 7 * N)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16: many equal values at the threshold
@pytest.mark.parametrize("sizes", [[40], [16, 16, 8], [3, 37]])
@pytest.mark.parametrize("k", [1, 5, 60, N])  # N: fewer than k · B are positive
def test_the_largest_of_a_batch(dtype: torch.dtype, sizes: list[int], k: int) -> None:
    x, (weight, bias) = rows(40, dtype), weights(dtype)
    found, least = largest_of_batch(x.split(sizes), weight, bias, k)
    chosen = dense(found, sizes)
    assert torch.equal(chosen, expected(x, weight, bias, k))
    assert float(least) == float(chosen[chosen > 0].min())


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("order", ["strong first", "weak first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_differ_much(order: str, dtype: torch.dtype) -> None:
    """A first tile of strong tokens gives too high a level; one of weak tokens lets far too many candidates through."""
    x, (weight, bias) = rows(60, dtype), weights(dtype)
    x[:10] *= 16 if order == "strong first" else 0.125  # powers of two: sums stay exact
    k = 4
    found, _ = largest_of_batch(x.split([10, 50]), weight, bias, k)
    assert torch.equal(dense(found, [10, 50]), expected(x, weight, bias, k))
    # Rows need not have k latents, and may have more than any fixed number of candidates.
    assert int(found[0].by_row(10, N).offsets.diff().max() if order == "strong first" else 0) in (0, *range(2 * k, N))


def test_candidates_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_latents, "TILE_ELEMENTS", 7 * N)
    x, (weight, bias) = rows(700), weights()
    x[:7] *= 0.125
    most = 0
    join = batch_selection._join

    def watched(found: list[Entries], like: Tensor) -> Entries:
        nonlocal most
        joined = join(found, like)
        most = max(most, len(joined.values))
        return joined

    monkeypatch.setattr(batch_selection, "_join", watched)
    found, _ = largest_of_batch([x], weight, bias, 2)
    assert torch.equal(dense(found, [700]), expected(x, weight, bias, 2))
    assert most <= batch_selection._MOST * 2 * 700 + 7 * N


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_moves_only_what_is_near_the_threshold(dtype: torch.dtype) -> None:
    """Of inputs that are not whole: a sum may be off by its rounding, and so may the choice between two values."""
    k, generator = 5, torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((40, D), (N, D), (N,)))
    found, least = largest_of_batch(x.split([16, 16, 8]), weight, bias, k)
    chosen = dense(found, [16, 16, 8])
    exact = x.double() @ weight.double().T + bias.double()
    # D products and the bias: each of the sums is rounded once, by half a unit in its last place at most.
    off = (D + 1) * torch.finfo(dtype).eps / 2 * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    assert (chosen > 0).sum() == k * 40
    assert ((chosen - exact).abs() <= off)[chosen > 0].all()
    assert (exact + off >= float(least))[chosen > 0].all()
    assert (exact - off <= float(least))[chosen == 0].all()


def test_no_positive_pre_activation() -> None:
    weight, _ = weights()
    found, least = largest_of_batch([rows(5)], weight, torch.full((N,), -1e6), 3)
    assert len(found[0].values) == 0
    assert least == torch.inf


class Replica(SingleProcess):
    """One of several threads that stand for replicas."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.data_rank, self.data_parallel_size = rank, len(table)  # type: ignore[misc]
        self._meeting, self._table = meeting, table

    def gather_over_data(self, tensor: Tensor) -> Tensor:
        self._table[self.data_rank] = tensor.clone()
        self._meeting.wait()
        gathered = torch.stack(self._table)
        self._meeting.wait()
        return gathered

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        return self.gather_over_data(tensor).sum(0)

    def min_over_data(self, tensor: Tensor) -> Tensor:
        return self.gather_over_data(tensor).amin(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_choose_what_one_process_does(dtype: torch.dtype) -> None:
    x, (weight, bias) = rows(30, dtype), weights(dtype)
    x[:10] *= 3
    whole, least = largest_of_batch([x], weight, bias, 4, SINGLE)
    meeting, table = threading.Barrier(3), [None] * 3
    results: list[Any] = [None] * 3

    def work(rank: int) -> None:
        replica: Communicator = Replica(rank, meeting, table)
        results[rank] = largest_of_batch([x[rank * 10 : rank * 10 + 10]], weight, bias, 4, replica)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert torch.equal(dense([found[0] for found, _ in results], [10] * 3), dense(whole, [30]))
    assert [float(found_least) for _, found_least in results] == [float(least)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [N, N + 1])  # with and without whole groups
def test_levels_are_compared_in_full_precision(dtype: torch.dtype, n: int) -> None:
    values = torch.randn(64, n, generator=torch.Generator().manual_seed(1)).to(dtype)
    present = values[values > 0].float().sort().values
    for level in (0.0, float(present[500]), float(present[500]) + 1e-5, float(present[500]) - 1e-5, 0.123456, 1e9):
        of_latents = torch.linspace(0, 2 * level, n)
        for bound in (torch.tensor(level), of_latents):
            r, c = indices_above(values, bound)
            assert torch.equal(torch.stack([r, c], 1), torch.nonzero(values.float() > bound))


def test_entries_above_a_level_for_each_latent() -> None:
    x, (weight, bias) = rows(20), weights()
    level = 1000 * torch.rand(N, generator=torch.Generator().manual_seed(2))
    entries = entries_above(x, weight, bias, level)
    pre = (x.double() @ weight.double().T + bias.double()).float()
    assert torch.equal(dense([entries], [20]), pre * (pre > level))
    pattern = entries.by_row(20, N)
    assert torch.equal(pattern.offsets.diff(), (pre > level).sum(1))
    assert torch.equal(pattern.rows, entries.rows)
