"""What a sharded TopK run needs before it is started: memory per device, bytes on the wire per step, time per step.

The formulas count what `ShardedTopKTrainer` allocates and exchanges, and are compared with measured small runs in the
tests. Times are bounds of the hardware times an assumed efficiency: an estimate, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_runtime.training.choose_latents import TILE_ELEMENTS
from sae_runtime.training.distributed.choose_over_shards import expected_saturation, first_offer
from sae_runtime.training.trainers.topk import MULTI_TOPK_FACTOR

_FLOAT = 4

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


_SUM_SHARDS, _GATHER_SHARDS = Meeting("reduce", "shards"), Meeting("gather", "shards")
_SUM_DATA = Meeting("reduce", "data")
_SCALARS_TO_SUM = 4 * 8  # loss, NMSE, auxiliary NMSE and active latents, as float64


@dataclass(frozen=True)
class RunShape:
    """The numbers of a run that memory and traffic depend on."""

    n_latents: int
    d_in: int
    k: int
    batch_tokens: int
    """Of all replicas together."""
    n_shards: int
    data_parallel_size: int
    aux_k: int = 0
    dead_of_shard: int = 0
    """Dead latents of the shard that has most of them."""
    dead_latents: int = 0
    """Of all shards."""
    micro_batch_tokens: int | None = None
    """Tokens of a replica whose gradient is computed at a time; all if None."""
    compute_bytes: int = 2
    """Of a number in the product x @ encoder: 2 in bfloat16."""
    activation_bytes: int = 2
    """Of a number of the backbone's activations."""
    ema: bool = False
    multi_topk: bool = False
    """Whether tokens are reconstructed with 4·k latents as well."""
    offer_factor: float | None = None
    """Setting shard_offer_factor."""
    saturated: float | None = None
    """Share of tokens that need more than the first offers; as expected of latents spread at random if None."""

    @property
    def workers(self) -> int:
        return self.n_shards * self.data_parallel_size

    @property
    def latents_of_shard(self) -> int:
        return self.n_latents // self.n_shards

    @property
    def tokens_of_replica(self) -> int:
        return self.batch_tokens // self.data_parallel_size

    @property
    def parameters_of_shard(self) -> int:
        """Encoder and decoder rows, their biases, and pre_bias."""
        return 2 * self.latents_of_shard * self.d_in + self.latents_of_shard + self.d_in

    @property
    def choices(self) -> tuple[int, ...]:
        """Numbers of latents that are chosen over all shards, for each token."""
        return (self.k, min(MULTI_TOPK_FACTOR * self.k, self.n_latents)) if self.multi_topk else (self.k,)

    @property
    def offer_width(self) -> int:
        """Latents of a token that a shard has in hand."""
        return min(self.choices[-1], self.latents_of_shard)

    @property
    def aux_chosen(self) -> int:
        """Dead latents of a token that are chosen over all shards."""
        return min(self.aux_k, self.dead_latents)

    @property
    def aux_width(self) -> int:
        """Dead latents of a token that each shard has in hand."""
        return min(self.aux_chosen, self.dead_of_shard)

    def offers(self, k: int, width: int) -> tuple[int, float]:
        """Of `width` latents of a token in a shard's hands: those offered first, and those offered later on average."""
        first = min(first_offer(k, self.n_shards, self.offer_factor), width)
        if first == width:
            return first, 0.0
        share = self.saturated if self.saturated is not None else expected_saturation(k, self.n_shards, first)
        return first, share * (width - first)


def persistent_bytes(shape: RunShape) -> int:
    """Bytes that a worker keeps between steps: parameters, Adam's moments and step counts, averages, dead counters."""
    copies = 4 if shape.ema else 3
    steps = 4 * _FLOAT  # one number for each of the four parameters
    return copies * _FLOAT * shape.parameters_of_shard + steps + 8 * shape.latents_of_shard


def step_bytes(shape: RunShape) -> int:
    """Bytes that a step needs on top at its fullest; within some percent, as PyTorch's temporaries are not all counted.

    The backbone's and the data's memory is not in it.
    """
    n, d, b = shape.latents_of_shard, shape.d_in, shape.tokens_of_replica
    micro = min(shape.micro_batch_tokens or b, b)
    gradients = _FLOAT * shape.parameters_of_shard
    copied = shape.compute_bytes if shape.compute_bytes != _FLOAT else 0  # of a number of what is multiplied
    encoder_copy = copied * n * (d + 1)
    batch = 2 * _FLOAT * b * d  # input and residual
    # Of a micro-batch: centred input, part and whole reconstruction, their difference and its gradient.
    of_micro_batch = 5 * _FLOAT * micro * d
    offers = _offer_bytes(shape, shape.choices[-1], shape.offer_width, micro)
    # A micro-batch's gradient of the encoder or the decoder, before it is added to that of those before it.
    being_added = _FLOAT * n * d if micro < b else 0
    pre_activations = min(micro, max(1, TILE_ELEMENTS // n)) * n * shape.compute_bytes
    at_choosing = pre_activations + (gradients if micro < b else 0)
    main = encoder_copy + offers + max(at_choosing, gradients + being_added)
    # Copies of the dead latents' weights and their gradients, and one of a later micro-batch that is being added.
    of_dead = ((5 if micro < b else 4) * _FLOAT + shape.compute_bytes) * shape.dead_of_shard * d
    auxiliary = gradients + of_dead + _offer_bytes(shape, shape.aux_chosen, shape.aux_width, micro)
    return batch + of_micro_batch + max(main, auxiliary if shape.aux_chosen else 0)


def _offer_bytes(shape: RunShape, k: int, width: int, n_tokens: int) -> int:
    """Offers of a shard with their indices, and the first offers of all."""
    return n_tokens * (width * (_FLOAT + 8) + shape.n_shards * shape.offers(k, width)[0] * _FLOAT)


@dataclass(frozen=True)
class Exchange:
    """One line of what a worker exchanges in a step."""

    what: str
    meeting: Meeting
    payload: float
    """Bytes of this worker's tensors."""

    def sent(self, shape: RunShape) -> float:
        """Bytes that the worker sends."""
        size = shape.n_shards if self.meeting.group == "shards" else shape.data_parallel_size
        return bytes_sent(self.meeting, self.payload, size)


def exchanges(shape: RunShape, *, read_together: bool = True) -> list[Exchange]:
    """What a worker exchanges in one step; nothing where a group has one member.

    Args:
        read_together: the shards of a replica read a part of its tokens each and gather the activations.
    """
    b, d = shape.tokens_of_replica, shape.d_in
    offered = [shape.offers(k, shape.offer_width) for k in shape.choices]
    aux_first, aux_rest = shape.offers(shape.aux_chosen, shape.aux_width)
    lines = [
        Exchange("first offers", _GATHER_SHARDS, b * sum(first for first, _ in offered) * _FLOAT),
        Exchange("offers of saturated tokens", _GATHER_SHARDS, b * sum(rest for _, rest in offered) * _FLOAT),
        Exchange("reconstructions", _SUM_SHARDS, b * d * _FLOAT * len(shape.choices)),
        # pre_bias, gradient norm, active latents, number of dead latents
        Exchange("small sums over shards", _SUM_SHARDS, d * _FLOAT + _FLOAT + _FLOAT + 8),
        Exchange("gradients", _SUM_DATA, shape.parameters_of_shard * _FLOAT),
        Exchange("latents that fired", _SUM_DATA, shape.latents_of_shard),
        Exchange("figures", _SUM_DATA, _SCALARS_TO_SUM),
        Exchange("number of dead latents", _GATHER_SHARDS, 8),
    ]
    if read_together:
        payload = b // shape.n_shards * d * shape.activation_bytes
        lines.append(Exchange("activations", _GATHER_SHARDS, payload))
    if shape.aux_chosen:
        lines += [
            Exchange("offers of dead latents", _GATHER_SHARDS, b * (aux_first + aux_rest) * _FLOAT),
            Exchange("models of the residual", _SUM_SHARDS, b * d * _FLOAT),
            Exchange("mean and variance of the residual", _SUM_DATA, d * _FLOAT + _FLOAT),
        ]
    sizes = {"shards": shape.n_shards, "data": shape.data_parallel_size}
    return [line for line in lines if sizes[line.meeting.group] > 1 and line.payload]
