"""What a run puts on the wire: a communicator that counts, and what a counted byte costs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sae_runtime.training.communicator import Communicator

Operation = Literal["reduce", "gather"]
Group = Literal["data", "shards"]


@dataclass(frozen=True)
class Meeting:
    """A kind of exchange."""

    operation: Operation
    """reduce: everyone ends with the sum (or maximum) of all tensors; gather: with all tensors."""
    group: Group
    """Between the replicas of a shard, or the shards of a replica."""


def bytes_sent(meeting: Meeting, payload: float, size: int) -> float:
    """Bytes that a worker sends when `size` workers meet with `payload` bytes each, along a ring.

    A reduction passes every piece round twice, (size - 1) / size of the payload each time: once to sum, once to hand
    out. A gathering passes every worker's tensor to all others.
    """
    if meeting.operation == "reduce":
        return 2 * (size - 1) / size * payload
    return (size - 1) * payload


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
