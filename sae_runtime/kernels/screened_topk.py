"""Exact float32 top-k of `x @ weight.T + bias` with the dense product in bfloat16.

CPUs with bfloat16 matrix units compute that product three to four times faster than in float32, but its values decide
wrongly near the k-th one. So it only screens: for every row a bound on its rounding error is known, whatever lies more
than twice the bound below the k-th largest screened value cannot be among the k largest, and the few latents that can
(one or two k of them) are computed again in float32. The result is that of `tiled_topk`, always, up to the order of
float32 additions.

The bound: with x' = bf16(x), w' = bf16(w), r = x - x', s = w - w', Cauchy and Schwarz give
|x.w - x'.w'| <= |r| |w| + |x'| |s|; to which come the float32 sums and the rounding of the bias. All norms are
measured.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels.groups import Groups, as_bits, ordered_bits
from sae_runtime.kernels.topk import tiled_topk, topk_of_candidates

MIN_ROWS = 16
"""With fewer rows reading the weights takes the time, not the product."""
MIN_LATENTS_PER_K = 16
MAX_CANDIDATES_PER_K = 16
TILE_ELEMENTS = 1 << 24  # bfloat16 pre-activations held at once
UNIT_ROUNDOFF = 2.0**-8  # of bfloat16
SUM_ROUNDOFF = 2.0**-23  # of float32 sums, for every term

# torch says this of every CSR tensor; the one operation used here is checked against dense products in the tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


@dataclass(frozen=True, eq=False)
class Screen:
    """A bfloat16 copy of an encoder, and how far it is from it."""

    weight: Tensor  # bfloat16 [n_latents, d_in]
    bias: Tensor  # bfloat16 [n_latents]
    largest_norm: float  # of the float32 rows
    largest_residual: float  # of the float32 rows less their copies
    largest_bias: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Screen:
        """weight float32 [n_latents, d_in], bias float32 [n_latents]."""
        copy = weight.bfloat16()
        norms, residuals = (torch.linalg.vector_norm(rows, dim=1).max() for rows in (weight, weight - copy))
        return cls(copy, bias.bfloat16(), float(norms), float(residuals), float(bias.abs().max()))


def screening_is_fast() -> bool:
    """Whether this machine's CPU has bfloat16 matrix units (AMX)."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def can_screen(x: Tensor, n_latents: int, k: int) -> bool:
    """Whether `screened_topk` takes these rows, and is worth its while."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and len(x) >= MIN_ROWS
        and n_latents >= MIN_LATENTS_PER_K * k
    )


@torch.no_grad()
def screened_topk(
    x: Tensor, weight: Tensor, bias: Tensor, screen: Screen, k: int, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of `x @ weight.T + bias`, as `tiled_topk` gives them.

    x float32 [n, d_in] that `can_screen` takes, weight float32 [n_latents, d_in], bias [n_latents]; `screen` is made of
    the two. Holds a tile of bfloat16 pre-activations. Rows of which nearly nothing can be told from bfloat16 (fewer
    than k values that are surely positive, or too many that are nearly equal) are left to `tiled_topk`.
    """
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    tile = max(MIN_ROWS, TILE_ELEMENTS // len(weight))
    for start in range(0, len(x), tile):
        rows = x[start : start + tile]
        screened, splits, columns = _candidates(rows, screen, k)
        sure = rows if len(screened) == len(rows) else rows[screened]
        exact = _exact(sure, weight, splits, columns).add_(bias[columns])
        places = topk_of_candidates(ordered_bits(exact), splits.numpy(), k)
        values[start + screened], indices[start + screened] = exact[places], columns[places]
        if len(screened) < len(rows):
            left = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, screened, False).nonzero().squeeze(1)
            values[start + left], indices[start + left] = tiled_topk(rows[left], weight, bias, k)
    if relu:
        indices.masked_fill_(values <= 0, -1)
        values.relu_()
    return values, indices


def _candidates(x: Tensor, screen: Screen, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that can be among the k largest.

    Returns the m rows for which they could be told (int64 [m]), row splits int64 [m + 1], and latents, ascending in
    each row.
    """
    n = len(x)
    rounded = x.bfloat16()
    groups = Groups(as_bits(F.linear(rounded, screen.weight, screen.bias)), k)  # [n, n_latents]
    error = torch.from_numpy(_screening_error(x, rounded, screen))

    # At most the k-th largest value, see groups.py.
    lowest = groups.kth_maximum(k).squeeze(1).clamp_min(0).view(torch.bfloat16).float()
    # Values were rounded once more when they were stored. Rounding keeps their order, also that of the cutoff.
    cutoff = (lowest - 2 * error - 2.1 * UNIT_ROUNDOFF * lowest).bfloat16()
    told = ((cutoff > 0) & lowest.isfinite()).numpy()
    least = cutoff.view(torch.int16).masked_fill(torch.from_numpy(~told), torch.iinfo(torch.int16).max)  # no number
    row, columns = groups.at_least(least[:, None])
    counts = np.bincount(row.numpy(), minlength=n)
    many = counts > MAX_CANDIDATES_PER_K * k
    if many.any():
        columns = columns[torch.from_numpy(~many)[row]]
        told, counts = told & ~many, np.where(many, 0, counts)
    rows = np.flatnonzero(told)
    splits = np.append(0, counts[rows].cumsum())
    return torch.from_numpy(rows), torch.from_numpy(splits), columns


def _screening_error(x: Tensor, rounded: Tensor, screen: Screen) -> NDArray[np.float32]:
    """Bound of how far a row's screened values are from the exact ones, [n], but for the rounding of what is stored.

    x [n, d_in] and the same in bfloat16.
    """
    norm, residual = (torch.linalg.vector_norm(rows, dim=1).numpy() for rows in (rounded.float(), x - rounded))
    error: NDArray[np.float32] = residual * screen.largest_norm + norm * screen.largest_residual
    error += UNIT_ROUNDOFF * screen.largest_bias
    error += SUM_ROUNDOFF * (x.shape[1] + 2) * (norm * screen.largest_norm + screen.largest_bias)
    return error


def _exact(x: Tensor, weight: Tensor, splits: Tensor, columns: Tensor) -> Tensor:
    """x @ weight.T at the candidates only: float32 [number of candidates]."""
    shape = (len(x), len(weight))
    wanted = torch.sparse_csr_tensor(splits, columns, x.new_zeros(len(columns)), shape, check_invariants=False)
    product: Tensor = torch.sparse.sampled_addmm(wanted, x, weight.T, beta=0.0)
    return product.values()
