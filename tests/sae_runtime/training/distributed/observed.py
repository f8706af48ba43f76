"""What tests look at in a sharded run: bytes exchanged, and tokens whose first offers were too few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sae_runtime.training.communicator import Communicator
from sae_runtime.training.distributed import sharded_topk_trainer
from sae_runtime.training.distributed.plan import Group, Meeting, Operation


@contextmanager
def saturated_tokens() -> Iterator[list[Tensor]]:
    """Gathers, for every choice over shards in the block, which tokens' first offers were too few to be certain."""
    seen: list[Tensor] = []
    choose = sharded_topk_trainer.choose_over_shards

    def watched(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keep, saturated = choose(*arguments, **options)
        seen.append(saturated)
        return keep, saturated

    sharded_topk_trainer.choose_over_shards = watched
    try:
        yield seen
    finally:
        sharded_topk_trainer.choose_over_shards = choose


class CountingCommunicator:
    """Does what the communicator inside does and adds up the payload of every meeting that leaves the process.

    The gradient of `sum_over_shards` needs no exchange; `broadcast` happens at the start of a run and is not counted.
    """

    def __init__(self, inside: Communicator) -> None:
        self._inside = inside
        self.data_parallel_size, self.data_rank = inside.data_parallel_size, inside.data_rank
        self.n_shards, self.shard_rank = inside.n_shards, inside.shard_rank
        self.payload: defaultdict[Meeting, int] = defaultdict(int)
        """Bytes of this worker's tensors by kind of meeting."""

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        self._count("reduce", "data", tensor)
        return self._inside.sum_over_data(tensor)

    def max_over_data(self, tensor: Tensor) -> Tensor:
        self._count("reduce", "data", tensor)
        return self._inside.max_over_data(tensor)

    def min_over_data(self, tensor: Tensor) -> Tensor:
        self._count("reduce", "data", tensor)
        return self._inside.min_over_data(tensor)

    def gather_over_data(self, tensor: Tensor) -> Tensor:
        self._count("gather", "data", tensor)
        return self._inside.gather_over_data(tensor)

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        self._count("reduce", "shards", tensor)
        return self._inside.sum_over_shards(tensor)

    def gather_over_shards(self, tensor: Tensor) -> Tensor:
        self._count("gather", "shards", tensor)
        return self._inside.gather_over_shards(tensor)

    def broadcast(self, tensor: Tensor) -> Tensor:
        return self._inside.broadcast(tensor)

    def _count(self, operation: Operation, group: Group, tensor: Tensor) -> None:
        if (self.data_parallel_size if group == "data" else self.n_shards) > 1:
            self.payload[Meeting(operation, group)] += tensor.numel() * tensor.element_size()
