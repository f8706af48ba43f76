"""An encoder in bytes, which tells of most latents whether they exceed a value at a quarter of the bytes to read.

Weights are bytes with a scale of their own for each latent, inputs two bytes with one for each row: w' = s p and
x' = t q with whole p and q. Sums of p * q are exact. With r = x - x' and e = w - w', Cauchy and Schwarz give

    |x.w - x'.w'| <= |r| |w| + |x'| |e|

All norms are measured; |e| is each latent's own. What is left in doubt is for others to find out (topk_membership).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels.compiled import compiled
from sae_runtime.kernels.screened_topk import SUM_ROUNDOFF

LANES = 16
"""Rows of a group: the columns of a tile."""
BLOCK = 32
"""Latents of a block: the rows of two tiles. With two, four sums are under way at once, as many as hide the delay."""
STEP = 64
"""Inputs of a tile."""
MOST_INPUTS = (2**31 - 1) // (255 * 127) // STEP * STEP
"""Of an encoder whose sums of bytes an int32 holds."""
PARALLEL_BYTES = 1 << 19
"""Read on one thread up to so many: others would have to be waited for."""
_AT_ONCE = 128 * BLOCK  # latents that are copied at once
_NORM_ROUNDOFF = 1e-6

Floats = NDArray[Any]
Ints = NDArray[np.int64]


class Tally(NamedTuple):
    """What was found of n rows, each of which is compared with a value of its own; all int64."""

    n_above: Ints  # [n] latents that are surely above it
    n_near: Ints  # [n] those that are too near to tell
    near: Ints  # [room, 2] rows and latents of the near ones, n_near.sum() of them or as many as there is room for

    @classmethod
    def of(cls, n: int, room: int) -> Tally:
        """With nothing found."""
        return cls(np.zeros(n, np.int64), np.zeros(n, np.int64), np.empty((room, 2), np.int64))


class PackedRows(NamedTuple):
    """Rows in the order in which they are multiplied."""

    rows: Ints  # their places among all
    digits: NDArray[np.uint8]  # [groups, steps, 2, STEP // 4, LANES, 4]
    per_row: NDArray[np.float32]  # [groups, 4, LANES]: scale, norm, low, high


@dataclass(frozen=True, eq=False)
class ByteEncoder:
    """The copy, a quarter of the encoder's size."""

    weight: Tensor  # int8 [blocks, steps, BLOCK, STEP]
    per_latent: Tensor  # float32 [blocks, 4, BLOCK]: see amx.ARGUMENTS
    n_inputs: int
    largest_norm: float
    largest_bias: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> ByteEncoder:
        """weight float32 [n_latents, n_inputs], bias float32 [n_latents], of finite numbers.

        ValueError: more inputs than an int32 holds the sum of.
        """
        if weight.shape[1] > MOST_INPUTS:
            raise ValueError(f"the encoder has {weight.shape[1]} inputs, expected up to {MOST_INPUTS}")
        n_latents, n_inputs = weight.shape
        n_blocks, n_steps = -(-n_latents // BLOCK), -(-n_inputs // STEP)
        tiles = torch.zeros(n_blocks, n_steps, BLOCK, STEP, dtype=torch.int8)
        numbers = torch.zeros(4, n_blocks * BLOCK)
        numbers[2] = -torch.inf  # the bias of those that fill the last block up
        largest_norm = 0.0
        for start in range(0, n_latents, _AT_ONCE):
            some = weight[start : start + _AT_ONCE].double()
            scale = (some.abs().amax(1) / 127).float()
            scale.masked_fill_(scale < torch.finfo(torch.float32).tiny, 1.0)
            whole = (some / scale.double()[:, None]).round_().clamp_(-127, 127)
            residual = torch.linalg.vector_norm(some - whole * scale.double()[:, None], dim=1) * (1 + _NORM_ROUNDOFF)
            largest_norm = max(largest_norm, float(torch.linalg.vector_norm(some, dim=1).max()))
            of_sum = (-128 * whole.sum(1)).int().view(torch.float32)
            own = slice(start, start + len(some))
            numbers[:, own] = torch.stack([of_sum, scale, bias[own], residual.float()])
            padded = F.pad(whole.char(), (0, n_steps * STEP - n_inputs, 0, -len(some) % BLOCK))
            blocks = padded.view(-1, BLOCK, n_steps, STEP).transpose(1, 2)
            tiles[start // BLOCK : start // BLOCK + len(blocks)] = blocks
        per_latent = numbers.view(4, n_blocks, BLOCK).transpose(0, 1).contiguous()
        return cls(tiles, per_latent, n_inputs, largest_norm * (1 + _NORM_ROUNDOFF), float(bias.abs().max()))

    def pack(self, x: Floats, rows: Ints, values: Floats) -> PackedRows:
        """x float32 [n, n_inputs] at `rows` (int64), and what latents of those rows are compared with: values float32
        [n], which may be off by as much as a float32 sum of n_inputs products is.
        """
        n_groups = -(-len(rows) // LANES)
        digits = np.empty((n_groups, self.weight.shape[1], 2, STEP // 4, LANES, 4), np.uint8)
        per_row = np.empty((n_groups, 4, LANES), np.float32)
        of_sums = SUM_ROUNDOFF * (self.n_inputs + 32)
        _pack(x, rows, values, self.largest_norm, self.largest_bias, of_sums, digits, per_row)
        return PackedRows(rows, digits, per_row)

    def count(self, packed: PackedRows, start: int, end: int, k: int, latents: Ints, tally: Tally) -> None:
        """Adds to the tally, for each packed row, the latents of [start, end) that are above its value, and those so
        near that it cannot be told, but for the row's own one of `latents` (int64 [n]).

        Rows that have k above are done: what else is counted of them may be any part. `start` is a multiple of BLOCK,
        and `end` is unless it is the last.
        """
        amx = _amx()
        counters = np.array([start // BLOCK, tally.n_near.sum()])
        latents = np.ascontiguousarray(latents, np.int64)
        arguments = np.zeros(1, amx.ARGUMENTS)
        steps, weight, per_latent = self.weight.shape[1], self.weight.data_ptr(), self.per_latent.data_ptr()
        _fill(arguments, counters, end, steps, weight, per_latent, amx.LAYOUT, packed, k, latents, tally)
        n_bytes = (end - start) * self.n_inputs * len(packed.digits)
        amx.scan(arguments, on_all_threads=n_bytes > PARALLEL_BYTES)


@functools.cache
def _amx() -> ModuleType:
    from sae_runtime.kernels import amx  # takes half a second

    return amx


def bytes_are_fast() -> bool:
    """Whether this machine's CPU has matrix units for bytes (AMX)."""
    return bool(_amx().is_supported())


@compiled
def _fill(
    arguments: NDArray[Any],
    counters: Ints,
    end: int,
    steps: int,
    weight: int,
    per_latent: int,
    layout: NDArray[np.uint8],
    packed: PackedRows,
    k: int,
    latents: Ints,
    tally: Tally,
) -> None:
    """Writes numbers and addresses to amx.ARGUMENTS [1]; compiled, because NumPy takes a microsecond for each."""
    own = arguments[0]
    own.counters, own.end, own.k = counters.ctypes.data, end, k
    own.steps, own.weight, own.per_latent, own.layout = steps, weight, per_latent, layout.ctypes.data
    own.n_groups, own.digits, own.per_row = len(packed.digits), packed.digits.ctypes.data, packed.per_row.ctypes.data
    own.n_rows, own.rows, own.n, own.latents = (
        len(packed.rows),
        packed.rows.ctypes.data,
        len(latents),
        latents.ctypes.data,
    )
    own.n_above, own.n_near = tally.n_above.ctypes.data, tally.n_near.ctypes.data
    own.most_near, own.near = len(tally.near), tally.near.ctypes.data


@compiled
def _pack(
    x: Floats,
    rows: Ints,
    values: Floats,
    largest_norm: float,
    largest_bias: float,
    of_sums: float,
    digits: NDArray[np.uint8],
    per_row: NDArray[np.float32],
) -> None:
    """Writes x[rows] to digits [groups, steps, 2, STEP // 4, LANES, 4] and per_row [groups, 4, LANES] (see PackedRows).

    A row's `low` and `high` are its value less and plus the error of everything but its latents' residuals: |r| |w|,
    and float32 sums. Lanes without a row get bounds that nothing reaches.
    """
    n_padded = digits.shape[1] * STEP
    words = digits.view(np.uint32).reshape(len(digits), -1, 2, STEP // 4, LANES)
    whole = np.zeros(n_padded, np.float32)
    bytes_high, bytes_low = np.empty(n_padded, np.uint8), np.empty(n_padded, np.uint8)
    words_high, words_low = bytes_high.view(np.uint32), bytes_low.view(np.uint32)
    for i in range(len(digits) * LANES):
        group, lane = divmod(i, LANES)
        if i >= len(rows):
            per_row[group, :2, lane], per_row[group, 2:, lane] = 0, np.inf
            words[group, :, :, :, lane] = 0
            continue
        own = x[rows[i]]
        largest = np.float32(0)
        for j in range(len(own)):
            largest = max(largest, abs(own[j]))
        scale = largest / np.float32(32767)
        if scale < 1e-30:
            scale = np.float32(1)
        inverse = np.float32(1) / scale
        squares, residual = np.float64(0), np.float64(0)
        for j in range(len(own)):
            whole[j] = min(max(np.rint(own[j] * inverse), np.float32(-32767)), np.float32(32767))
            held = np.float64(whole[j]) * scale
            squares += held * held
            residual += (own[j] - held) * (own[j] - held)
        for j in range(n_padded):
            digit = np.int32(whole[j]) + np.int32(32768)
            bytes_high[j], bytes_low[j] = digit >> 8, digit & 255
        for j in range(n_padded // 4):
            step, place = divmod(j, STEP // 4)
            words[group, step, 0, place, lane] = words_high[j]
            words[group, step, 1, place, lane] = words_low[j]
        norm, left = np.sqrt(squares) * (1 + _NORM_ROUNDOFF), np.sqrt(residual) * (1 + _NORM_ROUNDOFF)
        error = left * largest_norm + of_sums * ((norm + left) * largest_norm + largest_bias)
        per_row[group, 0, lane], per_row[group, 1, lane] = scale, norm
        per_row[group, 2, lane], per_row[group, 3, lane] = values[rows[i]] - error, values[rows[i]] + error
