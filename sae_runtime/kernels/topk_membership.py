"""Whether given latents are among the k largest of their row, with as little of the encoder as tells it.

An edit needs the value of one latent of a TopK dictionary: its pre-activation if it is among the row's k largest, else
0. Most latents are not, and k larger ones are found in a small part of the encoder. Only where a latent may be kept
must all others be looked at: in bytes, if there is such a copy of the encoder (see byte_encoder), and then those that
are too near to tell by sums in float64, where they decide. Decoding reads every weight for a few tokens, so that a
dictionary read in full would cost as much as the blocks that it is as large as.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels.byte_encoder import BLOCK, LANES, ByteEncoder, Tally
from sae_runtime.kernels.compiled import compiled
from sae_runtime.kernels.products import Linear, few_rows_linear

SMALL_LATENTS = 4096
"""An encoder of up to so many latents is looked at whole, if there is no copy in bytes."""
FIRST_TILE = 1024
"""Latents that are looked at first, for k up to 64."""
TILE_GROWTH = 8
"""Each tile ends at so many times the latent where the one before it ended."""
MOST_ROWS = 128
"""Rows that are read at once: their digits stay in the cache of a core, as float32 pre-activations of a tile do."""
MOST_NEAR = 512
"""Latents of a row, on average, up to which exact products are made of each by itself."""
_MOST_HELD = 1 << 24  # pre-activations
_ROUNDOFF = 2.0**-16  # of a value, between two orders of its additions

Floats = NDArray[Any]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def kept_in_topk(
    x: Tensor, encoder: Linear, k: int, latents: Ints, values: Floats, in_bytes: ByteEncoder | None = None
) -> Bools:
    """Whether latent latents[i] is among the k largest of `encoder(x)` in row i.

    Of equal values the one of the lower latent is the larger, as in `tiled_topk`. Where rounding decides which of two
    values is larger, the answer may differ from that of another order of additions.

    Args:
        x: [n, d], contiguous, float32 (or float64 without the copy in bytes), on the CPU.
        encoder: of n_latents outputs.
        latents: [n].
        values: [n] their pre-activations, positive, in the dtype of x.
        in_bytes: a copy of the encoder.

    Returns:
        [n].
    """
    n_latents = len(encoder.weight)
    whole = in_bytes is None and n_latents <= SMALL_LATENTS
    n_at_once = max(1, _MOST_HELD // n_latents)
    if not whole:
        n_at_once = min(n_at_once, MOST_ROWS)
        if len(x) <= n_at_once:
            return _look_at_tiles(x, encoder, k, latents, values, in_bytes)
    kept = np.empty(len(x), np.bool_)
    for start in range(0, len(x), n_at_once):
        some = slice(start, start + n_at_once)
        if whole:
            _look_at_all(encoder(x[some]).numpy(), k, latents[some], kept[some])
        else:
            kept[some] = _look_at_tiles(x[some], encoder, k, latents[some], values[some], in_bytes)
    return kept


def _look_at_all(pre: Floats, k: int, latents: Ints, kept: Bools) -> None:
    """Writes which are kept, of all pre-activations [n, n_latents]."""
    if pre.flags.c_contiguous:
        _compare_rows(pre, k, latents, kept)
    else:
        _compare_columns(pre.T, k, latents, kept)


def _look_at_tiles(
    x: Tensor, encoder: Linear, k: int, latents: Ints, values: Floats, in_bytes: ByteEncoder | None
) -> Bools:
    n = len(x)
    tally = Tally.of(n, MOST_NEAR * n)
    if in_bytes is None:
        _count_floats(x, encoder, k, latents, values, tally)
    else:
        _count_bytes(x.numpy(), in_bytes, len(encoder.weight), k, latents, values, tally)
    kept = np.empty(n, np.bool_)
    if not _decide(k, tally, x.numpy(), encoder.weight.numpy(), encoder.bias.numpy(), latents, kept):
        doubtful = np.flatnonzero((tally.n_above < k) & (tally.n_above + tally.n_near >= k))
        some = np.empty(len(doubtful), np.bool_)
        _look_at_all(encoder(x[torch.from_numpy(doubtful)]).numpy(), k, latents[doubtful], some)
        kept[doubtful] = some
    return kept


def _tiles(n_latents: int, k: int) -> Iterator[tuple[int, int]]:
    """First latent and end of each; starts are multiples of BLOCK."""
    start, end = 0, -(-max(FIRST_TILE, 16 * k) // BLOCK) * BLOCK
    while start < n_latents:
        yield start, min(end, n_latents)
        start, end = end, end * TILE_GROWTH


def _count_floats(x: Tensor, encoder: Linear, k: int, latents: Ints, values: Floats, tally: Tally) -> None:
    low, high = values * (1 - _ROUNDOFF), values * (1 + _ROUNDOFF)
    rows = np.arange(len(x))
    for start, end in _tiles(len(encoder.weight), k):
        pre = few_rows_linear(x, encoder.weight[start:end], encoder.bias[start:end]).t().contiguous().numpy()
        _count(pre, start, k, rows, low, high, latents, tally)
        undecided = np.flatnonzero(tally.n_above[rows] < k)
        if not len(undecided):
            break
        rows, x = rows[undecided], x[torch.from_numpy(undecided)]


def _count_bytes(
    x: Floats, in_bytes: ByteEncoder, n_latents: int, k: int, latents: Ints, values: Floats, tally: Tally
) -> None:
    rows, packed = np.arange(len(x)), None
    tiles = _tiles(n_latents, k) if len(x) > LANES else [(0, n_latents)]  # of one group nothing can be left out
    for start, end in tiles:
        if packed is None or len(rows) <= LANES * (len(packed.digits) - 1):  # in fewer groups
            packed = in_bytes.pack(x, rows, values)
        in_bytes.count(packed, start, end, k, latents, tally)
        if end < n_latents:
            rows = rows[tally.n_above[rows] < k]
            if not len(rows):
                break


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
    tally: Tally,
) -> None:
    """Adds how many of a tile [latents, rows] are above `high`, and of the others from `low` on, but for the own.

    Rows that have k above are done.
    """
    n_above, n_near, near = tally
    n_pairs = n_near.sum()
    width = pre.shape[1]
    period = max(1, 64 // width) * width
    bound, column = np.empty(period, low.dtype), np.empty(period, np.int64)
    for i in range(period):
        column[i] = i % width
        bound[i] = low[rows[column[i]]]
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
                row, latent = rows[column[first % period + i]], start + (first + i) // width
                if n_above[row] >= k or latent == latents[row]:
                    continue
                if some[i] > high[row]:
                    n_above[row] += 1
                    continue
                n_near[row] += 1
                if n_pairs < len(near):
                    near[n_pairs, 0], near[n_pairs, 1] = row, latent
                n_pairs += 1


@compiled
def _decide(k: int, tally: Tally, x: Floats, weight: Floats, bias: Floats, latents: Ints, kept: Bools) -> bool:
    """Writes which are kept, with exact values of near ones where these decide; False if not all of them are known.

    The own value is added up like the others, so that equal encoder rows have equal values.
    """
    n_above, n_near, near = tally
    n, n_pairs, n_left = len(x), n_near.sum(), n_near.copy()
    is_doubtful = np.empty(n, np.bool_)
    any_doubtful = False
    for row in range(n):
        kept[row] = n_above[row] < k
        is_doubtful[row] = kept[row] and n_above[row] + n_left[row] >= k
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
            continue
        n_left[row] -= 1
        if value > own_value[row] or (value == own_value[row] and latent < latents[row]):
            n_above[row] += 1
        kept[row] = n_above[row] < k
        is_doubtful[row] = kept[row] and n_above[row] + n_left[row] >= k
    return True
