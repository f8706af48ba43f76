"""BatchTopK dictionaries (Bussmann et al. 2024): k latents a token on average, the largest of the whole batch.

    z = ReLU(BatchTopK_k(W_enc (x - pre_bias) + latent_bias)): the k · B largest of the batch, so L0 differs by token
    loss as TopK; published as JumpReLU with θ = E[least chosen activation of a batch]

The expectation is a bias-corrected running average over training batches (threshold_decay).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_runtime.training.trainers.batch_selection import Entries, largest_of_batch
from sae_runtime.training.trainers.topk import Selection, TopKTrainer


class BatchTopKTrainer(TopKTrainer):
    """TopK with a selection over the batch and a running threshold for inference."""

    def set_up_family(self) -> None:
        super().set_up_family()
        self._threshold_sum = 0.0  # Σ decayed least chosen activations, in the units that are trained in
        self._threshold_weight = 0.0

    @property
    def threshold(self) -> float:
        """Pre-activation that a latent must exceed at inference, in the units that are trained in."""
        return self._threshold_sum / self._threshold_weight if self._threshold_weight else 0.0

    def select(self, batch: Sequence[Tensor]) -> Iterable[Selection]:
        centred = [x - self.pre_bias.detach() for x in batch]
        chosen, least = largest_of_batch(
            [x.to(self.compute_dtype) for x in centred],
            self.encoder.detach().to(self.compute_dtype),
            self.latent_bias.detach().to(self.compute_dtype),
            self.config.k,
            self.communicator,
        )
        if torch.isfinite(least):
            decay = self.config.threshold_decay_rate
            self._threshold_sum = decay * self._threshold_sum + (1 - decay) * float(least)
            self._threshold_weight = decay * self._threshold_weight + (1 - decay)
        return [self.nest(x, entries) for x, entries in zip(centred, chosen, strict=True)]

    def nest(self, centred: Tensor, entries: Entries) -> Selection:
        """The selection of a micro-batch from its entries, cut into nested prefixes."""
        latents = entries.by_row(len(centred), self.n_latents)
        return Selection(centred, latents, entries.values, latents, None)

    def export(self) -> dict[str, Any]:
        fields = super().export()
        threshold = torch.full_like(fields["latent_bias"], self.threshold * self.input_scale)
        return {**fields, "activation": "jumprelu", "k": None, "threshold": threshold}

    def family_state(self) -> dict[str, Any]:
        return {"threshold_sum": self._threshold_sum, "threshold_weight": self._threshold_weight}

    def load_family_state(self, state: dict[str, Any]) -> None:
        self._threshold_sum, self._threshold_weight = state["threshold_sum"], state["threshold_weight"]
