"""The largest entry of each of k groups of neighbouring latents, never holding more than a tile of the dense result."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_runtime.kernels.topk import MIN_TILE_ROWS, TILE_ELEMENTS, TILE_LATENTS


def reference_groupmax(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `tiled_groupmax` computes, from the dense result."""
    dense = torch.addmm(bias, x, weight.T).relu()  # [n, n_latents]
    groups = dense.view(len(x), k, -1)
    first = (groups == groups.amax(dim=-1, keepdim=True)).to(torch.int8).argmax(dim=-1)
    values = groups.gather(-1, first.unsqueeze(-1)).squeeze(-1)
    return _by_value(values, first + torch.arange(k, device=x.device) * groups.shape[-1])


@torch.no_grad()
def tiled_groupmax(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, *, tile_elements: int = TILE_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """The largest entry, if positive, of each of k equal runs of neighbouring columns of `x @ weight.T + bias`.

    x [n, d_in], weight [n_latents, d_in], bias [n_latents], of one floating dtype; k divides n_latents. Returns values
    [n, k] descending and indices int64 [n, k], with 0 and -1 where a group has no positive entry; equal values by
    ascending index, and of equal values in a group the lower index is kept. This is sparsify's `groupmax`.
    """
    n, n_latents = x.shape[0], weight.shape[0]
    size = n_latents // k
    per_tile = max(1, TILE_LATENTS // size)  # groups; a group is never cut
    tile_rows = max(1, min(MIN_TILE_ROWS, tile_elements // size), tile_elements // (per_tile * size))
    values = x.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    for row in range(0, n, tile_rows):
        rows = slice(row, min(n, row + tile_rows))
        for group in range(0, k, per_tile):
            groups = slice(group, min(k, group + per_tile))
            latents = slice(groups.start * size, groups.stop * size)
            pre = torch.addmm(bias[latents], x[rows], weight[latents].T).view(rows.stop - row, -1, size)
            best, place = pre.max(dim=-1)  # of equal entries the first
            values[rows, groups] = best
            indices[rows, groups] = place + torch.arange(groups.start, groups.stop, device=x.device) * size
    return _by_value(values.relu_(), indices)


def _by_value(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, order).masked_fill_(values <= 0, -1)
