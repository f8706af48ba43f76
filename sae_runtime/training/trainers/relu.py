"""ReLU dictionaries with an L1 penalty, √d_in being the norm of an input, so that λ means the same at every width.

Classic (Bricken et al. 2023; Cunningham et al. 2023):

    z = ReLU(W_enc (x - pre_bias) + latent_bias),   x̂ = W_dec z + pre_bias,   ‖W_dec,i‖ = 1
    penalty = Σ_i z_i / √d_in

Decoder rows stay on the unit sphere, or else the penalty could be cheated by small latents and long rows.

Scaled by decoder norms (Anthropic, Circuits Updates, April 2024): the same with W_dec free and

    penalty = Σ_i z_i ‖W_dec,i‖ / √d_in

The product z_i ‖W_dec,i‖ is what a latent contributes, so decoder norms can be free. They are divided out when the
dictionary is published: encoder row and bias times the norm, decoder row of norm 1. Their encoder does not subtract
pre_bias; with a free latent_bias that is the same set of functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.initialisation import unit_rows
from sae_runtime.training.trainers.layouts import Layout
from sae_runtime.training.trainers.penalised import Forward, PenalisedTrainer


class ReluTrainer(PenalisedTrainer):
    def initial_sparsity_weight(self) -> float:
        return 0.2

    def forward(self, layout: Layout) -> Forward:
        latents = layout.values.relu()
        reconstruction = layout.decode(latents, self.decoder) + self.pre_bias
        return Forward(latents, reconstruction, latents.sum() / self.d_in**0.5)


class ReluDecoderNormTrainer(PenalisedTrainer):
    unit_decoder = False

    def initial_sparsity_weight(self) -> float:
        return 0.2

    def initial_weights(self, config: TrainingConfig, sample: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The encoder's scale is shared equally with the decoder: W_enc = W_dec, as in the original."""
        weights = super().initial_weights(config, sample, generator)
        norms = torch.linalg.vector_norm(weights["encoder"], dim=1).sqrt()
        return {
            "encoder": weights["encoder"] / norms[:, None],
            "latent_bias": weights["latent_bias"] / norms,
            "decoder": weights["decoder"] * norms[:, None],
        }

    def forward(self, layout: Layout) -> Forward:
        latents = layout.values.relu()
        norms = layout.of_latents(torch.linalg.vector_norm(self.decoder, dim=1))
        reconstruction = layout.decode(latents, self.decoder) + self.pre_bias
        return Forward(latents, reconstruction, (latents * norms).sum() / self.d_in**0.5)

    def export(self) -> dict[str, Any]:
        fields = super().export()
        norms = torch.linalg.vector_norm(fields["decoder"], dim=1)
        return {
            **fields,
            "encoder": fields["encoder"] * norms[:, None],
            "latent_bias": fields["latent_bias"] * norms,
            "decoder": unit_rows(fields["decoder"]),
        }
