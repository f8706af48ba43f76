"""What the trainers of all families share: preparation of activations, optimiser, unit sphere, dead latents, averages.

A family says which parameters it has, how they start, what gradient a batch gives and how they become a `Dictionary`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sae_runtime.dictionary.normalization import normalize_rows
from sae_runtime.kernels.products import default_compute_dtype
from sae_runtime.training.communicator import SINGLE, Communicator
from sae_runtime.training.config import PENALISED, TrainingConfig
from sae_runtime.training.initialisation import MEDIAN_SAMPLES, geometric_median
from sae_runtime.training.trainers.aux_k import AuxiliaryLoss
from sae_runtime.training.trainers.schedule import learning_rate_share
from sae_runtime.training.trainers.unit_norm import normalize_rows_, remove_radial_component_


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one training step, over its batch (of all workers)."""

    loss: float
    nmse: float
    """Mean squared error over the variance of the initial sample, in the (normalised) space that is trained on."""
    l0: float
    """Positive latents per token."""
    dead_fraction: float
    """Share of latents that did not fire for dead_after_tokens."""
    aux_nmse: float
    """Normalised error of modelling the residual with dead latents; 0 when none is dead."""
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    """Norm of the gradient of all parameters before clipping."""
    sparsity_weight: float = 0.0
    """Weight of the sparsity penalty; 0 for the families that have none."""


@dataclass
class BatchFigures:
    """What a family reports of a batch: this worker's shares, to be summed over the replicas."""

    loss: Tensor
    nmse: Tensor
    aux_nmse: Tensor
    active: Tensor
    """Positive latents, counted over this worker's rows."""
    fired: Tensor
    """bool [n_latents]: which latents exceeded dead_threshold on any of this worker's rows."""
    sparsity_weight: float = 0.0


def normalize_input(x: Tensor) -> Tensor:
    """Rows of x [n, d] with mean 0 and standard deviation 1: what Dictionary.encode does."""
    return normalize_rows(x, "layer_norm")[0]


class Trainer(ABC):
    """Weights and optimiser of one dictionary that learns from batches of activations.

    `parameters()` are float32; rows belong to latents: `encoder` and `decoder` are [n_latents, d_in]. Training happens
    on layer-normalised activations, or else on activations divided by one number, `input_scale`, that gives them the
    same mean square of 1 per dimension: learning rate and penalties then mean the same at every site. All families are
    positively homogeneous, so that number is multiplied into the biases and thresholds of the published dictionary.
    """

    unit_decoder: ClassVar[bool] = True
    """Whether decoder rows are kept on the unit sphere."""

    def __init__(self, config: TrainingConfig, d_in: int, sample: Tensor, communicator: Communicator = SINGLE) -> None:
        """`sample` [m, d_in]: raw activations that fix pre_bias, the loss scale, and the initial weights.

        Raises:
            ValueError: all sampled activations are equal.
        """
        sample = sample.to(config.device, torch.float32)
        scale = 1.0 if config.normalize else float(sample.square().mean().sqrt()) or 1.0
        sample = normalize_input(sample) if config.normalize else sample / scale
        variance = float((sample - sample.mean(0)).square().mean())
        if not variance > 0:
            raise ValueError(f"sampled activations have variance {variance}: nothing can be trained on them")
        generator = torch.Generator().manual_seed(config.seed)
        weights = self.initial_weights(config, sample, generator)
        weights["pre_bias"] = geometric_median(sample[:MEDIAN_SAMPLES])
        self._set_up(config, weights, variance, scale, communicator)

    @classmethod
    def from_state(cls, config: TrainingConfig, state: dict[str, Any], communicator: Communicator = SINGLE) -> Self:
        """The trainer whose `state_dict` was saved."""
        trainer = cls.__new__(cls)
        trainer._set_up(config, state["parameters"], state["variance"], state["input_scale"], communicator)
        trainer._averages = {name: a.to(config.device) for name, a in state["averages"].items()}
        trainer._optimizer.load_state_dict(state["optimizer"])
        trainer.tokens_since_fired = state["tokens_since_fired"].to(config.device)
        trainer.step_count = state["step_count"]
        trainer.load_family_state(state["family"])
        return trainer

    def _set_up(
        self,
        config: TrainingConfig,
        weights: dict[str, Tensor],
        variance: float,
        input_scale: float,
        communicator: Communicator,
    ) -> None:
        self.config = config
        self.communicator = communicator
        self._parameters = {
            name: nn.Parameter(w.to(config.device, torch.float32, copy=True)) for name, w in weights.items()
        }
        self.encoder, self.decoder = self._parameters["encoder"], self._parameters["decoder"]
        self.pre_bias, self.latent_bias = self._parameters["pre_bias"], self._parameters["latent_bias"]
        self.n_latents, self.d_in = self.encoder.shape
        self.variance = variance
        self.input_scale = input_scale
        self.compute_dtype: torch.dtype = (
            default_compute_dtype(config.device)
            if config.compute_dtype == "auto"
            else getattr(torch, config.compute_dtype)
        )
        self.tokens_since_fired = torch.zeros(self.n_latents, dtype=torch.int64, device=config.device)
        self.step_count = 0
        self.batch_rows = 0  # rows of the current batch, those of all replicas together
        self._learning_rate = config.learning_rate_for(config.n_latents or self.n_latents)
        self._optimizer = torch.optim.Adam(
            self._parameters.values(),
            lr=self._learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        self._averages = {name: torch.zeros_like(p) for name, p in self._parameters.items()} if config.ema_decay else {}
        self.set_up_family()

    # What a family defines

    @abstractmethod
    def initial_weights(self, config: TrainingConfig, sample: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial encoder, decoder, latent_bias and the family's own parameters; pre_bias is added by the caller.

        `sample` [m, d_in] is prepared as batches are. Weights are drawn with `generator` on the CPU.
        """

    def set_up_family(self) -> None:  # noqa: B027 (not every family has such state)
        """Makes the family's own state that is no parameter."""

    @abstractmethod
    def accumulate(self, batch: Sequence[Tensor]) -> BatchFigures:
        """Adds the gradient of this worker's share of the loss to every parameter's `.grad`.

        `batch`: prepared micro-batches [b, d_in]. The result equals that of one large micro-batch to rounding: sums are
        divided by `batch_rows`, and figures that a loss divides by are taken over the whole batch.
        """

    @abstractmethod
    def export(self) -> dict[str, Any]:
        """Fields of the `Dictionary` (float32, detached) in units of the activations, without normalisation and names.

        Built from `weights()` and `input_scale`.
        """

    def family_state(self) -> dict[str, Any]:
        """The family's own state, for a checkpoint."""
        return {}

    def load_family_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes back what `family_state` gave."""

    def auxiliary_loss(self) -> AuxiliaryLoss:
        """AuxK on this dictionary's parameters."""
        return AuxiliaryLoss(
            self.encoder,
            self.decoder,
            self.latent_bias,
            self.pre_bias,
            aux_k=self.config.aux_k,
            without_bias=self.config.family in PENALISED,
            coefficient=self.config.aux_coefficient,
            compute_dtype=self.compute_dtype,
            communicator=self.communicator,
        )

    # One step

    def step(self, activations: Tensor) -> StepMetrics:
        """One optimiser step on this worker's raw activations [b, d_in].

        Raises:
            FloatingPointError: the loss or its gradient is not finite; the weights are those before the step.
        """
        x = self.prepare(activations)
        self.batch_rows = len(x) * self.communicator.data_parallel_size
        n_dead = int(self.dead().sum())
        self._optimizer.zero_grad(set_to_none=True)
        figures = self.accumulate(x.split(self.config.micro_batch_tokens or len(x)))
        shares = torch.stack([figures.loss, figures.nmse, figures.aux_nmse, figures.active]).double()
        loss, nmse, aux_nmse, active = self.communicator.sum_over_data(shares).tolist()
        if not math.isfinite(loss):
            raise self._not_finite(f"loss is {loss}", nmse, aux_nmse)
        norm = self._reduce_gradients()
        if not math.isfinite(norm):
            raise self._not_finite(f"the gradient's norm is {norm}", nmse, aux_nmse)
        learning_rate = self._update(norm)
        self._count_fired(figures.fired)
        return StepMetrics(
            loss=loss,
            nmse=nmse,
            l0=active / self.batch_rows,
            dead_fraction=n_dead / self.n_latents,
            aux_nmse=aux_nmse,
            learning_rate=learning_rate,
            gradient_norm=norm,
            sparsity_weight=figures.sparsity_weight,
        )

    def prepare(self, activations: Tensor) -> Tensor:
        """What is trained on: float32 on the training device, layer-normalised or divided by `input_scale`."""
        x = activations.to(self.config.device, torch.float32)
        return normalize_input(x) if self.config.normalize else x / self.input_scale

    def dead(self) -> Tensor:
        """bool [n_latents]: latents that have not fired for dead_after_tokens.

        Judged before the batch, so that the auxiliary loss does not depend on its own result.
        """
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def _reduce_gradients(self) -> float:
        """Sums gradients over the replicas, keeps the decoder's along the sphere; gives the norm of all together."""
        for p in self._parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self.communicator.sum_over_data(p.grad)
        if self.unit_decoder:
            assert self.decoder.grad is not None
            remove_radial_component_(self.decoder.grad, self.decoder)
        squares = {
            name: torch.linalg.vector_norm(p.grad).square()
            for name, p in self._parameters.items()
            if p.grad is not None
        }
        # Every shard holds all of pre_bias, and its own rows of everything else.
        per_latent = torch.stack([square for name, square in squares.items() if name != "pre_bias"]).sum()
        return float((self.communicator.sum_over_shards(per_latent) + squares["pre_bias"]).sqrt())

    @torch.no_grad()
    def _update(self, gradient_norm: float) -> float:
        """Clips, steps, renormalises and averages; gives the learning rate used."""
        clip = self.config.gradient_clip
        if clip is not None and gradient_norm > clip:
            torch._foreach_mul_([p.grad for p in self._parameters.values() if p.grad is not None], clip / gradient_norm)
        learning_rate = self._learning_rate * learning_rate_share(self.config, self.step_count)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        if self.unit_decoder:
            normalize_rows_(self.decoder)
        self.step_count += 1
        if self.config.ema_decay:
            for name, p in self._parameters.items():
                self._averages[name].lerp_(p, 1 - self.config.ema_decay)
        return learning_rate

    def _count_fired(self, fired: Tensor) -> None:
        anywhere = self.communicator.max_over_data(fired.to(torch.uint8)).bool()
        self.tokens_since_fired += self.batch_rows
        self.tokens_since_fired[anywhere] = 0

    def _not_finite(self, what: str, nmse: float, aux_nmse: float) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {self.step_count} (nmse {nmse}, auxiliary {aux_nmse}); a smaller learning_rate or a "
            "float32 compute_dtype may help, if the activations themselves are finite"
        )

    # Results

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def weights(self) -> dict[str, Tensor]:
        """Parameters to publish (detached copies): their bias-corrected moving average where one is kept."""
        if self.config.ema_decay and self.step_count:
            correction = 1 - self.config.ema_decay**self.step_count
            weights = {name: average / correction for name, average in self._averages.items()}
        else:
            weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        if self.unit_decoder:
            normalize_rows_(weights["decoder"])
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": {name: p.detach() for name, p in self._parameters.items()},
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "variance": self.variance,
            "input_scale": self.input_scale,
            "step_count": self.step_count,
            "family": self.family_state(),
        }
