"""Sparse result of an activation that looks at each latent alone, never holding more than a tile of the dense one."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_runtime.kernels.latent_activation import LatentActivation
from sae_runtime.kernels.topk import BITS, MIN_TILE_ROWS, TILE_ELEMENTS, TILE_LATENTS

GROUP = 64


def reference_active(x: Tensor, weight: Tensor, activation: LatentActivation) -> tuple[Tensor, Tensor]:
    """What `tiled_active` computes, from the dense result."""
    dense = activation.before_relu(x, weight).relu()
    values, indices = dense.sort(dim=-1, descending=True, stable=True)
    longest = int((dense > 0).sum(dim=1).max()) if len(dense) else 0
    values, indices = values[:, :longest], indices[:, :longest]
    return values, indices.masked_fill(values <= 0, -1)


@torch.no_grad()
def tiled_active(
    x: Tensor,
    weight: Tensor,
    activation: LatentActivation,
    *,
    tile_rows: int | None = None,
    tile_latents: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Active latents of each row of x.

    x [n, d_in], weight [n_latents, d_in] and the activation's tensors [n_latents] are of one floating dtype. Returns
    values [n, k] descending with 0 at the padding, and indices int64 [n, k] with -1 there; k is the largest number of
    active latents in any row (0 if there are none), equal values by ascending index.
    """
    n, n_latents = x.shape[0], weight.shape[0]
    tile_latents = min(n_latents, tile_latents or TILE_LATENTS)
    tile_rows = tile_rows or max(MIN_TILE_ROWS, TILE_ELEMENTS // tile_latents)
    tile = x.new_empty(min(n, tile_rows) * tile_latents)
    parts: list[tuple[Tensor, Tensor]] = []
    for row in range(0, n, tile_rows):
        x_rows = x[row : row + tile_rows]
        m = len(x_rows)
        found_rows, found_latents, found_values = [], [], []
        for start in range(0, n_latents, tile_latents):
            stop = min(n_latents, start + tile_latents)
            pre = tile[: m * (stop - start)].view(m, stop - start)
            activation[start:stop].before_relu(x_rows, weight[start:stop], out=pre)
            for rows, latents in _positive(pre):
                found_rows.append(rows)
                found_latents.append(latents + start)
                found_values.append(pre[rows, latents])
        parts.append(_pad(torch.cat(found_rows), torch.cat(found_latents), torch.cat(found_values), m))
    longest = max((values.shape[1] for values, _ in parts), default=0)
    values = x.new_zeros(n, longest)
    indices = torch.full((n, longest), -1, dtype=torch.int64, device=x.device)
    row = 0
    for part_values, part_indices in parts:
        m, k = part_values.shape
        values[row : row + m, :k], indices[row : row + m, :k] = part_values, part_indices
        row += m
    return values, indices


def _positive(pre: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of the positive entries of [n, m], in two parts that each ascend.

    Few latents are active, and looking for them one by one is slow: only groups with a positive maximum are searched.
    Signs are read off the bits, whose maxima are faster than those of 16-bit floats.
    """
    m = pre.shape[1]
    whole = m - m % GROUP
    bits = pre.view(BITS[pre.dtype]) if pre.dtype in BITS else pre
    groups = bits[:, :whole].reshape(-1, GROUP)
    active = (groups.amax(dim=-1) > 0).nonzero().squeeze(1)
    which, inside = (groups[active] > 0).nonzero(as_tuple=True)
    place = active[which] * GROUP + inside  # in the first `whole` columns, row by row
    rest = (bits[:, whole:] > 0).nonzero(as_tuple=True)
    first = (place // max(whole, 1), place % max(whole, 1))
    return [first, (rest[0], rest[1] + whole)]


def _pad(rows: Tensor, latents: Tensor, values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Coordinates of positive entries -> padded rows, values descending. Latents ascend within a row on entry."""
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    rows, latents, values = rows[order], latents[order], values[order]
    per_row = torch.bincount(rows, minlength=n)
    column = torch.arange(len(rows), device=rows.device) - (per_row.cumsum(0) - per_row)[rows]
    k = int(per_row.max()) if n else 0
    padded_values = values.new_zeros(n, k)
    padded_latents = torch.full((n, k), -1, dtype=torch.int64, device=rows.device)
    padded_values[rows, column] = values
    padded_latents[rows, column] = latents
    return padded_values, padded_latents
