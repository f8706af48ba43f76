"""JumpReLU dictionaries (Rajamanoharan et al. 2024b, arXiv 2407.14435), trained with straight-through estimators.

    π = W_enc (x - pre_bias) + latent_bias,   z_i = π_i · H(π_i - θ_i),   x̂ = W_dec z + pre_bias,   ‖W_dec,i‖ = 1
    penalty = Σ_i H(π_i - θ_i)                     jumprelu_penalty: l0
            = Σ_i tanh(c · z_i ‖W_dec,i‖)          jumprelu_penalty: tanh (Anthropic, Circuits Updates, January 2025)

θ = exp(log θ) is learnt through pseudo-derivatives with the rectangle kernel K(u) = 1 for |u| < 1/2 and bandwidth ε:

    ∂z/∂θ = -(θ/ε) K((π - θ)/ε),   ∂H/∂θ = -(1/ε) K((π - θ)/ε),   ∂z/∂π = H(π - θ),   ∂H/∂π = 0

Steps in log θ are as long as the learning rate, so a run of few steps depends on where θ starts: at the level that lets
k latents be active, where the paper starts at a small constant and trains for long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_runtime.training.trainers.layouts import Layout
from sae_runtime.training.trainers.penalised import Forward, PenalisedTrainer


class _JumpRelu(torch.autograd.Function):
    """π · H(π - θ)"""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(values, threshold)
        return values * (values > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, threshold = ctx.saved_tensors
        near = _near(values, threshold, ctx.bandwidth)
        to_threshold = gradient * near * (threshold / -ctx.bandwidth)
        return gradient * (values > threshold), to_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """H(π - θ)"""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(values, threshold)
        return (values > threshold).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        values, threshold = ctx.saved_tensors
        near = _near(values, threshold, ctx.bandwidth)
        return None, (gradient * near / -ctx.bandwidth).sum_to_size(threshold.shape), None


def _near(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    # A latent that ReLU silences is not near its threshold, however small that is.
    return ((values - threshold).abs() < bandwidth / 2) & (values > 0)


class JumpReluTrainer(PenalisedTrainer):
    def initial_sparsity_weight(self) -> float:
        return 0.1 / self.config.k

    def initial_latents(self, pre_activations: Tensor, level: float) -> Tensor:
        return pre_activations * (pre_activations > level)

    def initial_level(self, level: Tensor) -> dict[str, Tensor]:
        return {"latent_bias": torch.zeros_like(level), "log_threshold": level.log()}

    @property
    def threshold(self) -> Tensor:
        """θ (n,), with its gradient to log θ."""
        return self.parameters()["log_threshold"].exp()

    def level(self) -> Tensor:
        # The kernel also sees what is somewhat below the threshold.
        return (self.threshold.detach() - self.config.jumprelu_bandwidth / 2).clamp_min(0)

    def forward(self, layout: Layout) -> Forward:
        threshold, bandwidth = layout.of_latents(self.threshold), self.config.jumprelu_bandwidth
        values = layout.values.relu()
        latents: Tensor = _JumpRelu.apply(values, threshold, bandwidth)  # type: ignore[no-untyped-call]
        reconstruction = layout.decode(latents, self.decoder) + self.pre_bias
        if self.config.jumprelu_penalty == "l0":
            penalty: Tensor = _Step.apply(values, threshold, bandwidth).sum()  # type: ignore[no-untyped-call]
        else:
            penalty = torch.tanh(self.config.tanh_scale * latents).sum()  # decoder norms are 1
        return Forward(latents, reconstruction, penalty)

    def export(self) -> dict[str, Any]:
        threshold = self.weights()["log_threshold"].exp() * self.input_scale
        return {**super().export(), "activation": "jumprelu", "threshold": threshold}
