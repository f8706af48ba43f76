"""Which k latents each token uses: the one dense product of a training step, and the selection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_runtime.kernels.groups import Groups, as_bits
from sae_runtime.kernels.topk import topk_of_rows

TILE_ELEMENTS = 1 << 24
"""Pre-activations that exist at once."""


def pre_activation_tiles(
    centred: Tensor, weight: Tensor, latent_bias: Tensor, *, tile_elements: int = TILE_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """(first token, pre-activations (tile, n)) of centred (B, d) @ weight.T + latent_bias, some tokens at a time.

    The tensor given out is overwritten by the next one.
    """
    tile = max(1, tile_elements // len(weight))
    # One memory for all tiles: fresh pages cost a quarter of the product's time.
    memory = torch.empty(min(tile, len(centred)), len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, len(centred), tile):
        rows = centred[start : start + tile]
        yield start, torch.addmm(latent_bias, rows, weight.T, out=memory[: len(rows)])


@torch.no_grad()
def choose_latents(
    centred: Tensor, weight: Tensor, latent_bias: Tensor, k: int, *, tile_elements: int = TILE_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Values float32 and indices int64, both (B, k), of each token's k largest pre-activations, in no set order.

    centred (B, d), weight (n, d), latent_bias (n,) share a dtype, in which the pre-activations are computed. Tokens are
    taken in tiles, so that at most `tile_elements` pre-activations exist at once. Among negative pre-activations, which
    ReLU sets to zero anyway, the choice is arbitrary.
    """
    values = torch.empty(len(centred), k, device=centred.device)
    indices = torch.empty(len(centred), k, dtype=torch.int64, device=centred.device)
    for start, tile in pre_activation_tiles(centred, weight, latent_bias, tile_elements=tile_elements):
        rows = slice(start, start + len(tile))
        indices[rows] = top_indices(tile, k)
        values[rows] = tile.gather(1, indices[rows]).float()
    return values, indices


def top_indices(pre_activations: Tensor, k: int) -> Tensor:
    """Indices int64 (B, k) of the k largest of each row of (B, n); on the CPU of equal values the first ones."""
    if pre_activations.device.type != "cpu":
        return torch.topk(pre_activations, k, dim=1, sorted=False).indices
    return topk_of_rows(pre_activations, k)[1]


def indices_above(pre_activations: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns (int64, row by row) of the values of (B, n) that exceed `level`, scalar or (n,), at least 0.

    `level` float32 is compared as such, not rounded to a half-precision type of the values.
    """
    dtype = pre_activations.dtype
    below = level.to(dtype)  # the largest value of the dtype that is not above the level
    below = torch.where(below.float() > level, below.nextafter(torch.zeros_like(below)), below)
    # What is at least the next larger value exceeds the level.
    return Groups(as_bits(pre_activations)).at_least(as_bits(below) + 1)
