"""Sparse autoencoding with gradients that touch only the selected latents, and the dense reference beside it.

A dictionary uses few of its n latents on a token, so of the five matrix products of a dense training step only one is
needed: the pre-activations among which the latents are chosen. Everything else is a sum over the chosen rows, which
`embedding_bag` computes for the reconstruction as well as, with rows and columns exchanged, for both weight gradients.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SelectedLatents:
    """A sparse (rows, n_latents) pattern, readable by row and by latent: row r has indices[offsets[r] : offsets[r+1]].

    A row is a token, or after `split` a consecutive slice of the latents of a token.
    """

    def __init__(self, indices: Tensor, offsets: Tensor, n_latents: int) -> None:
        self.indices = indices  # int64 (entries,)
        self.offsets = offsets  # int64 (rows + 1,)
        self.n_latents = n_latents

    @classmethod
    def equal_rows(cls, indices: Tensor, n_latents: int) -> SelectedLatents:
        """Rows of equally many latents, from indices (rows, k)."""
        n_rows, k = indices.shape
        offsets = torch.arange(0, (n_rows + 1) * k, k, device=indices.device) if k else indices.new_zeros(n_rows + 1)
        return cls(indices.reshape(-1), offsets, n_latents)

    def split(self, offsets: Tensor) -> SelectedLatents:
        """The same entries in the same order with finer rows."""
        finer = SelectedLatents(self.indices, offsets, self.n_latents)
        finer.__dict__["_order"] = self._order  # sorted once for both
        return finer

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry, int64 (entries,)."""
        n_rows = len(self.offsets) - 1
        return torch.repeat_interleave(
            torch.arange(n_rows, device=self.indices.device), self.offsets.diff(), output_size=len(self.indices)
        )

    def sum_by_row(self, weight: Tensor, values: Tensor) -> Tensor:
        """Sum over each row's entries of value × latent's row of `weight` (n, d): values (entries,) -> (rows, d)."""
        return F.embedding_bag(
            self.indices, weight, self.offsets, per_sample_weights=values, mode="sum", include_last_offset=True
        )

    def sum_by_latent(self, rows: Tensor, values: Tensor) -> Tensor:
        """Sum over each latent's entries of value × the entry's row: rows (rows, d), values (entries,) -> (n, d).

        This is valuesᵀ @ rows with `values` read as a sparse (rows, n) matrix.
        """
        order, starts = self._order
        return F.embedding_bag(
            self._rows_by_latent, rows, starts, per_sample_weights=values[order], mode="sum", include_last_offset=True
        )

    def sum_values(self, values: Tensor) -> Tensor:
        """Sum of the values (entries,) of each latent -> (n,)."""
        return values.new_zeros(self.n_latents).index_add_(0, self.indices, values)

    @cached_property
    def _rows_by_latent(self) -> Tensor:
        return self.rows[self._order[0]]

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """Order of the entries by latent (stable), and where each latent starts in it (n + 1)."""
        indices = self.indices
        if indices.device.type == "cpu" and self.n_latents <= 2**16:
            # NumPy sorts 16-bit integers by radix: some 50 times faster than torch.sort here.
            order = torch.from_numpy(np.argsort(indices.numpy().astype(np.uint16), kind="stable"))
        elif indices.device.type == "cpu":
            entries = indices.numpy() * max(indices.numel(), 1) + np.arange(indices.numel())  # distinct, so stable
            entries.sort()
            order = torch.from_numpy(entries % max(indices.numel(), 1))
        else:
            order = torch.argsort(indices, stable=True)
        starts = indices.new_zeros(self.n_latents + 1)
        torch.cumsum(torch.bincount(indices, minlength=self.n_latents), 0, out=starts[1:])
        return order, starts


class _EncoderGradient(torch.autograd.Function):
    """Identity on the selected pre-activations; sends their gradient to encoder weight, latent_bias and pre_bias."""

    @staticmethod
    def forward(
        ctx: Any,
        selected_values: Tensor,  # (entries,), equal to ((x - pre_bias) @ weight.T + latent_bias) at the selection
        selection: SelectedLatents,
        centred: Tensor,  # (B, d) = x - pre_bias
        weight: Tensor,  # (n, d)
        latent_bias: Tensor,  # (n,)
        pre_bias: Tensor,  # (d,)
    ) -> Tensor:
        ctx.selection = selection
        ctx.save_for_backward(centred, weight)
        return selected_values.view_as(selected_values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        centred, weight = ctx.saved_tensors
        by_latent = ctx.selection.sum_values(gradient)  # (n,)
        # Σ_tokens Σ_latents g·w summed by latent first: one matrix-vector product instead of a row for each entry.
        return None, None, None, ctx.selection.sum_by_latent(centred, gradient), by_latent, -(by_latent @ weight)


class _DecoderGradient(torch.autograd.Function):
    """Identity on the reconstruction; sends its gradient to the decoder weight."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, selection: SelectedLatents, values: Tensor, weight: Tensor) -> Tensor:
        ctx.selection = selection
        ctx.save_for_backward(values)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        return gradient, None, None, ctx.selection.sum_by_latent(gradient.contiguous(), values)


def selected_pre_activations(
    values: Tensor,
    selection: SelectedLatents,
    centred: Tensor,
    weight: Tensor,
    latent_bias: Tensor,
    pre_bias: Tensor,
) -> Tensor:
    """The chosen pre-activations (entries,) with gradients to the encoder weight, latent_bias and pre_bias.

    `values` are the selected pre-activations; `centred` (B, d) is x - pre_bias, detached; rows of `selection` are
    tokens.
    """
    selected: Tensor = _EncoderGradient.apply(  # type: ignore[no-untyped-call]
        values, selection, centred, weight, latent_bias, pre_bias
    )
    return selected


def sparse_decode(values: Tensor, selection: SelectedLatents, weight: Tensor) -> Tensor:
    """Σ of values · weight[indices] over each row's entries, (rows, d), without a bias; weight (n, d)."""
    output = selection.sum_by_row(weight.detach(), values)
    decoded: Tensor = _DecoderGradient.apply(output, selection, values.detach(), weight)  # type: ignore[no-untyped-call]
    return decoded


def reference_autoencode(
    x: Tensor, encoder: Tensor, latent_bias: Tensor, decoder: Tensor, pre_bias: Tensor, chosen: Tensor
) -> Tensor:
    """What the fast path computes, written with dense matrices: Σ of the chosen latents' rows, without pre_bias.

    `chosen` bool (B, n).
    """
    pre_activations = (x - pre_bias) @ encoder.T + latent_bias  # (B, n)
    return (pre_activations.relu() * chosen) @ decoder
