"""Training of a TopK dictionary whose latents are split over workers, and whose batches may be as well.

Only what a token's latents are chosen from, and what they are summed to, concerns more than one shard:

    choice          the k best pre-activations over all shards (`choose_over_shards`)
    reconstruction  x̂ = Σ over shards of this shard's part of W_dec z, + pre_bias
    pre_bias        its gradient through the encoder is summed over shards; what it adds to x̂ is the same on all
    AuxK            dead latents are ranked over all shards, and ê is summed like x̂

Every shard has the whole x̂ and so the gradient of the whole loss with respect to it; all further gradients, Adam's
moments, dead counters and the decoder's unit sphere are local. Replicas are the base class's concern.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_runtime.training.choose_latents import choose_latents
from sae_runtime.training.communicator import Communicator
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.distributed.choose_over_shards import Offers, choose_over_shards, first_offer
from sae_runtime.training.distributed.shard_initialisation import shard_directions, shard_of, sharded_encoder_scale
from sae_runtime.training.sparse_gradients import SelectedLatents, selected_pre_activations, sparse_decode
from sae_runtime.training.trainers.aux_k import DENSE_AUX_RATIO, AuxiliaryLoss
from sae_runtime.training.trainers.topk import MULTI_TOPK_FACTOR, Selection, TopKTrainer
from sae_runtime.training.trainers.trainer import BatchFigures, StepMetrics


class ShardedTopKTrainer(TopKTrainer):
    """One worker's shard of a TopK dictionary.

    `encoder`, `decoder` [n_latents, d_in], `latent_bias` and all that belongs to a latent are this shard's, and
    `n_latents` counts them; `pre_bias` is the same on all workers, bit by bit. A step is a meeting of all workers, with
    the same rows on all shards of a replica, and gives what one process with the whole dictionary would give, up to the
    order of floating-point sums. Metrics are those of the whole dictionary.
    """

    def __init__(self, config: TrainingConfig, d_in: int, sample: Tensor, communicator: Communicator) -> None:
        """`sample` [m, d_in]: raw activations, the same on all workers.

        Raises:
            ValueError: all sampled activations are equal; the latents cannot be split into equal shards.
        """
        self.communicator = communicator
        super().__init__(config, d_in, sample, communicator)

    def set_up_family(self) -> None:
        super().set_up_family()
        self.n_latents_of_all_shards = self.n_latents * self.communicator.n_shards
        self._learning_rate = self.config.learning_rate_for(self.n_latents_of_all_shards)
        self._encoder_pre_bias = self.pre_bias

    def initial_weights(self, config: TrainingConfig, sample: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        n_latents, d_in = config.latents_for(sample.shape[1]), sample.shape[1]
        shard = shard_of(n_latents, self.communicator)
        directions = shard_directions(n_latents, d_in, generator, shard).to(config.device)
        return {
            "encoder": directions * sharded_encoder_scale(directions, config.k, generator, self.communicator),
            "decoder": directions,
            "latent_bias": directions.new_zeros(len(directions)),
        }

    def step(self, activations: Tensor) -> StepMetrics:
        n_dead = int(self.communicator.sum_over_shards(self.dead().sum()))
        return replace(super().step(activations), dead_fraction=n_dead / self.n_latents_of_all_shards)

    def select(self, batch: Sequence[Tensor]) -> Iterable[Selection]:
        k, n_prefixes = self.config.k, len(self.prefix_weights)
        wide = min(MULTI_TOPK_FACTOR * k, self.n_latents_of_all_shards) if n_prefixes > 1 else k
        weight, bias = self.encoder.detach().to(self.compute_dtype), self.latent_bias.detach().to(self.compute_dtype)
        for x in batch:
            centred = x - self.pre_bias.detach()
            offers = Offers.sorted(
                *choose_latents(centred.to(self.compute_dtype), weight, bias, min(wide, self.n_latents))
            )
            keep = self._choose(offers, k)
            if n_prefixes == 1:
                latents = _csr(offers.indices, keep, self.n_latents)
                yield Selection(centred, latents, offers.values[keep], latents, None)
                continue
            keep_wide = self._choose(offers, wide) | keep
            latents = _csr(offers.indices, keep_wide, self.n_latents)
            # Both choices keep a prefix of the same sorted row, so the latents among the k best come first.
            ends_of_narrow = latents.offsets[:-1] + keep.sum(1)
            offsets = torch.stack([latents.offsets[:-1], ends_of_narrow], dim=1).reshape(-1)
            by_prefix = latents.split(torch.cat([offsets, latents.offsets[-1:]]))
            yield Selection(centred, latents, offers.values[keep_wide], by_prefix, by_prefix.rows % 2)

    def reconstruct(self, selection: Selection) -> tuple[Tensor, Tensor]:
        values = selected_pre_activations(
            selection.values,
            selection.latents,
            selection.centred,
            self.encoder,
            self.latent_bias,
            self._encoder_pre_bias,
        ).relu()
        decoded = sparse_decode(values, selection.by_prefix, self.decoder).view(-1, len(self.prefix_weights), self.d_in)
        added = self.communicator.sum_over_shards(decoded)
        return (added.cumsum(1) if len(self.prefix_weights) > 1 else added) + self.pre_bias, values

    def accumulate(self, batch: Sequence[Tensor]) -> BatchFigures:
        # pre_bias inside the encoder is a separate leaf: one sum over shards of its gradient for all micro-batches.
        self._encoder_pre_bias = nn.Parameter(self.pre_bias.detach().clone())
        figures = super().accumulate(batch)
        assert self.pre_bias.grad is not None
        assert self._encoder_pre_bias.grad is not None
        self.pre_bias.grad += self.communicator.sum_over_shards(self._encoder_pre_bias.grad)
        figures.active = self.communicator.sum_over_shards(figures.active)
        return figures

    def auxiliary_loss(self) -> AuxiliaryLoss:
        return _ShardedAuxiliaryLoss(
            self.encoder,
            self.decoder,
            self.latent_bias,
            self._encoder_pre_bias,
            aux_k=self.config.aux_k,
            without_bias=False,
            coefficient=self.config.aux_coefficient,
            compute_dtype=self.compute_dtype,
            communicator=self.communicator,
        )

    def _choose(self, offers: Offers, k: int) -> Tensor:
        first = first_offer(k, self.communicator.n_shards, self.config.shard_offer_factor)
        keep, _ = choose_over_shards(
            offers, k, self.communicator, first=first, complete=self.config.shard_offers_complete
        )
        return keep


class _ShardedAuxiliaryLoss(AuxiliaryLoss):
    """AuxK with the dead latents of all shards. `pre_bias` is the leaf whose gradient is summed over shards."""

    def _count(self, dead: Tensor) -> int:
        of_shards = self._communicator.gather_over_shards(dead.new_tensor(len(dead))).tolist()
        self._most_of_a_shard = max(of_shards)
        return int(sum(of_shards))

    def _model(self, x: Tensor, encoder: Tensor, decoder: Tensor, latent_bias: Tensor, k: int) -> Tensor:
        width = min(k, self._most_of_a_shard)
        offered = min(width, len(encoder))
        if len(encoder) <= DENSE_AUX_RATIO * k:  # none at all included
            pre_activations = F.linear(x - self._pre_bias, encoder, latent_bias)  # (b, n_dead)
            offers = Offers(*torch.topk(pre_activations.detach(), offered, dim=1))
            gate = torch.zeros_like(pre_activations, dtype=torch.bool)
            gate.scatter_(1, offers.indices, self._choose(offers, width, k)[:, :offered])
            return self._communicator.sum_over_shards((pre_activations.relu() * gate) @ decoder)
        centred = x - self._pre_bias.detach()
        compute = self._compute_dtype
        offers = Offers.sorted(
            *choose_latents(
                centred.to(compute), encoder.detach().to(compute), latent_bias.detach().to(compute), offered
            )
        )
        keep = self._choose(offers, width, k)[:, :offered]
        selection = _csr(offers.indices, keep, len(encoder))
        values = selected_pre_activations(
            offers.values[keep], selection, centred, encoder, latent_bias, self._pre_bias
        ).relu()
        return self._communicator.sum_over_shards(sparse_decode(values, selection, decoder))

    def _choose(self, offers: Offers, width: int, k: int) -> Tensor:
        """Always exact, wherever the dead latents lie; the default first offer is only a guess of what is needed."""
        first = first_offer(k, self._communicator.n_shards)
        return choose_over_shards(offers.filled_up(width), k, self._communicator, first=first)[0]


def _csr(indices: Tensor, keep: Tensor, n_latents: int) -> SelectedLatents:
    """The kept entries of indices (B, m), row by row."""
    offsets = F.pad(keep.sum(1).cumsum(0), (1, 0))
    return SelectedLatents(indices[keep], offsets, n_latents)


def whole_export(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`export` of the whole dictionary, of those of all shards in their order."""
    rows = {name: torch.cat([shard[name] for shard in shards]) for name in ("encoder", "decoder", "latent_bias")}
    return {**shards[0], **rows}
