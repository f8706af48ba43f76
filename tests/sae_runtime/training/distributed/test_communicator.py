"""Sums, gathers and gradients over replicas and shards, against what they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_runtime.training.communicator import SINGLE, Communicator, ProcessGroupCommunicator
from tests.sae_runtime.training.distributed.worker_processes import WorkerProcesses


def _place(n_shards: int) -> tuple[int, int, int, int]:
    c = ProcessGroupCommunicator(n_shards)
    return c.data_parallel_size, c.data_rank, c.n_shards, c.shard_rank


def _number(communicator: Communicator) -> torch.Tensor:
    """A tensor that names its worker: [10 · data_rank + shard_rank, 1]."""
    return torch.tensor([10.0 * communicator.data_rank + communicator.shard_rank, 1.0])


def _meetings(n_shards: int) -> dict[str, Any]:
    c = ProcessGroupCommunicator(n_shards)
    argument = _number(c)
    results = {
        "sum_over_data": c.sum_over_data(_number(c)),
        "max_over_data": c.max_over_data(_number(c)),
        "min_over_data": c.min_over_data(_number(c)),
        "gather_over_data": c.gather_over_data(_number(c)),
        "sum_over_shards": c.sum_over_shards(argument),
        "gather_over_shards": c.gather_over_shards(_number(c)),
        "broadcast": c.broadcast(_number(c)),
    }
    assert torch.equal(argument, _number(c)), "sum_over_shards changed its argument"
    in_place = _number(c)
    assert c.sum_over_data(in_place) is in_place
    return {name: tensor.tolist() for name, tensor in results.items()}


def _gradient(n_shards: int) -> list[float]:
    """Gradient of (Σ over shards r of (r + 1) · w_r)² for the worker's own w."""
    c = ProcessGroupCommunicator(n_shards)
    w = torch.tensor([float(c.shard_rank + 3)], requires_grad=True)
    total = c.sum_over_shards((c.shard_rank + 1) * w)
    (total**2).sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    return w.grad.tolist()


def _noisy_sum(n_shards: int) -> tuple[torch.Tensor, torch.Tensor]:
    c = ProcessGroupCommunicator(n_shards)
    generator = torch.Generator().manual_seed(10 * c.data_rank + c.shard_rank)
    noise = torch.randn(10_007, generator=generator) * 10 ** torch.randint(-6, 6, (10_007,), generator=generator)
    return c.sum_over_data(noise.clone()), c.sum_over_shards(noise)


def test_shards_of_a_replica_are_neighbours(workers: WorkerProcesses) -> None:
    assert workers.run(_place, 4, 2) == [(2, 0, 2, 0), (2, 0, 2, 1), (2, 1, 2, 0), (2, 1, 2, 1)]
    assert workers.run(_place, 4, 1) == [(4, rank, 1, 0) for rank in range(4)]
    assert workers.run(_place, 3, 3) == [(1, 0, 3, rank) for rank in range(3)]


def test_meetings_of_two_replicas_of_two_shards(workers: WorkerProcesses) -> None:
    for rank, found in enumerate(workers.run(_meetings, 4, 2)):
        data, shard = divmod(rank, 2)
        assert found == {
            "sum_over_data": [10 + 2 * shard, 2],
            "max_over_data": [10 + shard, 1],
            "min_over_data": [shard, 1],
            "gather_over_data": [[shard, 1], [10 + shard, 1]],
            "sum_over_shards": [20 * data + 1, 2],
            "gather_over_shards": [[10 * data, 1], [10 * data + 1, 1]],
            "broadcast": [0, 1],
        }


@pytest.mark.parametrize("n_shards", [1, 2, 3])
def test_a_gradient_passes_the_sum_over_shards_as_in_one_process(workers: WorkerProcesses, n_shards: int) -> None:
    w = (torch.arange(n_shards) + 3.0).requires_grad_()
    (((torch.arange(n_shards) + 1) * w).sum() ** 2).backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    for shard, found in enumerate(workers.run(_gradient, n_shards, n_shards)):
        assert found == pytest.approx([float(w.grad[shard])])


DTYPES = (torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.uint8)


def _gathered(n_shards: int) -> list[torch.Tensor]:
    """Gathers a matrix that is not contiguous, and a single number, in several types."""
    c = ProcessGroupCommunicator(n_shards)
    rank = torch.distributed.get_rank()
    tensors = [torch.arange(6).view(2, 3).T + rank, torch.tensor(rank)]
    return [c.gather_over_shards(tensor.to(dtype)) for tensor in tensors for dtype in DTYPES]


def test_tensors_of_any_type_are_gathered(workers: WorkerProcesses) -> None:
    matrices = torch.stack([torch.arange(6).view(2, 3).T + rank for rank in range(3)])
    expected = [tensor.to(dtype) for tensor in (matrices, torch.arange(3)) for dtype in DTYPES]
    for found in workers.run(_gathered, 3, 3):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_sums_have_one_order(workers: WorkerProcesses) -> None:
    """The same bits on every worker and every time, for numbers of very different sizes."""
    once, again = workers.run(_noisy_sum, 4, 1), workers.run(_noisy_sum, 4, 1)
    for data_sum, _ in once + again:
        assert torch.equal(data_sum, once[0][0])
    over_shards = workers.run(_noisy_sum, 3, 3)
    assert all(torch.equal(shard_sum, over_shards[0][1]) for _, shard_sum in over_shards)


def test_workers_that_do_not_fit_the_shards_are_an_error(workers: WorkerProcesses) -> None:
    with pytest.raises(AssertionError, match="3 workers cannot hold 2 latent shards each in equal numbers of replicas"):
        workers.run(_place, 3, 2)


def test_one_process_meets_nobody() -> None:
    x = torch.tensor([1.0, 2.0])
    for method in ("sum_over_data", "max_over_data", "min_over_data", "sum_over_shards", "broadcast"):
        assert getattr(SINGLE, method)(x) is x
    assert torch.equal(SINGLE.gather_over_shards(x), x[None])
    assert torch.equal(SINGLE.gather_over_data(x), x[None])
    assert (SINGLE.data_parallel_size, SINGLE.data_rank, SINGLE.n_shards, SINGLE.shard_rank) == (1, 0, 1, 0)
