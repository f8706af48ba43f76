"""TopK dictionaries (Gao et al. 2024): exactly k latents for each token.

    z = ReLU(TopK_k(W_enc (x - pre_bias) + latent_bias)),   x̂ = W_dec z + pre_bias,   ‖W_dec,i‖ = 1
    loss = L(k) [+ c · L(4k)] + aux_coefficient · AuxK,   L(k) = mean (x̂_k - x)² / Var(initial sample)

Multi-TopK (their appendix A.4, c = 1/8) also reconstructs with the 4k best latents, so that the dictionary can be used
with more latents than it was trained with; AuxK and all figures belong to the k best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_runtime.training.choose_latents import choose_latents
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.initialisation import encoder_scale, tied_directions
from sae_runtime.training.sparse_gradients import SelectedLatents, selected_pre_activations, sparse_decode
from sae_runtime.training.trainers.trainer import BatchFigures, Trainer

MULTI_TOPK_FACTOR = 4


@dataclass(frozen=True)
class Selection:
    """The latents that a micro-batch of b tokens uses, and the nested reconstructions that they are summed to."""

    centred: Tensor
    """float32 (b, d): x - pre_bias, detached."""
    latents: SelectedLatents
    """By token: b rows, the latents of a token in order of the prefixes."""
    values: Tensor
    """float32 (entries,): pre-activations, detached."""
    by_prefix: SelectedLatents
    """The same entries in b · n_prefixes rows: the latents that each prefix adds to the one before it."""
    prefix_of_entry: Tensor | None
    """int64 (entries,): the first prefix that has the entry; None if there is only one prefix."""


class TopKTrainer(Trainer):
    """A step is four methods: `select`, `reconstruct`, `accumulate` (the losses), and the update of the base class.

    None of them holds pre-activations of more than a tile of tokens, or any dense (b, n) matrix of latents.
    """

    def set_up_family(self) -> None:
        multi = self.config.multi_topk_coefficient
        self.prefix_weights: tuple[float, ...] = (1.0, multi) if multi else (1.0,)
        """Weight of the loss of each nested reconstruction."""
        self.main_prefix = 0
        """The reconstruction that the dictionary is for: its figures are reported and AuxK models what it misses."""

    def initial_weights(self, config: TrainingConfig, sample: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        d_in = sample.shape[1]
        directions = tied_directions(config.latents_for(d_in), d_in, generator).to(config.device)
        return {
            "encoder": directions * encoder_scale(directions, config.k, generator),
            "decoder": directions,
            "latent_bias": directions.new_zeros(len(directions)),
        }

    def select(self, batch: Sequence[Tensor]) -> Iterable[Selection]:
        """Chooses the latents of each micro-batch [b, d]; the only product with the whole encoder of a step."""
        k, n = self.config.k, self.n_latents
        wide = min(MULTI_TOPK_FACTOR * k, n) if len(self.prefix_weights) > 1 else k
        weight, bias = self.encoder.detach().to(self.compute_dtype), self.latent_bias.detach().to(self.compute_dtype)
        for x in batch:
            centred = x - self.pre_bias.detach()
            values, indices = choose_latents(centred.to(self.compute_dtype), weight, bias, wide)
            if wide > k:  # the k best first
                values, order = values.sort(dim=1, descending=True)
                indices = indices.gather(1, order)
            latents = SelectedLatents.equal_rows(indices, n)
            if len(self.prefix_weights) == 1:
                yield Selection(centred, latents, values.reshape(-1), latents, None)
                continue
            offsets = torch.stack([latents.offsets[:-1], latents.offsets[:-1] + k], dim=1).reshape(-1)
            by_prefix = latents.split(torch.cat([offsets, latents.offsets[-1:]]))
            yield Selection(centred, latents, values.reshape(-1), by_prefix, by_prefix.rows % 2)

    def reconstruct(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Nested reconstructions (b, n_prefixes, d) and latents (entries,), with gradients to every parameter."""
        values = selected_pre_activations(
            selection.values, selection.latents, selection.centred, self.encoder, self.latent_bias, self.pre_bias
        ).relu()
        added = sparse_decode(values, selection.by_prefix, self.decoder).view(-1, len(self.prefix_weights), self.d_in)
        return (added.cumsum(1) if len(self.prefix_weights) > 1 else added) + self.pre_bias, values

    def accumulate(self, batch: Sequence[Tensor]) -> BatchFigures:
        weights = torch.tensor(self.prefix_weights, device=batch[0].device)
        nmse = weights.new_zeros(len(weights))
        active, fired = weights.new_zeros(()), torch.zeros_like(self.tokens_since_fired, dtype=torch.bool)
        dead = self.dead()
        residuals = []
        for x, selection in zip(batch, self.select(batch), strict=True):
            reconstructions, values = self.reconstruct(selection)
            errors = (reconstructions - x[:, None]).square().sum((0, 2))
            share = errors / (self.batch_rows * self.d_in * self.variance)  # (n_prefixes,)
            (share @ weights).backward()
            nmse += share.detach()
            residuals.append(x - reconstructions[:, self.main_prefix].detach())
            values = values.detach()
            if selection.prefix_of_entry is not None:
                values = values * (selection.prefix_of_entry <= self.main_prefix)
            active += (values > 0).sum()
            fired[selection.latents.indices[values > self.config.dead_threshold]] = True
        aux = self.auxiliary_loss().accumulate(batch, residuals, dead, self.batch_rows)
        loss = nmse @ weights + self.config.aux_coefficient * aux
        return BatchFigures(loss, nmse[self.main_prefix], aux, active, fired)

    def export(self) -> dict[str, Any]:
        weights = self.weights()
        return {
            "encoder": weights["encoder"],
            "decoder": weights["decoder"],
            "pre_bias": weights["pre_bias"] * self.input_scale,
            "latent_bias": weights["latent_bias"] * self.input_scale,
            "activation": "topk",
            "k": self.config.k,
        }
