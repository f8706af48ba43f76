"""Initial weights of one shard of a TopK dictionary: those that one process would draw, made a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_runtime.training.communicator import Communicator
from sae_runtime.training.distributed.choose_over_shards import Offers, choose_over_shards
from sae_runtime.training.initialisation import unit_rows
from sae_runtime.training.sparse_gradients import SelectedLatents, sparse_decode

_ROWS_AT_ONCE = 4096  # drawing a multiple of 16 numbers at a time leaves the generator's sequence as it is


def shard_of(n_latents: int, communicator: Communicator) -> slice:
    """The latents of this worker's shard.

    Raises:
        ValueError: the shards would not be equal.
    """
    if n_latents % communicator.n_shards:
        raise ValueError(f"{n_latents} latents cannot be split into {communicator.n_shards} equal shards")
    size = n_latents // communicator.n_shards
    return slice(communicator.shard_rank * size, (communicator.shard_rank + 1) * size)


def shard_directions(n_latents: int, d_in: int, generator: torch.Generator, shard: slice) -> Tensor:
    """Rows `shard` of initialisation.tied_directions(n_latents, d_in, generator), which leaves the generator alike.

    All rows are drawn, as the sequence of a generator has no shortcut, but only the shard's are kept.
    """
    directions = torch.empty(shard.stop - shard.start, d_in)
    for start in range(0, n_latents, _ROWS_AT_ONCE):
        drawn = torch.randn(min(_ROWS_AT_ONCE, n_latents - start), d_in, generator=generator)
        first, last = max(start, shard.start), min(start + len(drawn), shard.stop)
        if first < last:
            directions[first - shard.start : last - shard.start] = unit_rows(drawn[first - start : last - start])
    return directions


def sharded_encoder_scale(
    directions: Tensor, k: int, generator: torch.Generator, communicator: Communicator, *, probes: int = 256
) -> float:
    """initialisation.encoder_scale of a sharded dictionary; `directions` [n / n_shards, d_in] are this shard's rows."""
    x = unit_rows(torch.randn(probes, directions.shape[1], generator=generator)).to(directions)
    values, indices = torch.topk(x @ directions.T, min(k, len(directions)), dim=1)
    offers = Offers.sorted(values, indices)
    keep, _ = choose_over_shards(offers, k, communicator, first=k)
    selection = SelectedLatents.equal_rows(offers.indices, len(directions))
    decoded = sparse_decode((offers.values.relu() * keep).reshape(-1), selection, directions)
    return 1 / float(torch.linalg.vector_norm(communicator.sum_over_shards(decoded), dim=1).mean())
