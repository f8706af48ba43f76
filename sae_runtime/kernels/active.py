"""Activations that look at each latent alone (ReLU, JumpReLU, gated), and their sparse result.

The dense result is never held but for a tile of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.kernels.groups import Groups, as_bits
from sae_runtime.kernels.topk import MIN_TILE_ROWS, TILE_ELEMENTS, TILE_LATENTS


@dataclass(frozen=True, eq=False)
class LatentActivation:
    """The value of m latents from the product p = x @ weight.T of their own encoder rows.

    ReLU      relu(p + bias)
    JumpReLU  relu(p + bias) where p + bias > threshold, else 0; a negative threshold acts as 0
    gated     relu(magnitude_scale * p + magnitude_bias) where p + bias > 0, else 0

    JumpReLU: Rajamanoharan et al. 2024, arXiv 2407.14435; gated: the same authors, arXiv 2404.16014, with
    magnitude_scale = exp(r_mag). All tensors are [m], of one dtype; the gated ones come together and without threshold.
    """

    bias: Tensor
    threshold: Tensor | None = None
    magnitude_scale: Tensor | None = None
    magnitude_bias: Tensor | None = None

    def __getitem__(self, latents: slice | Tensor) -> LatentActivation:
        """The activation of some of the latents."""
        parts = (self.bias, self.threshold, self.magnitude_scale, self.magnitude_bias)
        return LatentActivation(*(None if part is None else part[latents] for part in parts))  # type: ignore[arg-type]

    def before_relu(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """What the last ReLU reads: [n, m] for x [n, d_in] and weight [m, d_in]; positive exactly at active latents."""
        if self.magnitude_scale is None:
            pre = torch.addmm(self.bias, x, weight.T, out=out)
            return pre if self.threshold is None else pre.masked_fill_(pre <= self.threshold, 0)
        assert self.magnitude_bias is not None
        product = torch.mm(x, weight.T, out=out)
        closed = product <= -self.bias
        return torch.addcmul(self.magnitude_bias, product, self.magnitude_scale, out=product).masked_fill_(closed, 0)


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
        active: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, n_latents, tile_latents):
            stop = min(n_latents, start + tile_latents)
            pre = tile[: m * (stop - start)].view(m, stop - start)
            activation[start:stop].before_relu(x_rows, weight[start:stop], out=pre)
            bits = as_bits(pre)
            rows, latents = Groups(bits).at_least(bits.new_ones(()))  # positive entries
            active.append((rows, latents + start, pre[rows, latents]))
        rows, latents, found = (torch.cat(one) for one in zip(*active, strict=True))
        parts.append(_pad(rows, latents, found, m))
    longest = max((values.shape[1] for values, _ in parts), default=0)
    values = x.new_zeros(n, longest)
    indices = torch.full((n, longest), -1, dtype=torch.int64, device=x.device)
    row = 0
    for part_values, part_indices in parts:
        m, k = part_values.shape
        values[row : row + m, :k], indices[row : row + m, :k] = part_values, part_indices
        row += m
    return values, indices


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
