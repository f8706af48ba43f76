"""Training by several workers against the trainer of one process: same weights, figures and dead counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime.training.communicator import ProcessGroupCommunicator
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.distributed import sharded_topk_trainer
from sae_runtime.training.distributed.sharded_topk_trainer import ShardedTopKTrainer
from sae_runtime.training.trainers.topk import TopKTrainer
from tests.sae_runtime.training.distributed.observed import saturated_tokens
from tests.sae_runtime.training.distributed.worker_processes import WorkerProcesses

D_IN, N_LATENTS, BATCH, STEPS = 16, 128, 64, 30

RELATIVE = 5e-6
"""Tolerance of a weight after 30 steps, relative to the largest of its tensor. Workers add the same float32 numbers in
another order, which costs 6e-8 a sum; 7e-7 was the most seen."""


def settings(**changed: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {
        "site": "0.resid_post_mlp",
        "data": [Path("unused.txt")],
        "out": Path("unused"),
        "n_latents": N_LATENTS,
        "k": 8,
        "tokens": BATCH * STEPS,
        "batch_tokens": BATCH,
        "aux_k": 6,
        "dead_after_tokens": 4 * BATCH,
        "compute_dtype": "float32",
        "learning_rate": 3e-3,
        "warmup_steps": 3,
        "gradient_clip": 0.05,
        "adam_eps": 1e-6,
    }
    return TrainingConfig(**{**defaults, **changed})


def activations(n: int, seed: int) -> Tensor:
    """[n, D_IN]: sparse combinations of fixed directions, as a dictionary expects."""
    directions = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.1)
    return strengths @ directions + 0.02 * torch.randn(n, D_IN, generator=generator)


SAMPLE = activations(500, seed=1000)


def batch(step: int) -> Tensor:
    """Seeds without near ties, which rounding would decide: the least that parts a token's k-th largest pre-activation
    from the next, in any step and case below, is 1.2e-5 of it."""
    return activations(BATCH, seed=1100 + step)


def weaken(encoder: Tensor) -> None:
    """Makes the latents 3, 6, 9, … so weak that they are dead soon."""
    with torch.no_grad():
        encoder[3::3] *= 0.01


def train_alone(config: TrainingConfig) -> tuple[TopKTrainer, list[Any]]:
    trainer = TopKTrainer(config, D_IN, SAMPLE)
    weaken(trainer.encoder)
    return trainer, [trainer.step(batch(step)) for step in range(STEPS)]


def _train(config: TrainingConfig, n_shards: int, dense_ratio: int) -> dict[str, Any]:
    sharded_topk_trainer.DENSE_AUX_RATIO = dense_ratio
    c = ProcessGroupCommunicator(n_shards)
    trainer = ShardedTopKTrainer(config, D_IN, SAMPLE, c)
    whole = c.gather_over_shards(trainer.encoder.detach()).flatten(0, 1)
    weaken(whole)
    with torch.no_grad():
        trainer.encoder.copy_(whole.chunk(n_shards)[c.shard_rank])
    with saturated_tokens() as saturated:
        metrics = [trainer.step(batch(step).chunk(c.data_parallel_size)[c.data_rank]) for step in range(STEPS)]
    return {
        "weights": trainer.weights(),
        "tokens_since_fired": trainer.tokens_since_fired,
        "metrics": metrics,
        "saturated": float(torch.cat(saturated).double().mean()),
    }


def assemble(results: list[dict[str, Any]], n_shards: int) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and dead counters of the whole dictionary; that all replicas and shards agree is asserted."""
    shards = results[:n_shards]
    for rank, result in enumerate(results):
        shard = shards[rank % n_shards]
        for name, tensor in result["weights"].items():
            assert torch.equal(tensor, shard["weights"][name]), f"{name} differs between replicas"
        assert torch.equal(result["tokens_since_fired"], shard["tokens_since_fired"])
        assert torch.equal(result["weights"]["pre_bias"], shards[0]["weights"]["pre_bias"])
        assert result["metrics"] == shards[0]["metrics"], "workers report different figures"
    weights = {
        name: torch.cat([shard["weights"][name] for shard in shards]) for name in ("encoder", "decoder", "latent_bias")
    }
    weights["pre_bias"] = shards[0]["weights"]["pre_bias"]
    return weights, torch.cat([shard["tokens_since_fired"] for shard in shards])


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


@pytest.mark.parametrize(
    ("world", "n_shards", "changed", "dense_ratio"),
    [
        (2, 1, {}, 16),
        (2, 2, {}, 16),
        (2, 2, {}, 0),
        (4, 2, {}, 16),
        (4, 4, {"shard_offer_factor": 1.0}, 0),
        (4, 2, {"multi_topk_coefficient": 0.125, "shard_offer_factor": 1.0, "micro_batch_tokens": 12}, 16),
        (2, 2, {"normalize": False, "ema_decay": 0.9, "gradient_clip": None}, 16),
        (4, 2, {"aux_k": 0}, 16),
        (4, 4, {"aux_k": 64}, 16),
    ],
)
def test_workers_train_the_dictionary_of_one_process(
    workers: WorkerProcesses, world: int, n_shards: int, changed: dict[str, Any], dense_ratio: int
) -> None:
    """`dense_ratio` 0: the auxiliary loss takes its sparse way, 16: the dense one."""
    config = settings(**changed)
    alone, expected = train_alone(config)
    results = workers.run(_train, world, config, n_shards, dense_ratio)
    weights, tokens_since_fired = assemble(results, n_shards)

    assert largest_difference(weights, alone.weights()) < RELATIVE
    assert torch.equal(tokens_since_fired, alone.tokens_since_fired)
    assert (tokens_since_fired >= config.dead_after_tokens).any()
    for ours, theirs in zip(results[0]["metrics"], expected, strict=True):
        assert vars(ours) == pytest.approx(vars(theirs), rel=1e-4, abs=1e-6)
    if "shard_offer_factor" in changed:
        assert results[0]["saturated"] > 0.1, "the rest of the offers was never needed: nothing shown"
