"""AuxK (Gao et al. 2024, section 2.4): dead latents model what the reconstruction misses, and so come back to life.

    e = x - x̂ (detached),   ê = W_dec · TopK_aux(ReLU(W_enc (x - pre_bias) + latent_bias) over dead latents)
    loss = mean (ê - e)² / Var(e),   0 where that is not a number

The target already excludes pre_bias (it is x minus a reconstruction that includes it), so ê has none either.

For the families with a penalty the equations have one more twist: their dead latents have negative pre-activations, or
ones below a threshold, everywhere, and ReLU would send them no gradient at all. There latent_bias counts as 0 and gets
no gradient from this loss (`without_bias`): directions learn what is missed, and `PenalisedTrainer` opens the level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_runtime.training.choose_latents import choose_latents
from sae_runtime.training.communicator import Communicator
from sae_runtime.training.sparse_gradients import SelectedLatents, selected_pre_activations, sparse_decode

DENSE_AUX_RATIO = 16
"""Up to this many dead latents per selected one, dense products over them cost less than sparse sums."""


class AuxiliaryLoss:
    """The auxiliary loss of one batch; gradients are added to the four parameters given."""

    def __init__(
        self,
        encoder: nn.Parameter,
        decoder: nn.Parameter,
        latent_bias: nn.Parameter,
        pre_bias: nn.Parameter,
        *,
        aux_k: int,
        without_bias: bool,
        coefficient: float,
        compute_dtype: torch.dtype,
        communicator: Communicator,
    ) -> None:
        self._full = (encoder, decoder, latent_bias)
        self._pre_bias = pre_bias
        self._aux_k = aux_k
        self._without_bias = without_bias
        self._coefficient = coefficient
        self._compute_dtype = compute_dtype
        self._communicator = communicator

    def accumulate(self, batch: Sequence[Tensor], residuals: Sequence[Tensor], dead: Tensor, batch_rows: int) -> Tensor:
        """Adds coefficient × the loss's gradient; gives this worker's share of the loss (not times the coefficient).

        batch, residuals: micro-batches [b, d] of inputs and of what their reconstruction misses (detached); dead: bool
        [n]; batch_rows: rows of all replicas.
        """
        dead_latents = torch.nonzero(dead).flatten()
        k = min(self._aux_k, self._count(dead_latents))
        zero = batch[0].new_zeros(())
        if k == 0 or self._coefficient == 0:
            return zero
        variance = self._variance(residuals, batch_rows)
        if not float(variance) > 0:
            return zero
        # Separate leaves, so that all micro-batches add to one small gradient.
        encoder, decoder, latent_bias = (p.detach().index_select(0, dead_latents) for p in self._full)
        if self._without_bias:
            latent_bias.zero_()
        for leaf in (encoder, decoder) if self._without_bias else (encoder, decoder, latent_bias):
            leaf.requires_grad_()
        total = zero
        for x, residual in zip(batch, residuals, strict=True):
            modelled = self._model(x, encoder, decoder, latent_bias, k)
            loss = F.mse_loss(modelled, residual, reduction="sum") / (batch_rows * x.shape[1] * variance)
            loss = torch.nan_to_num(loss, 0.0, 0.0, 0.0)
            (self._coefficient * loss).backward()
            total = total + loss.detach()
        for p, leaf in zip(self._full, (encoder, decoder, latent_bias), strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if leaf.grad is not None:
                p.grad.index_add_(0, dead_latents, leaf.grad)
        return total

    def _count(self, dead: Tensor) -> int:
        """Number of dead latents to choose from; `dead` are those of this worker."""
        return len(dead)

    def _variance(self, residuals: Sequence[Tensor], batch_rows: int) -> Tensor:
        """Mean square of the residuals around their mean, over the whole batch."""
        mean = self._communicator.sum_over_data(torch.stack([r.sum(0) for r in residuals]).sum(0)) / batch_rows
        squares = torch.stack([(r - mean).square().sum() for r in residuals]).sum()
        return self._communicator.sum_over_data(squares) / (batch_rows * len(mean))

    def _model(self, x: Tensor, encoder: Tensor, decoder: Tensor, latent_bias: Tensor, k: int) -> Tensor:
        """What the k best of the dead latents make of x, (b, d)."""
        if len(encoder) <= DENSE_AUX_RATIO * k:
            latents = F.linear(x - self._pre_bias, encoder, latent_bias).relu()  # (b, n_dead)
            if k < len(encoder):
                values, indices = torch.topk(latents, k, dim=1, sorted=False)
                latents = torch.zeros_like(latents).scatter(1, indices, values)
            return latents @ decoder
        centred = x - self._pre_bias.detach()
        compute = self._compute_dtype
        chosen, indices = choose_latents(
            centred.to(compute), encoder.detach().to(compute), latent_bias.detach().to(compute), k
        )
        selection = SelectedLatents.equal_rows(indices, len(encoder))
        values = selected_pre_activations(
            chosen.reshape(-1), selection, centred, encoder, latent_bias, self._pre_bias
        ).relu()
        return sparse_decode(values, selection, decoder)
