"""Exact top-k of `x @ weight.T + bias` that never holds more than a tile of the result.

Rows and latents are cut into tiles. Inside a tile the k largest are found in steps: the k best groups of neighbouring
latents by their maximum contain the k best latents, so only those groups are looked at again, cut into smaller groups,
until few candidates are left. Ties go to the lower latent index at every step, so the choice between given values
depends neither on the tiling nor on the other rows of a batch. (The values do, in their last bits: a matrix product of
another shape may add in another order.)

Floats are compared through their bit patterns: as integers they are ordered the same way (negative ones after a
flip), integer maxima are faster, and a bit pattern with a position below it makes one sortable key without ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 22  # pre-activations held at once
TILE_LATENTS = 1 << 15
FEW_ELEMENTS = 1 << 16
MIN_TILE_ROWS = 256  # fewer rows per pass over the weights make the matrix product slower
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


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
    tile = x.new_empty(min(n, tile_rows) * tile_latents)
    for row in range(0, n, tile_rows):
        rows = slice(row, min(n, row + tile_rows))
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, n_latents, tile_latents):
            stop = min(n_latents, start + tile_latents)
            m = rows.stop - row
            pre = tile[: m * (stop - start)].view(m, stop - start)
            torch.addmm(bias[start:stop], x[rows], weight[start:stop].T, out=pre)
            found = topk_of_rows(pre, min(k, stop - start), relu=relu)
            found[1].add_(start)
            best = found if best is None else _merge(best, found, k)
        assert best is not None
        values[rows], indices[rows] = best
    return _finish(values, indices, relu)


def topk_of_rows(values: Tensor, k: int, *, relu: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of [n, m]: values [n, k] descending, indices int64 [n, k]. Spoils `values`.

    With `relu` only the positive ones among them are right; the others are some entries that are not positive.
    """
    if values.dtype not in BITS:  # float64: there is no integer for value and position
        found, indices = values.sort(dim=-1, descending=True, stable=True)
        return found[:, :k], indices[:, :k]
    bits = values.view(BITS[values.dtype])
    if not relu:
        _flip_negative(bits)  # with relu their order does not matter
    chosen, indices = _select(bits, k)
    if not relu:
        _flip_negative(chosen)
    return chosen.view(values.dtype), indices


def _finish(values: Tensor, indices: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    if relu:
        indices.masked_fill_(values <= 0, -1)
        values.relu_()
    return values, indices


def _flip_negative(bits: Tensor) -> None:
    """Negative floats count backwards as integers; turn them round, or back, in place."""
    info = torch.iinfo(bits.dtype)
    bits.bitwise_xor_((bits >> (info.bits - 1)).bitwise_and_(info.max))


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two tiles; every index in `a` is below every index in `b`."""
    values, indices = torch.cat([a[0], b[0]], dim=1), torch.cat([a[1], b[1]], dim=1)
    found, place = topk_of_rows(values, min(k, values.shape[1]))
    return found, indices.gather(1, place)


def _select(bits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest integers of each row of [n, m], descending, and their places; equal ones by place."""
    n, m = bits.shape
    # Measured at k 32; any other choice is correct, only slower. Grouping a few rows costs more calls than it saves.
    group = 1 if n * m <= FEW_ELEMENTS else 64 if m >= 512 * k else 16 if m >= 64 * k else 1
    if group == 1:
        return _largest(bits, k)
    n_groups = m // group
    whole = n_groups * group
    groups = bits[:, :whole].contiguous().view(n, n_groups, group)
    # In ascending order, so that a candidate's place says whose latent index is lower.
    best = _largest(groups.amax(dim=-1), k)[1].sort(dim=-1).values  # [n, k]
    offsets = torch.arange(n, device=bits.device).unsqueeze(1) * n_groups
    candidates = groups.view(-1, group).index_select(0, (best + offsets).view(-1)).view(n, k * group)
    if whole < m:  # the last, incomplete group always takes part
        candidates = torch.cat([candidates, bits[:, whole:]], dim=1)
    found, place = _select(candidates, k)
    from_group = best.gather(1, (place // group).clamp_max(k - 1)) * group + place % group
    return found, torch.where(place < k * group, from_group, place - k * group + whole)


def _largest(bits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_select` for few columns: a partial sort of keys (value, place counted from the end), which all differ."""
    m = bits.shape[1]
    wide = bits.dtype == torch.int32 or m > 1 << 16
    key_dtype, shift = (torch.int64, 32) if wide else (torch.int32, 16)
    from_end = torch.arange(m - 1, -1, -1, dtype=key_dtype, device=bits.device)
    keys = torch.add(from_end, bits.to(key_dtype), alpha=1 << shift)
    if keys.device.type == "cpu":  # NumPy's vectorised selection is several times faster there than torch.topk
        if k < m:
            keys.numpy().partition(m - k, axis=-1)
        best = keys[:, m - k :].contiguous()
        best.numpy().sort(axis=-1)
        best = best.flip(-1)
    else:
        best = keys.topk(k, dim=-1).values
    return (best >> shift).to(bits.dtype), (m - 1) - (best & ((1 << shift) - 1)).to(torch.int64)
