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
"""Latents that are looked at first, for k up to 64."""
TILE_GROWTH = 8
"""Each tile ends at so many times the latent where the one before it ended."""
MOST_ROWS = 128
"""Rows of a tile. W @ x.T in bfloat16 takes half the time of x @ W.T for so many, and no more for each of them than for
more rows."""
ROWS_STEP = 16
"""Screened tiles have a multiple of so many rows: products take no longer, and oneDNN makes code for each new shape."""
MOST_NEAR = 1024
"""Latents of a row, on average, up to which exact products are made of each by itself."""
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
    whole = n_latents <= SMALL_LATENTS and (screen is None or len(x) < FEW_ROWS.stop)
    n_at_once = max(1, _MOST_HELD // n_latents)
    if not whole:
        n_at_once = min(n_at_once, MOST_ROWS)
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
    # What exceeds `high` is larger, and what is below `low` is not.
    rounded: Tensor
    low: Floats
    high: Floats
    if screen is None:
        rounded, low, high = x, values * (1 - _ROUNDOFF), values * (1 + _ROUNDOFF)
    else:
        rounded, low, high = _round(x, values, screen)
    n, n_latents = len(x), len(encoder.weight)
    n_above, n_near = np.zeros(n, np.int64), np.zeros(n, np.int64)
    near, n_pairs = np.empty((MOST_NEAR * n, 2), np.int64), 0  # rows and latents
    rows = np.arange(n)  # those that are read
    start, end = 0, max(FIRST_TILE, 16 * k)
    while start < n_latents and len(rows):
        end = min(end, n_latents)
        if screen is None:
            found: Floats = _products(rounded, encoder.weight[start:end], encoder.bias[start:end])
        else:
            found = _screened(rounded, screen.weight[start:end], screen.bias[start:end])
        n_pairs = _count(found, start, k, rows, low, high, latents, n_above, n_near, near, n_pairs)
        undecided = np.flatnonzero(n_above[rows] < k)
        if len(undecided) <= len(rows) - (1 if screen is None else ROWS_STEP) or not len(undecided):
            rows, rounded = rows[undecided], rounded[torch.from_numpy(undecided)]
        start, end = end, end * TILE_GROWTH
    weight, bias = encoder.weight.numpy(), encoder.bias.numpy()
    kept = np.empty(n, np.bool_)
    if not _decide(k, n_above, n_near, near, n_pairs, x.numpy(), weight, bias, latents, kept):
        doubtful = np.flatnonzero((n_above < k) & (n_above + n_near >= k))
        some = np.empty(len(doubtful), np.bool_)
        _look_at_all(encoder(x[torch.from_numpy(doubtful)]).numpy(), k, latents[doubtful], some)
        kept[doubtful] = some
    return kept


def _products(x: Tensor, weight: Tensor, bias: Tensor) -> Floats:
    """[n_latents, n]"""
    found: Floats = few_rows_linear(x, weight, bias).t().contiguous().numpy()
    return found


def _screened(x: Tensor, weight: Tensor, bias: Tensor) -> NDArray[np.int16]:
    """The bits of bfloat16 pre-activations [n_latents, n], and the last column again up to a multiple of ROWS_STEP."""
    if missing := -len(x) % ROWS_STEP:
        x = torch.cat([x, x[-1:].expand(missing, -1)])
    found: NDArray[np.int16] = torch.addmm(bias[:, None], weight, x.t()).view(torch.int16).numpy()
    return found


def _round(x: Tensor, values: Floats, screen: Screen) -> tuple[Tensor, NDArray[np.int16], NDArray[np.int16]]:
    """x in bfloat16, and the bits of the bounds of its screened values.

    Bits of positive numbers are ordered like the numbers, and above those of negative ones. Screened values were
    rounded once more when they were stored, and so are the bounds; for the rest of the error see screened_topk.
    """
    sums = SUM_ROUNDOFF * (x.shape[1] + 2)
    of_rounded = screen.largest_residual + sums * screen.largest_norm
    absolute = (UNIT_ROUNDOFF + sums) * screen.largest_bias
    bits = np.empty(x.shape, np.uint16)
    low, high = np.empty(len(x), np.int16), np.empty(len(x), np.int16)
    _round_rows(x.numpy(), values, screen.largest_norm, of_rounded, absolute, 3 * UNIT_ROUNDOFF, bits, low, high)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), low, high


@compiled
def _round_rows(
    x: Floats,
    values: Floats,
    of_residual: float,
    of_rounded: float,
    absolute: float,
    roundoff: float,
    bits: NDArray[np.uint16],
    low: NDArray[np.int16],
    high: NDArray[np.int16],
) -> None:
    """Rounds to the nearest bfloat16, of two as near to the even one.

    The bounds are the values less and plus the error of their row, and widened by `roundoff` of themselves. The error
    is `of_residual` of the length of what rounding takes away, `of_rounded` of that of the rounded row, and `absolute`.
    """
    single = np.empty(x.shape[1], np.uint32)
    rounded = single.view(np.float32)
    ends = np.empty(2, np.float32)
    for i in range(len(x)):
        own, own_bits, of_own = x[i], bits[i], x[i].view(np.uint32)
        residual, squares = np.float32(0), np.float32(0)
        for j in range(len(own)):
            kept = (of_own[j] + np.uint32(0x7FFF) + ((of_own[j] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            own_bits[j] = kept
            single[j] = kept << np.uint32(16)
        for j in range(len(own)):
            residual += (own[j] - rounded[j]) * (own[j] - rounded[j])
            squares += rounded[j] * rounded[j]
        error = np.sqrt(residual) * of_residual + np.sqrt(squares) * of_rounded + absolute
        ends[0] = max((values[i] - error) * (1 - roundoff), 0.0)
        ends[1] = (values[i] + error) * (1 + roundoff)
        low[i], high[i] = ends.view(np.uint32)[0] >> np.uint32(16), ends.view(np.uint32)[1] >> np.uint32(16)


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
def _count(
    pre: Floats,
    start: int,
    k: int,
    rows: Ints,
    low: Floats,
    high: Floats,
    latents: Ints,
    n_above: Ints,
    n_near: Ints,
    near: Ints,
    n_pairs: int,
) -> int:
    """Adds how many of a tile [latents, rows] are above `high`, and of the others from `low` on, but for the own.

    Further columns repeat the last row. The others, as rows and latents, are appended to the first `n_pairs` of `near`
    while it has room; returns the number of pairs with those for which it had none. Rows that have k above are done.
    """
    width = pre.shape[1]
    period = max(1, 64 // width) * width
    bound, column = np.empty(period, low.dtype), np.empty(period, np.int64)
    for i in range(period):
        column[i] = i % width
        bound[i] = low[rows[min(column[i], len(rows) - 1)]]
    values = pre.reshape(-1)
    # Few values count: it is first asked whether any of some 64 does.
    at_once = period if period <= 64 else width // 2 if width % 2 == 0 else width
    for first in range(0, len(values), at_once):
        some, own_bound = values[first : first + at_once], bound[first % period :]
        any_counts = False
        for i in range(len(some)):
            any_counts |= some[i] >= own_bound[i]
        if not any_counts:
            continue
        for i in range(len(some)):
            if some[i] >= own_bound[i]:
                place = column[first % period + i]
                latent = start + (first + i) // width
                if place >= len(rows):
                    continue
                row = rows[place]
                if n_above[row] >= k or latent == latents[row]:
                    continue
                if some[i] > high[row]:
                    n_above[row] += 1
                    continue
                n_near[row] += 1
                if n_pairs < len(near):
                    near[n_pairs, 0], near[n_pairs, 1] = row, latent
                n_pairs += 1
    return n_pairs


@compiled
def _decide(
    k: int,
    n_above: Ints,
    n_near: Ints,
    near: Ints,
    n_pairs: int,
    x: Floats,
    weight: Floats,
    bias: Floats,
    latents: Ints,
    kept: Bools,
) -> bool:
    """Writes which are kept, with exact values of near ones where these decide; False if not all of them are known.

    The own value is added up like the others, so that equal encoder rows have equal values.
    """
    n = len(x)
    is_doubtful = np.empty(n, np.bool_)
    any_doubtful = False
    for row in range(n):
        kept[row] = n_above[row] < k
        is_doubtful[row] = kept[row] and n_above[row] + n_near[row] >= k
        any_doubtful |= is_doubtful[row]
    if not any_doubtful or n_pairs > len(near):
        return not any_doubtful
    own_value = np.empty(n, np.float64)
    for i in range(n + n_pairs):
        is_own = i < n
        row = i if is_own else near[i - n, 0]
        if not is_doubtful[row]:
            continue
        latent = latents[row] if is_own else near[i - n, 1]
        own_x, own_weight = x[row], weight[latent]
        value = np.float64(0)
        for d in range(len(own_x)):
            value += np.float64(own_x[d]) * own_weight[d]
        value += bias[latent]
        if is_own:
            own_value[row] = value
        elif value > own_value[row] or (value == own_value[row] and latent < latents[row]):
            n_above[row] += 1
            kept[row] = n_above[row] < k
    return True
