"""The plan's formulas against small runs: bytes that workers exchange, bytes that they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sae_runtime.training.communicator import ProcessGroupCommunicator
from sae_runtime.training.distributed.plan import (
    Meeting,
    RunShape,
    bytes_sent,
    exchanges,
    persistent_bytes,
    step_bytes,
)
from sae_runtime.training.distributed.sharded_topk_trainer import ShardedTopKTrainer
from tests.sae_runtime.training.distributed.observed import CountingCommunicator, saturated_tokens
from tests.sae_runtime.training.distributed.test_sharded_topk_trainer import settings
from tests.sae_runtime.training.distributed.worker_processes import WorkerProcesses

pytestmark = pytest.mark.any_cpu

D_IN, BATCH = 24, 96


def trainer_of(shape: RunShape, communicator: Any, **changed: Any) -> ShardedTopKTrainer:
    """A trainer of this shape; shard 0 has the most dead latents, the others have equal parts of the rest."""
    config = settings(
        n_latents=shape.n_latents,
        k=shape.k,
        batch_tokens=shape.batch_tokens,
        tokens=10 * shape.batch_tokens,
        aux_k=shape.aux_k,
        compute_dtype={2: "bfloat16", 4: "float32"}[shape.compute_bytes],
        ema_decay=0.9 if shape.ema else None,
        multi_topk_coefficient=0.125 if shape.multi_topk else 0.0,
        shard_offer_factor=shape.offer_factor,
        micro_batch_tokens=shape.micro_batch_tokens,
        **changed,
    )
    sample = torch.randn(300, shape.d_in, generator=torch.Generator().manual_seed(0))
    trainer = ShardedTopKTrainer(config, shape.d_in, sample, communicator)
    let_die(trainer, shape)
    return trainer


def let_die(trainer: ShardedTopKTrainer, shape: RunShape) -> None:
    """Gives the shape's number of latents of each shard the age of dead ones."""
    dead = shape.dead_of_shard
    if trainer.communicator.shard_rank > 0:
        dead = (shape.dead_latents - dead) // (shape.n_shards - 1)
    trainer.tokens_since_fired[:dead] = trainer.config.dead_after_tokens


def rows_of(shape: RunShape, data_rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1 + data_rank)
    return torch.randn(shape.tokens_of_replica, shape.d_in, generator=generator)


def _payload(shape: RunShape) -> tuple[dict[Meeting, int], float]:
    communicator = CountingCommunicator(ProcessGroupCommunicator(shape.n_shards))
    trainer = trainer_of(shape, communicator)
    communicator.payload.clear()
    with saturated_tokens() as saturated:
        trainer.step(rows_of(shape, communicator.data_rank))
    return dict(communicator.payload), float(torch.cat(saturated).double().mean())


SHAPE = RunShape(n_latents=256, d_in=D_IN, k=8, batch_tokens=BATCH, n_shards=2, data_parallel_size=2, compute_bytes=4)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        replace(SHAPE, aux_k=6, dead_latents=14, dead_of_shard=11),
        replace(SHAPE, aux_k=50, dead_latents=20, dead_of_shard=11, n_shards=4, data_parallel_size=1),
        replace(SHAPE, n_shards=1, data_parallel_size=4),
        replace(SHAPE, offer_factor=1.0, micro_batch_tokens=10),
        replace(SHAPE, multi_topk=True),
    ],
)
def test_the_bytes_exchanged_are_those_of_the_formula(workers: WorkerProcesses, shape: RunShape) -> None:
    for payload, saturated in workers.run(_payload, shape.workers, shape):
        if shape.offer_factor == 1.0:
            assert saturated > 0.1
        expected: dict[Meeting, float] = {}
        for line in exchanges(replace(shape, saturated=saturated), read_together=False):
            expected[line.meeting] = expected.get(line.meeting, 0) + line.payload
        assert payload == pytest.approx(expected)


def _held(shape: RunShape) -> tuple[int, int]:
    """Bytes held between steps, and most bytes held on top in a step."""
    communicator = ProcessGroupCommunicator(shape.n_shards)
    trainer = trainer_of(shape, communicator)
    rows = rows_of(shape, communicator.data_rank)
    trainer.step(rows)
    state = trainer.state_dict()
    tensors = [*state["parameters"].values(), *state["averages"].values(), state["tokens_since_fired"]]
    tensors += [t for moments in state["optimizer"]["state"].values() for t in moments.values()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    trainer._optimizer.zero_grad(set_to_none=True)
    let_die(trainer, shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step(rows)
    assert profiled.profiler is not None
    memory = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor([e.nbytes() for e in sorted(memory, key=lambda e: e.start_ns())]).cumsum(0)
    return held, int(live.max())


@pytest.mark.parametrize(
    "shape",
    [
        replace(SHAPE, n_latents=32_768, d_in=64, batch_tokens=256),
        replace(SHAPE, n_latents=32_768, d_in=64, batch_tokens=256, compute_bytes=2, micro_batch_tokens=32),
        replace(SHAPE, n_latents=2048, d_in=256, batch_tokens=512, aux_k=6, dead_latents=1200, dead_of_shard=600),
        replace(SHAPE, n_latents=512, d_in=512, batch_tokens=8192),
        replace(SHAPE, n_latents=512, d_in=512, batch_tokens=8192, micro_batch_tokens=512, ema=True),
    ],
    ids=["many latents", "many latents in parts", "many dead", "many tokens", "many tokens in parts"],
)
def test_the_memory_held_is_that_of_the_formula(workers: WorkerProcesses, shape: RunShape) -> None:
    measured = workers.run(_held, shape.workers, shape)
    print(
        f"on top in a step: {[peak for _, peak in measured]} bytes, by the formula {step_bytes(shape)}"
    )  # shown by -rP
    for held, peak in measured:
        assert held == persistent_bytes(shape)
        assert peak == pytest.approx(step_bytes(shape), rel=0.15)


def test_a_ring_passes_every_piece_to_everyone() -> None:
    """4 workers, 4 pieces of 10 bytes each: 3 pieces sent while summing, 3 while handing out; 3 whole tensors."""
    assert bytes_sent(Meeting("reduce", "data"), 40, 4) == 60
    assert bytes_sent(Meeting("gather", "shards"), 40, 4) == 120
    assert bytes_sent(Meeting("reduce", "data"), 40, 1) == 0
