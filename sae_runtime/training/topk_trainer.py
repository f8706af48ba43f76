"""Training of one TopK dictionary on batches of activations: weights, losses, dead latents, optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_runtime.autoencoder import LAYER_NORM_EPS
from sae_runtime.training.choose_latents import choose_latents
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.initialisation import (
    MEDIAN_SAMPLES,
    encoder_scale,
    geometric_median,
    tied_directions,
    unit_rows,
)
from sae_runtime.training.sparse_gradients import (
    SelectedLatents,
    selected_pre_activations,
    sparse_decode,
)

DENSE_AUX_RATIO = (
    16  # up to this many dead latents per selected one, dense products over them cost less than sparse sums
)


def normalize_input(x: Tensor) -> Tensor:
    """Each row minus its mean, divided by its unbiased standard deviation + 1e-5: what Dictionary.encode does."""
    x = x - x.mean(dim=-1, keepdim=True)
    std = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)  # faster than x.std
    normalized: Tensor = x / (std + LAYER_NORM_EPS)
    return normalized


def prepare(config: TrainingConfig, activations: Tensor) -> Tensor:
    """What is trained on: float32 on the training device, normalised where the configuration says so."""
    x = activations.to(config.device, torch.float32)
    return normalize_input(x) if config.normalize else x


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one training step, over its batch."""

    loss: float
    nmse: float
    """Mean squared error over the variance of the initial sample, in the (normalised) space that is trained on."""
    l0: float
    """Positive latents per token."""
    dead_fraction: float
    """Share of latents that did not fire for dead_after_tokens."""
    aux_nmse: float
    """Normalised error of modelling the residual with dead latents; 0 when none is dead."""


class TopKTrainer:
    """Weights and optimiser of a dictionary x̂ = W_dec · TopK(ReLU(W_enc (x - pre_bias) + latent_bias)) + pre_bias.

    `encoder` and `decoder` are [n_latents, d_in] with one row per latent; decoder rows have unit norm after every step.
    """

    def __init__(self, config: TrainingConfig, d_in: int, sample: Tensor) -> None:
        """`sample` [m, d_in]: raw activations that fix pre_bias, the loss scale and the encoder scale.

        Raises:
            ValueError: all sampled activations are equal.
        """
        sample = prepare(config, sample)
        generator = torch.Generator().manual_seed(config.seed)
        directions = tied_directions(config.latents_for(d_in), d_in, generator).to(config.device)
        weights = {
            "encoder": directions * encoder_scale(directions, config.k, generator),
            "decoder": directions,
            "pre_bias": geometric_median(sample[:MEDIAN_SAMPLES]),
            "latent_bias": directions.new_zeros(len(directions)),
        }
        variance = float((sample - sample.mean(0)).square().mean())
        if variance == 0:
            raise ValueError("all sampled activations are equal: nothing can be trained on them")
        self._set_up(config, weights, variance)

    @classmethod
    def from_state(cls, config: TrainingConfig, state: dict[str, Any]) -> TopKTrainer:
        """The trainer whose `state_dict` was saved."""
        trainer = cls.__new__(cls)
        trainer._set_up(config, state["parameters"], state["variance"])
        trainer._averages = state["averages"]
        trainer._optimizer.load_state_dict(state["optimizer"])
        trainer.tokens_since_fired = state["tokens_since_fired"].to(config.device)
        trainer.step_count = state["step_count"]
        return trainer

    def _set_up(self, config: TrainingConfig, weights: dict[str, Tensor], variance: float) -> None:
        self.config = config
        self.encoder, self.decoder, self.pre_bias, self.latent_bias = (
            nn.Parameter(weights[name].to(config.device).clone())
            for name in ("encoder", "decoder", "pre_bias", "latent_bias")
        )
        self.n_latents = len(self.encoder)
        self.variance = variance
        self.tokens_since_fired = torch.zeros(self.n_latents, dtype=torch.int64, device=config.device)
        self.step_count = 0
        self._learning_rate = config.learning_rate_for(self.n_latents)
        self._optimizer = torch.optim.Adam(
            self.parameters().values(),
            lr=self._learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self._averages = (
            {name: torch.zeros_like(p) for name, p in self.parameters().items()} if config.ema_decay else {}
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "pre_bias": self.pre_bias,
            "latent_bias": self.latent_bias,
        }

    def step(self, activations: Tensor) -> StepMetrics:
        """One optimiser step on raw activations [B, d_in].

        Raises:
            FloatingPointError: the loss is not finite; the weights are those before the step.
        """
        x = prepare(self.config, activations)
        selection, decoded, values = self._autoencode(x, self.encoder, self.latent_bias, self.decoder, self.config.k)
        reconstruction = decoded + self.pre_bias
        # Dead latents are those of before this batch, so that the auxiliary loss does not depend on its own result.
        dead = torch.nonzero(self.tokens_since_fired >= self.config.dead_after_tokens).flatten()
        nmse = F.mse_loss(reconstruction, x) / self.variance
        aux = self._aux_loss(x, reconstruction.detach(), dead)
        loss = nmse + self.config.aux_coefficient * aux
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.step_count} (nmse {nmse.item()}, auxiliary {aux.item()}); "
                "a smaller learning_rate or a float32 compute_dtype may help"
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._update()
        self._count_fired(selection.indices, values.detach())
        return StepMetrics(
            loss=float(loss.detach()),
            nmse=float(nmse.detach()),
            l0=float((values.detach() > 0).sum()) / len(x),
            dead_fraction=len(dead) / self.n_latents,
            aux_nmse=float(aux.detach()),
        )

    def weights(self) -> dict[str, Tensor]:
        """Weights to publish (float32, detached): the moving average where one is kept, decoder rows of unit norm."""
        weights = {name: p.detach().clone() for name, p in self.parameters().items()}
        if self.config.ema_decay and self.step_count:
            correction = 1 - self.config.ema_decay**self.step_count
            weights = {name: average / correction for name, average in self._averages.items()}
        weights["decoder"] = unit_rows(weights["decoder"])
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": {name: p.detach() for name, p in self.parameters().items()},
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "variance": self.variance,
            "step_count": self.step_count,
        }

    def _autoencode(
        self, x: Tensor, encoder: Tensor, latent_bias: Tensor, decoder: Tensor, k: int
    ) -> tuple[SelectedLatents, Tensor, Tensor]:
        """The k latents chosen among the given ones, their sum (B, d) without pre_bias, and their values (B, k)."""
        centred = x - self.pre_bias.detach()
        compute = getattr(torch, self.config.compute_dtype)
        chosen, indices = choose_latents(
            centred.to(compute), encoder.detach().to(compute), latent_bias.detach().to(compute), k
        )
        selection = SelectedLatents(indices, len(encoder))
        values = selected_pre_activations(chosen, selection, centred, encoder, latent_bias, self.pre_bias).relu()
        return selection, sparse_decode(values, selection, decoder), values

    def _aux_loss(self, x: Tensor, reconstruction: Tensor, dead: Tensor) -> Tensor:
        """Normalised error of modelling what the reconstruction misses with the aux_k best dead latents of each token.

        The target already excludes pre_bias (it is x minus a reconstruction that includes it), so the auxiliary
        reconstruction has none either.
        """
        k = min(self.config.aux_k, len(dead))
        if k == 0 or self.config.aux_coefficient == 0:
            return x.new_zeros(())
        encoder, decoder = self.encoder.index_select(0, dead), self.decoder.index_select(0, dead)
        latent_bias = self.latent_bias.index_select(0, dead)
        if len(dead) > DENSE_AUX_RATIO * k:
            modelled = self._autoencode(x, encoder, latent_bias, decoder, k)[1]
        else:
            latents = F.linear(x - self.pre_bias, encoder, latent_bias).relu()  # (B, n_dead)
            if k < len(dead):
                values, indices = torch.topk(latents, k, dim=1, sorted=False)
                latents = torch.zeros_like(latents).scatter(1, indices, values)
            modelled = latents @ decoder
        residual = x - reconstruction
        loss = F.mse_loss(modelled, residual) / (residual - residual.mean(0)).square().mean()
        return torch.nan_to_num(loss, 0.0)

    @torch.no_grad()
    def _update(self) -> None:
        gradient = self.decoder.grad
        assert gradient is not None
        # Only the part of the gradient along the unit sphere: growing a row would be undone below anyway.
        gradient -= (gradient * self.decoder).sum(1, keepdim=True) * self.decoder
        if self.config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters().values(), self.config.gradient_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * self._schedule()
        self._optimizer.step()
        self.decoder.copy_(unit_rows(self.decoder))
        self.step_count += 1
        if self.config.ema_decay:
            for name, p in self.parameters().items():
                self._averages[name].lerp_(p, 1 - self.config.ema_decay)

    def _schedule(self) -> float:
        """Share of the learning rate at this step: a linear rise, a plateau, a linear fall to 0."""
        rise = (self.step_count + 1) / max(self.config.warmup_steps, 1)
        fall = (self.config.n_steps - self.step_count) / max(self.config.decay_fraction * self.config.n_steps, 1)
        return max(0.0, min(1.0, rise, fall if self.config.decay_fraction else 1.0))

    def _count_fired(self, indices: Tensor, values: Tensor) -> None:
        self.tokens_since_fired += len(indices)
        self.tokens_since_fired[indices[values > self.config.dead_threshold]] = 0
