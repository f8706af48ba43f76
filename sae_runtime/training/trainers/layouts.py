"""Two ways to hold the pre-activations of a batch: all of them, or only those that can matter for the result.

A family's equations act on each latent of each token alone, so they are written once on "values" of any shape; a layout
computes the values from the weights, broadcasts what belongs to latents to them, and decodes. Both give the same
gradients. The dense layout takes five matrix products and a (B, n) matrix and is right while much is active, as early
in training; the sparse one takes one product, in tiles, and sums over entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.training.sparse_gradients import SelectedLatents, selected_pre_activations, sparse_decode
from sae_runtime.training.trainers.batch_selection import entries_above

MAX_SPARSE_DENSITY = 1 / 50
"""Share of entries that matter up to which the sparse layout is used; about where it stops being faster on a CPU."""


class Layout(Protocol):
    """Pre-activations of one micro-batch with gradients to encoder, latent_bias and pre_bias."""

    values: Tensor
    """Pre-activations W_enc (x - pre_bias) + latent_bias: (B, n), or (entries,)."""

    def of_latents(self, parameter: Tensor) -> Tensor:
        """What belongs to the latents (n,), for each value."""
        ...

    def decode(self, latents: Tensor, decoder: Tensor) -> Tensor:
        """(B, d): latents (shaped as `values`) times the decoder's rows (n, d)."""
        ...

    def mark(self, active: Tensor) -> Tensor:
        """bool (n,): latents for which `active` (bool, shaped as `values`) is true anywhere."""
        ...


@dataclass
class DenseLayout:
    """All pre-activations. Products run in `compute_dtype`, their gradients too; weights stay float32."""

    values: Tensor
    compute_dtype: torch.dtype

    @classmethod
    def encode(
        cls, x: Tensor, encoder: Tensor, latent_bias: Tensor, pre_bias: Tensor, compute_dtype: torch.dtype
    ) -> DenseLayout:
        with _products_in(compute_dtype, x):
            return cls(F.linear(x - pre_bias, encoder, latent_bias).float(), compute_dtype)

    def of_latents(self, parameter: Tensor) -> Tensor:
        return parameter

    def decode(self, latents: Tensor, decoder: Tensor) -> Tensor:
        with _products_in(self.compute_dtype, latents):
            return (latents @ decoder).float()

    def mark(self, active: Tensor) -> Tensor:
        return active.any(0)


@dataclass
class SparseLayout:
    """The pre-activations above a level; what lies below must neither add to the result nor get a gradient."""

    values: Tensor
    selection: SelectedLatents

    @classmethod
    def encode(
        cls,
        x: Tensor,
        encoder: Tensor,
        latent_bias: Tensor,
        pre_bias: Tensor,
        compute_dtype: torch.dtype,
        level: Tensor,
    ) -> SparseLayout:
        """`level` float32, scalar or (n,), not below 0."""
        centred = x - pre_bias.detach()
        entries = entries_above(
            centred.to(compute_dtype), encoder.detach().to(compute_dtype), latent_bias.detach().to(compute_dtype), level
        )
        selection = entries.by_row(len(x), len(encoder))
        values = selected_pre_activations(entries.values, selection, centred, encoder, latent_bias, pre_bias)
        return cls(values, selection)

    def of_latents(self, parameter: Tensor) -> Tensor:
        return parameter.index_select(0, self.selection.indices)

    def decode(self, latents: Tensor, decoder: Tensor) -> Tensor:
        return sparse_decode(latents, self.selection, decoder)

    def mark(self, active: Tensor) -> Tensor:
        marked = torch.zeros(self.selection.n_latents, dtype=torch.bool, device=active.device)
        marked[self.selection.indices[active]] = True
        return marked


def _products_in(dtype: torch.dtype, like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, dtype=dtype, enabled=dtype != torch.float32)
