"""Exact top-k of `x @ weight.T + bias` that never holds more than a tile of the result.

Rows and latents are cut into tiles. In a tile the few entries that can be among the k largest of their row are found by
the maxima of groups (see groups.py), and only these are sorted. Ties go to the lower latent index, so the choice
between given values depends neither on the tiling nor on the other rows of a batch. (The values do, in their last bits:
a matrix product of another shape may add in another order.)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels.groups import GROUPS_PER_K, Groups, as_bits, ordered_bits
from sae_runtime.kernels.products import linear

TILE_ELEMENTS = 1 << 22  # pre-activations held at once
TILE_LATENTS = 1 << 15
MIN_TILE_ROWS = 256  # fewer rows per pass over the weights make the matrix product slower
FEW_ELEMENTS = 1 << 16
"""For so few entries torch.topk, one call, is quicker than the many of looking into groups: as when rows decode, where
the weights of each product push the code of the next calls out of the caches."""


def reference_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, relu: bool = False) -> tuple[Tensor, Tensor]:
    """What `tiled_topk` computes, from the dense result."""
    values, indices = torch.sort(torch.addmm(bias, x, weight.T), dim=-1, descending=True, stable=True)
    return _finish(values[:, :k].clone(), indices[:, :k].clone(), relu)


@torch.no_grad()
def tiled_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    relu: bool = False,
    tile_rows: int | None = None,
    tile_latents: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of `x @ weight.T + bias`.

    x [n, d_in], weight [n_latents, d_in], bias [n_latents], all of one floating dtype, 1 <= k <= n_latents.
    Returns values [n, k] in that dtype, descending, and indices int64 [n, k]; equal values by ascending index. With
    `relu` entries that are not positive come back as value 0, index -1.

    The comparison is made on pre-activations rounded to that dtype. In bfloat16 (8 significant bits) and float16
    values near the k-th one often round to the same number; the lower index then wins, so a few of the k latents can
    differ from the float32 choice, always among latents whose values agree to the dtype's precision.
    """
    n, n_latents = x.shape[0], weight.shape[0]
    tile_latents = min(n_latents, tile_latents or TILE_LATENTS)
    tile_rows = tile_rows or max(MIN_TILE_ROWS, TILE_ELEMENTS // tile_latents)
    values = x.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    # One memory for all tiles: fresh pages cost a quarter of the product's time.
    memory = x.new_empty(min(n, tile_rows) * tile_latents)
    for row in range(0, n, tile_rows):
        rows = slice(row, min(n, row + tile_rows))
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, n_latents, tile_latents):
            latents = slice(start, min(n_latents, start + tile_latents))
            pre = linear(x[rows], weight[latents], bias[latents], memory)
            found = topk_of_rows(pre, min(k, pre.shape[1]))
            found[1].add_(start)
            best = found if best is None else _merge(best, found, k)
        assert best is not None
        values[rows], indices[rows] = best
    return _finish(values, indices, relu)


def topk_of_rows(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of [n, m]: values [n, k] descending, indices int64 [n, k].

    Equal values by ascending index.
    """
    if values.device.type != "cpu" or values.shape[1] < 2 * GROUPS_PER_K * k:
        return _sorted(values, k)
    if values.numel() <= FEW_ELEMENTS:
        found, indices = values.topk(k + 1, dim=1)
        if not bool((found[:, 1:] == found[:, :-1]).any()):  # it takes any of equal values
            return found[:, :k], indices[:, :k]
    bits = as_bits(values)
    groups = Groups(bits, k)
    bound = groups.kth_maximum(k)
    if not bool((bound > 0).all()):  # negative entries can be among the k, and their bits are not in order
        bits = ordered_bits(values)
        groups = Groups(bits, k)
        bound = groups.kth_maximum(k)
    rows, columns = groups.at_least(bound)
    splits = np.searchsorted(rows.numpy(), np.arange(len(values) + 1))
    indices = columns[topk_of_candidates(bits[rows, columns], splits, k)]
    return values.gather(1, indices), indices


def topk_of_candidates(bits: Tensor, splits: NDArray[np.int64], k: int) -> Tensor:
    """Places int64 [n, k] of the k largest of each row's candidates, largest first; equal ones by their order.

    bits [c] on the CPU, ordered like the values; row i has those from splits[i] up to splits[i + 1], k or more; splits
    [n + 1].
    """
    counts = np.diff(splits)
    if not len(counts):
        return torch.empty(0, k, dtype=torch.int64)
    padded = np.full((len(counts), counts.max()), torch.iinfo(bits.dtype).min, bits.numpy().dtype)
    # The i-th candidate of a row goes to the i-th column.
    row = np.arange(len(counts)).repeat(counts)
    padded[row, np.arange(len(bits)) - splits[row]] = bits.numpy()
    order = np.argsort(~padded, axis=1, kind="stable")[:, :k]  # ~ turns the order of integers round
    return torch.from_numpy(order + splits[:-1, None])


def _finish(values: Tensor, indices: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    if relu:
        indices.masked_fill_(values <= 0, -1)
        values.relu_()
    return values, indices


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two tiles; every index in `a` is below every index in `b`."""
    values, indices = torch.cat([a[0], b[0]], dim=1), torch.cat([a[1], b[1]], dim=1)
    found, place = topk_of_rows(values, min(k, values.shape[1]))
    return found, indices.gather(1, place)


def _sorted(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk_of_rows` by sorting; where there is a wider integer, by the k largest keys (value, place from the end)."""
    m = values.shape[1]
    if values.device.type == "cpu" or values.dtype == torch.float64:
        found, indices = values.sort(dim=1, descending=True, stable=True)
        return found[:, :k], indices[:, :k]
    from_end = torch.arange(m - 1, -1, -1, device=values.device)
    keys = (ordered_bits(values).to(torch.int64) << 32) + from_end
    indices = (m - 1) - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, indices), indices
