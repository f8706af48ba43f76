"""The plan of a run on given GPUs: how to split it, what fits, what it takes. See ../SCALING.md.

python -m sae_runtime.training.distributed.estimate --d-in 12288 --gpus 8 64 512
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sae_runtime.training.distributed.plan import RunShape, exchanges, persistent_bytes, step_bytes


@dataclass(frozen=True)
class Hardware:
    """A GPU and its network; H100 SXM in nodes of 8 by default, from its data sheet."""

    memory: float = 80e9
    """Bytes of device memory."""
    usable: float = 0.9
    """Share of the memory that a run may plan with: the rest is for PyTorch, NCCL and what the formulas leave out."""
    matrix_flops: float = 989e12
    """Dense bfloat16 products, per second."""
    matrix_efficiency: float = 0.4
    memory_bandwidth: float = 3.35e12
    """Bytes per second."""
    memory_efficiency: float = 0.6
    gpus_of_node: int = 8
    node_bandwidth: float = 450e9
    """Bytes per second and direction between the GPUs of a node (NVLink)."""
    network_bandwidth: float = 50e9
    """Bytes per second and direction and GPU between nodes (InfiniBand, 400 Gbit/s for each GPU)."""
    network_efficiency: float = 0.8


H100 = Hardware()


@dataclass(frozen=True)
class Estimate:
    """What one way of splitting a run takes."""

    shape: RunShape
    held: float
    """Bytes that a device needs, steps included."""
    sent: float
    """Bytes that a device sends in a step."""
    product_s: float
    """Seconds of the product x @ encoder in a step."""
    memory_s: float
    """Seconds of reading and writing device memory."""
    network_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step, nothing overlapped."""
        return self.product_s + self.memory_s + self.network_s


def estimate(shape: RunShape, hardware: Hardware = H100) -> Estimate:
    network = 0.0
    for line in exchanges(shape):
        within = line.meeting.group == "shards" and shape.n_shards <= hardware.gpus_of_node
        within |= shape.workers <= hardware.gpus_of_node
        bandwidth = hardware.node_bandwidth if within else hardware.network_bandwidth
        network += line.sent(shape) / (bandwidth * hardware.network_efficiency)
    product = 2.0 * shape.tokens_of_replica * shape.latents_of_shard * shape.d_in
    return Estimate(
        shape=shape,
        held=persistent_bytes(shape) + step_bytes(shape),
        sent=sum(line.sent(shape) for line in exchanges(shape)),
        product_s=product / (hardware.matrix_flops * hardware.matrix_efficiency),
        memory_s=memory_traffic(shape) / (hardware.memory_bandwidth * hardware.memory_efficiency),
        network_s=network,
    )


def memory_traffic(shape: RunShape) -> float:
    """Bytes that a step reads and writes in device memory: weights, pre-activations and the rows of chosen latents."""
    b, n, d = shape.tokens_of_replica, shape.latents_of_shard, shape.d_in
    weights = 2 * n * d * 4
    adam = 7 * weights  # reads weight, gradient and two moments; writes weight and two moments
    norm_and_clip = 3 * weights
    sphere = 5 * weights / 2  # the decoder: gradient along the sphere, and rows of norm 1
    micro_batches = -(-b // min(shape.micro_batch_tokens or b, b))
    gradients = micro_batches * 3 * weights if micro_batches > 1 else weights  # added up: read, read, write
    encoder_copy = n * d * (4 + shape.compute_bytes)
    pre_activations = 3 * b * n * shape.compute_bytes  # written, and read twice by the choice
    # A chosen latent's row is read for the reconstruction and its gradient; two rows of the batch for weight gradients.
    chosen = 4 * b * (shape.choices[-1] + shape.aux_chosen) / shape.n_shards * d * 4
    return adam + norm_and_clip + sphere + gradients + encoder_copy + pre_activations + chosen


def splits(shape: RunShape, workers: int) -> Iterator[RunShape]:
    """Every way to split the run over this many workers."""
    for n_shards in range(1, workers + 1):
        replicas = workers // n_shards
        if workers % n_shards == 0 and shape.n_latents % n_shards == 0 and shape.batch_tokens % workers == 0:
            dead = -(-shape.dead_latents // n_shards)
            yield replace(shape, n_shards=n_shards, data_parallel_size=replicas, dead_of_shard=dead)


def best_split(shape: RunShape, workers: int, hardware: Hardware = H100) -> Estimate | None:
    """The fastest split that fits the devices; None if none does."""
    usable = hardware.memory * hardware.usable
    fitting = [e for e in (estimate(split, hardware) for split in splits(shape, workers)) if e.held <= usable]
    return min(fitting, key=lambda e: e.step_s, default=None)


def most_latents(shape: RunShape, workers: int, hardware: Hardware = H100) -> int:
    """The largest power of two of latents that fits this many devices; 0 if none does."""
    sizes = (1 << power for power in range(30, 9, -1))
    fits = (n for n in sizes if n >= shape.k and best_split(_with_latents(shape, n), workers, hardware))
    return next(fits, 0)


def _with_latents(shape: RunShape, n_latents: int) -> RunShape:
    """The same share of them dead."""
    return replace(shape, n_latents=n_latents, dead_latents=shape.dead_latents * n_latents // shape.n_latents)


def table(shape: RunShape, workers: Sequence[int], tokens: float, hardware: Hardware = H100) -> str:
    """Markdown: a line for each number of GPUs."""
    lines = [
        "| GPUs | replicas × shards | memory per GPU | sent per step and GPU | product | memory | network | step "
        "| tokens/s | the run | most latents that fit |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in workers:
        most = f"2^{most_latents(shape, count, hardware).bit_length() - 1}"
        best = best_split(shape, count, hardware)
        if best is None:
            least = min((estimate(split, hardware).held for split in splits(shape, count)), default=float("nan"))
            lines.append(f"| {count} | does not fit | {least / 1e9:,.1f} GB at least | | | | | | | | {most} |")
            continue
        rate = shape.batch_tokens / best.step_s
        lines.append(
            f"| {count} | {best.shape.data_parallel_size} × {best.shape.n_shards} | {best.held / 1e9:.1f} GB "
            f"| {best.sent / 1e9:.2f} GB | {best.product_s:.2f} s | {best.memory_s:.2f} s | {best.network_s:.2f} s "
            f"| {best.step_s:.2f} s | {rate:,.0f} | {tokens / rate / 86400:.1f} days | {most} |"
        )
    return "\n".join(lines)


def exchange_table(shape: RunShape) -> str:
    """Markdown: a line for each exchange of a step."""
    lines = ["| exchange | between | payload | sent |", "| --- | --- | ---: | ---: |"]
    between = {"data": "replicas", "shards": "shards"}
    for line in exchanges(shape):
        payload, sent = line.payload / 1e6, line.sent(shape) / 1e6
        lines.append(f"| {line.what} | {between[line.meeting.group]} | {payload:,.3f} MB | {sent:,.3f} MB |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Memory, traffic and time of a sharded TopK run on H100 GPUs.")
    parser.add_argument("--n-latents", type=int, default=1 << 24, help="latents [%(default)s]")
    parser.add_argument("--d-in", type=int, default=12_288, help="width of the activations [%(default)s]")
    parser.add_argument("--k", type=int, default=256, help="latents of a token [%(default)s]")
    parser.add_argument("--batch-tokens", type=int, default=131_072, help="tokens of a step [%(default)s]")
    parser.add_argument("--micro-batch-tokens", type=int, default=8_192, help="of a replica at a time [%(default)s]")
    parser.add_argument("--aux-k", type=int, default=512, help="dead latents that model the residual [%(default)s]")
    parser.add_argument("--dead-fraction", type=float, default=0.07, help="share of dead latents [%(default)s]")
    parser.add_argument("--tokens", type=float, default=40e9, help="tokens of the run [%(default)s]")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="numbers of GPUs [8 64 512]")
    given = parser.parse_args(arguments)
    shape = RunShape(
        n_latents=given.n_latents,
        d_in=given.d_in,
        k=given.k,
        batch_tokens=given.batch_tokens,
        n_shards=1,
        data_parallel_size=1,
        aux_k=given.aux_k,
        dead_latents=round(given.dead_fraction * given.n_latents),
        micro_batch_tokens=given.micro_batch_tokens,
    )
    print(table(shape, given.gpus, given.tokens))
    for count in given.gpus:
        best = best_split(shape, count)
        if best is not None:
            print(f"\n{count} GPUs, {best.shape.data_parallel_size} replicas × {best.shape.n_shards} shards:\n")
            print(exchange_table(best.shape))


if __name__ == "__main__":
    main()
