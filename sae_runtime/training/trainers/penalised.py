"""What the families with a sparsity penalty share: the loop over a batch, the penalty's weight, AuxK, the layouts.

    loss = mean (x̂ - x)² / Var(initial sample) + λ · penalty per token + further errors + aux_coefficient · AuxK

λ is `sparsity_coefficient`, warmed up, or steered until L0 is k (`SparsityWeight`).

No loss opens a latent that is below its level on every token, so that dead ones are opened by hand: latent_bias rises
by a fixed number of learning rates at each step until they fire.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.initialisation import tied_directions
from sae_runtime.training.trainers.layouts import MAX_SPARSE_DENSITY, DenseLayout, Layout, SparseLayout
from sae_runtime.training.trainers.schedule import SparsityWeight
from sae_runtime.training.trainers.trainer import BatchFigures, Trainer

_PROBES = 256
_OPENING = 10
"""Learning rates that a dead latent's bias rises by at each step; Adam moves that of others by about one at most."""


@dataclass(frozen=True)
class Forward:
    """One micro-batch through a dictionary in training."""

    latents: Tensor
    """z, shaped as the layout's values."""
    reconstruction: Tensor
    """(b, d)"""
    penalty: Tensor
    """Sum of the sparsity penalty over the tokens."""
    auxiliary_reconstruction: Tensor | None = None
    """(b, d): a second reconstruction, whose error is added to the loss."""


class PenalisedTrainer(Trainer):
    """A dictionary that is sparse because active latents cost something."""

    @abstractmethod
    def initial_sparsity_weight(self) -> float:
        """Where the steered λ starts: about half of where it ends on activations of GPT-2 models."""

    def set_up_family(self) -> None:
        self._sparsity = SparsityWeight(self.config, self.initial_sparsity_weight())
        self._density = 1.0  # share of pre-activations that mattered in the last step

    def initial_weights(self, config: TrainingConfig, sample: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Tied random directions, and one level that lets k latents of a token be active.

        A run of few steps would otherwise spend them on closing half of all latents. The encoder is scaled to
        reconstruct the sample as well as one factor can.
        """
        d_in = sample.shape[1]
        directions = tied_directions(config.latents_for(d_in), d_in, generator).to(config.device)
        probes = sample[:_PROBES] - sample.mean(0)
        pre_activations = probes @ directions.T
        active = min(config.k * len(probes), pre_activations.numel() // 2)
        level = float(torch.topk(pre_activations.flatten(), active, sorted=False).values.min())
        image = self.initial_latents(pre_activations, level) @ directions
        scale = float((image * probes).sum() / image.square().sum())
        return {
            "encoder": directions * scale,
            "decoder": directions,
            **self.initial_level(torch.full((len(directions),), level * scale, device=directions.device)),
        }

    def initial_latents(self, pre_activations: Tensor, level: float) -> Tensor:
        """The family's latents of pre-activations (b, n) without biases, where all have this level."""
        return (pre_activations - level).relu()

    def initial_level(self, level: Tensor) -> dict[str, Tensor]:
        """latent_bias and the family's own parameters that give each latent its level (n,)."""
        return {"latent_bias": -level}

    @abstractmethod
    def forward(self, layout: Layout) -> Forward:
        """The family's equations."""

    def level(self) -> Tensor:
        """Pre-activations up to this (scalar or (n,), at least 0) have no effect and get no gradient."""
        return torch.zeros((), device=self.encoder.device)

    def accumulate(self, batch: Sequence[Tensor]) -> BatchFigures:
        weight = self._sparsity.at(self.step_count)
        dead, level = self.dead(), self.level()
        zero = batch[0].new_zeros(())
        nmse, loss, active, mattering = zero, zero, zero, 0
        fired = torch.zeros_like(dead)
        residuals = []
        for x in batch:
            layout = self._layout(x, level)
            forward = self.forward(layout)
            scale = 1 / (self.batch_rows * self.d_in * self.variance)
            error = (forward.reconstruction - x).square().sum() * scale
            share = error + weight * forward.penalty / self.batch_rows
            if forward.auxiliary_reconstruction is not None:
                share = share + (forward.auxiliary_reconstruction - x).square().sum() * scale
            share.backward()
            nmse, loss = nmse + error.detach(), loss + share.detach()
            latents = forward.latents.detach()
            active = active + (latents > 0).sum()
            fired |= layout.mark(latents > self.config.dead_threshold)
            mattering += int((layout.values.detach() > (layout.of_latents(level) if level.ndim else level)).sum())
            residuals.append(x - forward.reconstruction.detach())
        aux = self.auxiliary_loss().accumulate(batch, residuals, dead, self.batch_rows)
        figures = self.communicator.sum_over_data(torch.stack([active.double(), active.new_tensor(mattering).double()]))
        self._sparsity.observe(float(figures[0]) / self.batch_rows)
        self._density = float(figures[1]) / (self.batch_rows * self.n_latents)
        return BatchFigures(loss + self.config.aux_coefficient * aux, nmse, aux, active, fired, weight)

    @torch.no_grad()
    def _update(self, gradient_norm: float) -> float:
        learning_rate = super()._update(gradient_norm)
        self.latent_bias[self.dead()] += _OPENING * learning_rate
        return learning_rate

    def _layout(self, x: Tensor, level: Tensor) -> Layout:
        weights = self.encoder, self.latent_bias, self.pre_bias, self.compute_dtype
        if self._density > MAX_SPARSE_DENSITY:
            return DenseLayout.encode(x, *weights)
        return SparseLayout.encode(x, *weights, level)

    def export(self) -> dict[str, Any]:
        weights = self.weights()
        return {
            "encoder": weights["encoder"],
            "decoder": weights["decoder"],
            "pre_bias": weights["pre_bias"] * self.input_scale,
            "latent_bias": weights["latent_bias"] * self.input_scale,
            "activation": "relu",
        }

    def family_state(self) -> dict[str, Any]:
        return {"sparsity": self._sparsity.state_dict(), "density": self._density}

    def load_family_state(self, state: dict[str, Any]) -> None:
        self._sparsity.load_state_dict(state["sparsity"])
        self._density = state["density"]
