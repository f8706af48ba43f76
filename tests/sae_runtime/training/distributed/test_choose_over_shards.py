"""The k largest over shards against a top-k of all latents in one tensor."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from sae_runtime.training.communicator import ProcessGroupCommunicator
from sae_runtime.training.distributed.choose_over_shards import (
    Offers,
    choose_over_shards,
    expected_saturation,
    first_offer,
)
from tests.sae_runtime.training.distributed.worker_processes import WorkerProcesses

N_TOKENS, N_LATENTS, K = 50, 96, 8
Kind = Literal["random", "one shard", "ties", "few elsewhere"]


def pre_activations(kind: Kind) -> Tensor:
    """(N_TOKENS, N_LATENTS)"""
    x = torch.randn(N_TOKENS, N_LATENTS, generator=torch.Generator().manual_seed(3))
    if kind == "one shard":
        x[::2, -N_LATENTS // 4 :] += 10.0  # every other token has all of its k on the last shard
    if kind == "ties":
        x = (x * 2).round()
    if kind == "few elsewhere":  # all shards but the last have next to nothing to offer
        x[:, 1 : -N_LATENTS // 4] = -torch.inf
    return x


def _chosen(kind: Kind, k: int, first: int, complete: bool) -> tuple[Tensor, Tensor, Tensor]:
    """This shard's part as a dense (B, n / S) of the kept values, how many are kept, and the saturated tokens."""
    communicator = ProcessGroupCommunicator(torch.distributed.get_world_size())
    mine = pre_activations(kind).chunk(communicator.n_shards, dim=1)[communicator.shard_rank]
    offers = Offers.sorted(*torch.topk(mine, min(k, mine.shape[1]), dim=1))
    keep, saturated = choose_over_shards(offers, k, communicator, first=first, complete=complete)
    return torch.zeros_like(mine).scatter(1, offers.indices, offers.values.where(keep, 0.0)), keep.sum(1), saturated


@pytest.mark.parametrize("kind", ["random", "one shard", "ties", "few elsewhere"])
@pytest.mark.parametrize(("world", "k", "first"), [(4, K, 8), (4, K, 2), (4, K, 4), (2, K, 4), (4, 40, 24), (1, K, 8)])
def test_it_equals_a_top_k_of_all_latents(workers: WorkerProcesses, kind: Kind, world: int, k: int, first: int) -> None:
    parts = workers.run(_chosen, world, kind, k, first, True)
    x = pre_activations(kind)
    if kind == "few elsewhere":
        k = min(k, N_LATENTS // 4 + 1)
    best = x.topk(k, dim=1)
    assert torch.equal(sum(n for _, n, _ in parts), torch.full((N_TOKENS,), k))
    found = torch.cat([dense for dense, _, _ in parts], dim=1)
    if kind == "ties":  # which of equal latents is arbitrary, their values are not
        assert torch.equal(found.sort(dim=1).values, torch.zeros_like(x).scatter(1, *best[::-1]).sort(dim=1).values)
    else:
        assert torch.equal(found, torch.zeros_like(x).scatter(1, best.indices, best.values))


def test_first_offers_alone_miss_latents_exactly_for_saturated_tokens(workers: WorkerProcesses) -> None:
    parts = workers.run(_chosen, 4, "one shard", K, 4, False)
    found = torch.cat([dense for dense, _, _ in parts], dim=1)
    x = pre_activations("one shard")
    best = x.topk(K, dim=1)
    wrong = (found != torch.zeros_like(x).scatter(1, best.indices, best.values)).any(1)
    saturated = parts[0][2]
    assert all(torch.equal(other, saturated) for _, _, other in parts)
    assert wrong[::2].all()
    assert not (wrong & ~saturated).any()
    assert not saturated.all()
    assert torch.equal(sum(n for _, n, _ in parts), torch.full((N_TOKENS,), K))


def test_the_first_offer() -> None:
    """The paper's with its factor; else so many that about 1 % of the tokens need more."""
    assert first_offer(32, 8, 4.0) == 16
    assert first_offer(32, 2, 4.0) == 32
    assert first_offer(256, 128, 4.0) == 8
    assert first_offer(5, 4, 0.1) == 2  # never so few that the shards could not fill k together
    assert first_offer(5, 4, 100.0) == 5
    assert first_offer(8, 1) == 8
    for k, n_shards in ((256, 128), (32, 64), (2048, 2)):
        first = first_offer(k, n_shards)
        assert expected_saturation(k, n_shards, first) <= 0.01 < expected_saturation(k, n_shards, first - 1)


def test_saturation_is_as_expected_of_latents_spread_at_random() -> None:
    """Counts of k random draws over shards: the bound holds, and is close where the counts are rarely that high."""
    k, n_shards, first, tokens = 64, 8, 20, 20_000
    draws = torch.randint(n_shards, (tokens, k), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(draws, n_shards).sum(1)  # (tokens, n_shards)
    found = float((counts >= first).any(1).float().mean())
    expected = expected_saturation(k, n_shards, first)
    assert found == pytest.approx(expected, abs=4 * (expected / tokens) ** 0.5)
    assert 0 < found < 0.1


def test_offers_too_few_for_k_are_an_error(workers: WorkerProcesses) -> None:
    with pytest.raises(AssertionError, match="4 shards that offer 1 latents each cannot fill k = 8"):
        workers.run(_chosen, 4, "random", K, 1, False)
