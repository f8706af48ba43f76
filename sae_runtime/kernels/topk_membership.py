"""Whether given latents are among the k largest of their row, with as little of the encoder as tells it.

An edit needs the value of one latent of a TopK dictionary: its pre-activation if it is among the row's k largest, else
0. Most latents are not, and k larger ones are found in a small part of the encoder. Only where a latent may be kept
must all others be looked at: in bfloat16, if there is such a copy of the encoder (see screened_topk), and then those
that are too near to tell by sums in float64, where they decide. Decoding reads every weight for a few tokens, so that a
dictionary read in full would cost as much as the blocks that it is as large as.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels.compiled import compiled
from sae_runtime.kernels.linear import FEW_ROWS, Linear, few_rows_linear
from sae_runtime.kernels.screened_topk import SUM_ROUNDOFF, UNIT_ROUNDOFF, Screen

SMALL_LATENTS = 4096
"""An encoder of up to so many latents is looked at whole, and for few rows in float32: screening would save nothing."""
FIRST_TILE = 1024
"""Latents that are looked at first, for k up to 64; each tile is as large as all before it, up to the largest."""
LARGEST_TILE = 8192
_MOST_HELD = 1 << 24  # pre-activations
_ROUNDOFF = 2.0**-16  # of a value, between two orders of its additions

Floats = NDArray[Any]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def kept_in_topk(
    x: Tensor, encoder: Linear, k: int, latents: Ints, values: Floats, screen: Screen | None = None
) -> Bools:
    """Whether latent latents[i] is among the k largest of `encoder(x)` in row i.

    Of equal values the one of the lower latent is the larger, as in `tiled_topk`. Where rounding decides which of two
    values is larger, the answer may differ from that of another order of additions.

    Args:
        x: [n, d], contiguous, float32 (or float64 without a screen), on the CPU.
        encoder: of n_latents outputs.
        latents: [n].
        values: [n] their pre-activations, positive, in the dtype of x.
        screen: of the encoder's weight and bias.

    Returns:
        [n].
    """
    kept = np.empty(len(x), np.bool_)
    n_latents = len(encoder.weight)
    n_at_once = max(1, _MOST_HELD // n_latents)
    whole = n_latents <= SMALL_LATENTS and (screen is None or len(x) < FEW_ROWS.stop)
    for start in range(0, len(x), n_at_once):
        some = slice(start, start + n_at_once)
        if whole:
            _look_at_all(encoder(x[some]).numpy(), k, latents[some], kept[some])
        else:
            kept[some] = _look_at_tiles(x[some], encoder, k, latents[some], values[some], screen)
    return kept


def _look_at_all(pre: Floats, k: int, latents: Ints, kept: Bools) -> None:
    """Writes which are kept, of all pre-activations [n, n_latents]."""
    if pre.flags.c_contiguous:
        _compare_rows(pre, k, latents, kept)
    else:
        _compare_columns(pre.T, k, latents, kept)


def _look_at_tiles(x: Tensor, encoder: Linear, k: int, latents: Ints, values: Floats, screen: Screen | None) -> Bools:
    weight, bias = encoder.weight, encoder.bias
    read = (x, weight, bias) if screen is None else (x.bfloat16(), screen.weight, screen.bias)
    host_x = x.numpy()
    # What exceeds `high` is larger, and what is below `low` is not. Screened values were rounded once more when they
    # were stored, and so are the bounds.
    low, high = np.empty_like(values), np.empty_like(values)
    if screen is None:
        _bounds(host_x, values, 0.0, 0.0, _ROUNDOFF, low, high)
    else:
        # |x - bf16(x)| is at most UNIT_ROUNDOFF of |x|; for the rest see screened_topk.
        sums = SUM_ROUNDOFF * (x.shape[1] + 2)
        relative = (UNIT_ROUNDOFF + sums) * screen.largest_norm + screen.largest_residual
        absolute = (UNIT_ROUNDOFF + sums) * screen.largest_bias
        _bounds(host_x, values, (1 + UNIT_ROUNDOFF) * relative, absolute, 3 * UNIT_ROUNDOFF, low, high)
        low, high = _bfloat16_bits(low), _bfloat16_bits(high)

    n_above, n_near = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
    rows = np.arange(len(values))  # about which nothing is known yet
    tiles: list[tuple[int, Ints, Floats]] = []  # the first latent, the rows and their pre-activations
    start, size = 0, max(FIRST_TILE, 16 * k)
    while start < len(weight) and len(rows):
        end = min(start + size, len(weight))
        some = read[0] if len(rows) == len(values) else read[0][torch.from_numpy(rows)]
        pre = few_rows_linear(some, read[1][start:end], read[2][start:end])
        found = pre.numpy() if screen is None else pre.view(torch.int16).numpy()
        if found.flags.c_contiguous:
            _count_rows(found, start, rows, low, high, latents, n_above, n_near)
        else:
            _count_columns(found.T, start, rows, low, high, latents, n_above, n_near)
        tiles.append((start, rows, found))
        if end < len(weight):
            rows = rows[n_above[rows] < k]
        start, size = end, min(end, LARGEST_TILE)
    doubtful = rows[(n_above[rows] < k) & (n_above[rows] + n_near[rows] >= k)]
    if len(doubtful):
        for start, rows, found in tiles:
            places = np.searchsorted(rows, doubtful)
            _count_exactly(
                found, start, places, doubtful, low, high, host_x, weight.numpy(), bias.numpy(), latents, n_above
            )
    kept: Bools = n_above < k
    return kept


def _bfloat16_bits(positive: NDArray[np.float32]) -> NDArray[np.int16]:
    """The bits of positive numbers rounded down to bfloat16. Such bits are ordered like the numbers, and above those of
    negative ones."""
    return (positive.view(np.uint32) >> np.uint32(16)).astype(np.int16)


@compiled
def _bounds(
    x: Floats, values: Floats, relative: float, absolute: float, roundoff: float, low: Floats, high: Floats
) -> None:
    """Values less and plus `relative` of their row's length and `absolute`, and widened by `roundoff` of themselves."""
    for i in range(len(values)):
        squares = x[i, 0] * x[i, 0]
        for j in range(1, x.shape[1]):
            squares += x[i, j] * x[i, j]
        error = np.sqrt(squares) * relative + absolute
        low[i] = max((values[i] - error) * (1 - roundoff), 0.0)
        high[i] = (values[i] + error) * (1 + roundoff)


@compiled
def _compare_rows(pre: Floats, k: int, latents: Ints, kept: Bools) -> None:
    for i in range(len(latents)):
        own = latents[i]
        n_larger = 0
        for j in range(pre.shape[1]):
            n_larger += pre[i, j] > pre[i, own]
        if n_larger < k:
            for j in range(own):
                n_larger += pre[i, j] == pre[i, own]
        kept[i] = n_larger < k


@compiled
def _compare_columns(pre: Floats, k: int, latents: Ints, kept: Bools) -> None:
    """The same for pre [latents, rows]."""
    n = len(latents)
    own = np.empty(n, pre.dtype)
    n_larger = np.zeros(n, np.int32)
    for i in range(n):
        own[i] = pre[latents[i], i]
    for j in range(len(pre)):
        for i in range(n):
            n_larger[i] += pre[j, i] > own[i]
    for i in range(n):
        if n_larger[i] < k:
            for j in range(latents[i]):
                n_larger[i] += pre[j, i] == own[i]
        kept[i] = n_larger[i] < k


@compiled
def _count_rows(
    pre: Floats, start: int, rows: Ints, low: Floats, high: Floats, latents: Ints, n_above: Ints, n_near: Ints
) -> None:
    """Adds how many of a tile [rows, latents] are above `high`, and of the others from `low` on, but for the own."""
    for i in range(len(rows)):
        row = rows[i]
        above = np.int32(0)
        from_low = np.int32(0)
        for j in range(pre.shape[1]):
            above += pre[i, j] > high[row]
            from_low += pre[i, j] >= low[row]
        own = latents[row] - start
        if 0 <= own < pre.shape[1]:
            above -= pre[i, own] > high[row]
            from_low -= pre[i, own] >= low[row]
        n_above[row] += above
        n_near[row] += from_low - above


@compiled
def _count_columns(
    pre: Floats, start: int, rows: Ints, low: Floats, high: Floats, latents: Ints, n_above: Ints, n_near: Ints
) -> None:
    """The same for a tile [latents, rows]."""
    n = len(rows)
    bounds = np.empty((2, n), low.dtype)
    counts = np.zeros((2, n), np.int32)
    for i in range(n):
        bounds[0, i], bounds[1, i] = low[rows[i]], high[rows[i]]
    for j in range(len(pre)):
        for i in range(n):
            counts[0, i] += pre[j, i] >= bounds[0, i]
            counts[1, i] += pre[j, i] > bounds[1, i]
    for i in range(n):
        own = latents[rows[i]] - start
        if 0 <= own < len(pre):
            counts[0, i] -= pre[own, i] >= bounds[0, i]
            counts[1, i] -= pre[own, i] > bounds[1, i]
        n_above[rows[i]] += counts[1, i]
        n_near[rows[i]] += counts[0, i] - counts[1, i]


@compiled
def _count_exactly(
    pre: Floats,
    start: int,
    places: Ints,
    rows: Ints,
    low: Floats,
    high: Floats,
    x: Floats,
    weight: Floats,
    bias: Floats,
    latents: Ints,
    n_above: Ints,
) -> None:
    """Adds how many of a tile are from `low` to `high` and larger; the rows are at `places` in it.

    The own value is added up like the others, so that equal encoder rows have equal values.
    """
    for i in range(len(rows)):
        row = rows[i]
        own = latents[row]
        value = np.float64(0)
        for d in range(x.shape[1]):
            value += np.float64(x[row, d]) * weight[own, d]
        value += bias[own]
        for j in range(pre.shape[1]):
            found = pre[places[i], j]
            if found >= low[row] and found <= high[row] and start + j != own:
                other = np.float64(0)
                for d in range(x.shape[1]):
                    other += np.float64(x[row, d]) * weight[start + j, d]
                other += bias[start + j]
                if other > value or (other == value and start + j < own):
                    n_above[row] += 1
