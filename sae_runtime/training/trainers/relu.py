"""ReLU dictionaries with an L1 penalty (Bricken et al. 2023; Cunningham et al. 2023).

    z = ReLU(W_enc (x - pre_bias) + latent_bias),   x̂ = W_dec z + pre_bias,   ‖W_dec,i‖ = 1
    penalty = Σ_i z_i / √d_in

Decoder rows stay on the unit sphere, or else the penalty could be cheated by small latents and long rows. √d_in is the
norm of an input, so that λ means the same at every width.
"""

from __future__ import annotations

from sae_runtime.training.trainers.layouts import Layout
from sae_runtime.training.trainers.penalised import Forward, PenalisedTrainer


class ReluTrainer(PenalisedTrainer):
    def initial_sparsity_weight(self) -> float:
        return 0.2

    def forward(self, layout: Layout) -> Forward:
        latents = layout.values.relu()
        reconstruction = layout.decode(latents, self.decoder) + self.pre_bias
        return Forward(latents, reconstruction, latents.sum() / self.d_in**0.5)
