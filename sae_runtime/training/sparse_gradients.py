"""TopK autoencoding with gradients that touch only the selected latents, and the dense reference beside it.

A TopK dictionary uses k of n latents on a token, so of the five matrix products of a dense training step only one is
needed: the pre-activations among which the k are chosen. Everything else is a sum over k rows, which `embedding_bag`
computes for the reconstruction as well as, with rows and columns exchanged, for both weight gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SelectedLatents:
    """Which k latents each of B tokens uses, readable both by token and by latent."""

    def __init__(self, indices: Tensor, n_latents: int) -> None:
        self.indices = indices  # int64 (B, k)
        self.n_latents = n_latents
        self._by_latent: tuple[Tensor, Tensor, Tensor] | None = None

    def sum_by_latent(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sum over all uses of each latent of weight × the using token's row: weights (B, k), rows (B, d) -> (n, d).

        This is weightsᵀ @ rows with `weights` read as a sparse (B, n) matrix.
        """
        order, tokens, starts = self._transposed()
        return F.embedding_bag(tokens, rows, starts, per_sample_weights=weights.reshape(-1)[order], mode="sum")

    def sum_weights(self, weights: Tensor) -> Tensor:
        """Sum of the weights (B, k) by latent -> (n,)."""
        return weights.new_zeros(self.n_latents).index_add_(0, self.indices.reshape(-1), weights.reshape(-1))

    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order of the (token, latent) pairs by latent, their tokens in that order, and each latent's start in it."""
        if self._by_latent is None:
            flat, k = self.indices.reshape(-1), self.indices.shape[1]
            if flat.device.type == "cpu" and self.n_latents <= 2**16:
                # NumPy sorts 16-bit integers by radix: some 50 times faster than torch.sort here.
                order = torch.from_numpy(np.argsort(flat.numpy().astype(np.uint16), kind="stable"))
            elif flat.device.type == "cpu":
                pairs = flat.numpy() * flat.numel() + np.arange(flat.numel())  # distinct, so any sort is stable
                pairs.sort()
                order = torch.from_numpy(pairs % flat.numel())
            else:
                order = torch.argsort(flat, stable=True)
            uses = torch.bincount(flat, minlength=self.n_latents)
            self._by_latent = order, order // k, uses.cumsum(0) - uses
        return self._by_latent


class _EncoderGradient(torch.autograd.Function):
    """Identity on the selected pre-activations; sends their gradient to encoder weight, latent_bias and pre_bias."""

    @staticmethod
    def forward(
        ctx: Any,
        selected_values: Tensor,  # (B, k), equal to ((x - pre_bias) @ weight.T + latent_bias) at the selection
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
        by_latent = ctx.selection.sum_weights(gradient)  # (n,)
        # Σ_tokens Σ_k g·w summed by latent first: one matrix-vector product instead of B·k rows.
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
    """The chosen pre-activations (B, k) with gradients to the encoder weight, latent_bias and pre_bias.

    `values` are what `choose_latents.choose_latents` found; `centred` (B, d) is x - pre_bias, detached.
    """
    selected: Tensor = _EncoderGradient.apply(  # type: ignore[no-untyped-call]
        values, selection, centred, weight, latent_bias, pre_bias
    )
    return selected


def sparse_decode(values: Tensor, selection: SelectedLatents, weight: Tensor) -> Tensor:
    """Σ_j values[b, j] · weight[indices[b, j]], (B, d), without a bias; weight (n, d) has one row per latent."""
    output = F.embedding_bag(selection.indices, weight.detach(), per_sample_weights=values, mode="sum")
    decoded: Tensor = _DecoderGradient.apply(output, selection, values.detach(), weight)  # type: ignore[no-untyped-call]
    return decoded


def reference_autoencode(
    x: Tensor, encoder: Tensor, latent_bias: Tensor, decoder: Tensor, pre_bias: Tensor, indices: Tensor
) -> Tensor:
    """What the fast path computes, written with dense matrices: Σ of the chosen latents' rows, without pre_bias."""
    pre_activations = (x - pre_bias) @ encoder.T + latent_bias  # (B, n)
    gate = torch.zeros_like(pre_activations).scatter_(1, indices, 1.0)
    return (pre_activations.relu() * gate) @ decoder
