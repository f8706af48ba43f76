"""Gated dictionaries (Rajamanoharan et al. 2024a, arXiv 2404.16014): which latents are active is learnt apart from
how strongly, so that the L1 penalty does not shrink them.

    p = W_enc (x - pre_bias),   gate π = p + latent_bias,   magnitude μ = exp(r_mag) · p + b_mag
    z = H(π) · ReLU(μ),   x̂ = W_dec z + pre_bias,   ‖W_dec,i‖ = 1
    penalty = Σ_i ReLU(π_i) / √d_in
    further error: mean (W_dec* ReLU(π) + pre_bias* - x)² / Var(initial sample), with * held fixed

Nothing else teaches the gate, as H has no gradient: the further error makes the gate's ReLU reconstruct as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_runtime.training.trainers.layouts import Layout
from sae_runtime.training.trainers.penalised import Forward, PenalisedTrainer


class GatedTrainer(PenalisedTrainer):
    def initial_sparsity_weight(self) -> float:
        return 0.4

    def initial_latents(self, pre_activations: Tensor, level: float) -> Tensor:
        return pre_activations * (pre_activations > level)

    def initial_level(self, level: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(level)
        return {"latent_bias": -level, "log_magnitude_scale": zeros, "magnitude_bias": zeros}

    def forward(self, layout: Layout) -> Forward:
        parameters = self.parameters()
        gate = layout.values
        scale = layout.of_latents(parameters["log_magnitude_scale"].exp())
        product = gate - layout.of_latents(self.latent_bias)
        magnitude = scale * product + layout.of_latents(parameters["magnitude_bias"])
        latents = (gate > 0) * magnitude.relu()
        opened = gate.relu()
        return Forward(
            latents,
            layout.decode(latents, self.decoder) + self.pre_bias,
            opened.sum() / self.d_in**0.5,
            layout.decode(opened, self.decoder.detach()) + self.pre_bias.detach(),
        )

    def export(self) -> dict[str, Any]:
        weights = self.weights()
        return {
            **super().export(),
            "activation": "gated",
            "magnitude_scale": weights["log_magnitude_scale"].exp(),
            "magnitude_bias": weights["magnitude_bias"] * self.input_scale,
        }
