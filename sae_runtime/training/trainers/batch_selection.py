"""Sparse selection by level: all latents of a batch above a level, or exactly the batch's largest pre-activations.

Pre-activations exist in tiles of tokens only; what is kept of a tile are the few entries above a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.training.choose_latents import indices_above, pre_activation_tiles, top_indices
from sae_runtime.training.communicator import SINGLE, Communicator
from sae_runtime.training.sparse_gradients import SelectedLatents

_MARGIN = 1.25
"""The first level aims at this many candidates per chosen entry."""
_MOST = 4
"""With this many candidates per chosen entry, those that cannot be among the largest are dropped."""


@dataclass(frozen=True)
class Entries:
    """Pre-activations of some tokens and latents, in order of tokens and then of latents."""

    rows: Tensor
    """int64 (entries,)"""
    latents: Tensor
    """int64 (entries,)"""
    values: Tensor
    """float32 (entries,)"""

    def __getitem__(self, kept: Tensor) -> Entries:
        return Entries(self.rows[kept], self.latents[kept], self.values[kept])

    def by_row(self, n_rows: int, n_latents: int) -> SelectedLatents:
        """The pattern of `n_rows` tokens."""
        offsets = self.rows.new_zeros(n_rows + 1)
        torch.cumsum(torch.bincount(self.rows, minlength=n_rows), 0, out=offsets[1:])
        return SelectedLatents(self.latents, offsets, n_latents)


@torch.no_grad()
def entries_above(centred: Tensor, weight: Tensor, latent_bias: Tensor, level: Tensor) -> Entries:
    """All entries of centred (B, d) @ weight.T + latent_bias over `level` (float32): one number or one a latent (n,).

    The others share the dtype in which the pre-activations are computed. No level is below 0.
    """
    tiles = pre_activation_tiles(centred, weight, latent_bias)
    return _join([_entries_of_tile(start, tile, level) for start, tile in tiles], centred)


@torch.no_grad()
def largest_of_batch(
    batch: Sequence[Tensor],
    weight: Tensor,
    latent_bias: Tensor,
    k: int,
    communicator: Communicator = SINGLE,
) -> tuple[list[Entries], Tensor]:
    """The k · (tokens) largest positive pre-activations of a batch, fewer if fewer are positive, and the least of them.

    Exact: a level below the threshold is guessed from a first tile of tokens; candidates are everything above
    it. If these are too few the guess was too high, and the batch is read again with a lower one, at last with 0. Of
    equal values at the threshold the first in order are taken, over all replicas.

    Args:
        batch: centred micro-batches [b, d] of this replica, in the dtype of weight (n, d) and latent_bias (n,).
        k: average number of entries per token.
        communicator: replicas whose batches count as one; each gets the entries of its own tokens.

    Returns:
        Entries of each micro-batch, and the least chosen value over all replicas (float32 scalar; inf for none).
    """
    n_tokens = sum(map(len, batch)) * communicator.data_parallel_size
    n_chosen = min(k * n_tokens, len(weight) * n_tokens)
    level = communicator.min_over_data(_first_level(batch[0], weight, latent_bias, k))
    while True:
        candidates = [_collect(x, weight, latent_bias, level, n_chosen) for x in batch]
        values = torch.cat([entries.values for entries in candidates])
        total = communicator.sum_over_data(torch.tensor(len(values), device=values.device))
        if int(total) >= n_chosen or float(level) <= 0:
            break
        level = torch.where(level > 0.1, level / 2, 0.0)
    threshold, ties = _threshold(values, n_chosen, communicator)
    above, equal = values > threshold, values == threshold
    keep = above | (equal & (equal.cumsum(0) <= ties))
    least = torch.where(keep, values, torch.inf).min() if len(values) else values.new_tensor(torch.inf)
    masks = keep.split([len(entries.values) for entries in candidates])
    return [entries[mask] for entries, mask in zip(candidates, masks, strict=True)], communicator.min_over_data(least)


def _first_level(x: Tensor, weight: Tensor, latent_bias: Tensor, k: int) -> Tensor:
    """A guess somewhat below the threshold, at least 0: what leaves k · _MARGIN a token in the first tile."""
    tile = next(pre_activation_tiles(x, weight, latent_bias))[1]
    width = min(2 * k, tile.shape[1])
    candidates = tile.gather(1, top_indices(tile, width)).float().flatten()
    rank = min(round(_MARGIN * k * len(tile)), len(candidates))
    return torch.topk(candidates, rank).values[-1].clamp_min(0)


def _collect(x: Tensor, weight: Tensor, latent_bias: Tensor, level: Tensor, n_chosen: int) -> Entries:
    """Entries above `level`; where they grow to several times `n_chosen`, only those that can be among the largest."""
    entries_of_tiles: list[Entries] = []
    held = 0
    for start, tile in pre_activation_tiles(x, weight, latent_bias):
        entries_of_tiles.append(_entries_of_tile(start, tile, level))
        held += len(entries_of_tiles[-1].values)
        if held > _MOST * n_chosen:
            joined = _join(entries_of_tiles, x)
            # `n_chosen` values of these tokens alone reach this level, so the threshold does; of later tokens only what
            # exceeds it can be chosen, as equal values are taken in order.
            level = torch.topk(joined.values, n_chosen).values[-1]
            entries_of_tiles = [joined[joined.values >= level]]
            held = len(entries_of_tiles[0].values)
    return _join(entries_of_tiles, x)


def _entries_of_tile(start: int, tile: Tensor, level: Tensor) -> Entries:
    rows, latents = indices_above(tile, level)
    return Entries(rows + start, latents, tile[rows, latents].float())


def _join(pieces: list[Entries], like: Tensor) -> Entries:
    if len(pieces) == 1:
        return pieces[0]
    none = torch.empty(0, dtype=torch.int64, device=like.device)
    rows = torch.cat([none, *(entries.rows for entries in pieces)])
    latents = torch.cat([none, *(entries.latents for entries in pieces)])
    return Entries(rows, latents, torch.cat([none.float(), *(entries.values for entries in pieces)]))


def _threshold(values: Tensor, n_chosen: int, communicator: Communicator) -> tuple[Tensor, int]:
    """The `n_chosen`-th largest of all replicas' positive values, and how many equal ones this replica may take.

    Bisection over the bits of positive floats, which are ordered like integers: 31 counts that replicas add up, instead
    of gathering all values.
    """
    bits = values.view(torch.int32)
    low, high = 0, 0x7F800000  # count(bits >= low) >= n_chosen unless low is 0; count(bits >= high) < n_chosen
    while high - low > 1:
        middle = (low + high) // 2
        count = communicator.sum_over_data((bits >= middle).sum())
        low, high = (middle, high) if int(count) >= n_chosen else (low, middle)
    threshold = torch.tensor(low, dtype=torch.int32, device=values.device).view(torch.float32)
    counts = torch.stack([(bits > low).sum(), (bits == low).sum()])
    above, equal = communicator.gather_over_data(counts).unbind(1)
    n_ties = n_chosen - int(above.sum()) - int(equal[: communicator.data_rank].sum())
    return threshold, max(0, n_ties)
