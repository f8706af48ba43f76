"""How the workers of one training run talk: sums and gathers over replicas of the data and over shards of the latents.

A run has data_parallel_size × n_shards workers. The workers of one replica (same data_rank) hold different latents and
see the same activations; the workers that hold the same latents (same shard_rank) see different activations. Worker
number data_rank · n_shards + shard_rank: the shards of a replica, which talk most, are neighbours.

A trainer is written once, for many workers, and `SINGLE` makes it an ordinary one:

- Every worker's loss is its replica's *share* of the loss of the whole batch: sums over its own rows divided by counts
  of all rows. Shares and their gradients are then summed over data, so one process with the whole batch gives the same.
- What is a ratio of two batch figures (the auxiliary loss) needs the figures summed over data before it is formed.
- Every worker must make the same calls in the same order, with tensors of the same shapes.
- Sums have one order, so they are reproducible and have the same bits on all workers: Gloo and NCCL both reduce a piece
  of a tensor along a fixed path of workers and hand out that one result.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 has a new name for it and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Communicator(Protocol):
    """Where this worker stands among the others, and what it can ask of them. Every method is a meeting of a group."""

    @property
    def data_parallel_size(self) -> int:
        """Replicas: how many parts each batch is split into."""
        ...

    @property
    def data_rank(self) -> int:
        """This worker's replica, 0 to data_parallel_size - 1."""
        ...

    @property
    def n_shards(self) -> int:
        """Parts that the latents are split into."""
        ...

    @property
    def shard_rank(self) -> int:
        """The shard of latents that this worker holds, 0 to n_shards - 1."""
        ...

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor, in place, by its sum over the replicas, and returns it. Not differentiable."""
        ...

    def max_over_data(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor, in place, by its elementwise maximum over the replicas, and returns it."""
        ...

    def min_over_data(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor, in place, by its elementwise minimum over the replicas, and returns it."""
        ...

    def gather_over_data(self, tensor: Tensor) -> Tensor:
        """[data_parallel_size, *shape]: every replica's tensor, in order. Not differentiable."""
        ...

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Sum over the shards of a replica; leaves its argument as it is.

        Differentiable: all shards compute the same loss from the sum, so the gradient of a summand is that of the sum.
        The caller sums the gradient of a tensor that all shards hold alike and use for different latents.
        """
        ...

    def gather_over_shards(self, tensor: Tensor) -> Tensor:
        """[n_shards, *shape]: every shard's tensor, in order. Not differentiable."""
        ...

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor, in place, on all workers by that of worker 0, and returns it."""
        ...


class SingleProcess:
    """One worker: every sum is the tensor itself."""

    data_parallel_size = 1
    data_rank = 0
    n_shards = 1
    shard_rank = 0

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        return tensor

    def max_over_data(self, tensor: Tensor) -> Tensor:
        return tensor

    def min_over_data(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_over_data(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_over_shards(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor


SINGLE: Communicator = SingleProcess()
"""The communicator of a run in one process."""


class ProcessGroupCommunicator:
    """Workers connected by torch.distributed: Gloo on CPU, NCCL on GPU. The process group must be initialised."""

    def __init__(self, n_shards: int = 1) -> None:
        """All workers of the process group call this at the same time.

        Raises:
            ValueError: the number of workers is not a multiple of n_shards.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        if n_shards < 1 or world % n_shards:
            raise ValueError(f"{world} workers cannot hold {n_shards} latent shards each in equal numbers of replicas")
        self.data_parallel_size, self.n_shards = world // n_shards, n_shards
        self.data_rank, self.shard_rank = divmod(rank, n_shards)
        # Every worker must take part in the making of every group, its own or not.
        data_groups = [dist.new_group(list(range(shard, world, n_shards))) for shard in range(n_shards)]
        shard_groups = [dist.new_group(list(range(first, first + n_shards))) for first in range(0, world, n_shards)]
        self._data_group, self._shard_group = data_groups[self.shard_rank], shard_groups[self.data_rank]

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_over_data(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def min_over_data(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def gather_over_data(self, tensor: Tensor) -> Tensor:
        return _gather(tensor, self._data_group, self.data_parallel_size)

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        if self.n_shards == 1:
            return tensor
        summed: Tensor = _SumOverGroup.apply(tensor, self._shard_group)  # type: ignore[no-untyped-call]
        return summed

    def gather_over_shards(self, tensor: Tensor) -> Tensor:
        return _gather(tensor, self._shard_group, self.n_shards)

    def broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0)
        return tensor

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.data_parallel_size > 1:
            dist.all_reduce(tensor, operation, group=self._data_group)
        return tensor


def _gather(tensor: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    if size == 1:
        return tensor[None]
    gathered = tensor.new_empty(size, *tensor.shape)
    # As bytes: Gloo does not know every type.
    _all_gather(gathered.view(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8), group=group)
    return gathered


class _SumOverGroup(torch.autograd.Function):
    """Forward: the sum over a group. Backward: identity, as all members have the gradient of the same loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        summed = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
