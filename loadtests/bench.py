"""Measures the service against bare PyTorch, on this machine, as ratios taken in one run.

    python -m loadtests.bench --out build/bench.json

For the builtin model and for a random model of GPT-2 small's shape (32,768 latents, k 32, read at layer 8) it starts
`saeserve serve` on free loopback ports and compares, in interleaved rounds over the same requests:

    extract_vs_bare        tokens/s of ExtractFeatures at concurrency 16 over gRPC, divided by those of hand-written
                           PyTorch on the same requests in padded batches of 16 (Hugging Face's GPT-2, F.linear, topk)
    extract_vs_sequential  the same tokens/s, divided by those of a plain gRPC server that runs the same PyTorch code on
                           one request at a time (sequential_server.py), under the same load of 16 callers
    latency_over_forward_ms  median over requests of the latency of a single caller who sends one request after the
                           other, minus the time of the PyTorch code for the same text

generation.py compares generation with Hugging Face's `generate`.

The service tokenizes, selects, and answers in protobuf; the PyTorch code starts from token ids and ends with tensors.
The client runs on the same cores as the service. Every figure is a median over rounds; the table also shows the range.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from loadtests.bare import BareExtractor
from loadtests.generation import REPEATS, measure_generation
from loadtests.kernels import measure_tiled_topk
from loadtests.load import SETTLE_S, closed_loop, timed
from loadtests.shapes import write_gpt2_shape
from sae_runtime.dictionary.formats.published import read_manifest
from service.client import Client
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceStub
from service.ports import free_ports

BUILTIN = Path(__file__).resolve().parent.parent / "sae_runtime" / "builtin"
PROMPTS = Path(__file__).resolve().parent / "prompts.jsonl"
CONCURRENCY = 16
GENERATION_ROUNDS = 3
LATENCY_BLOCK = 8


@dataclass(frozen=True)
class Shape:
    """One model to measure on, and the amount of work in a round."""

    name: str
    backbone: Path
    dictionary: Path
    requests_per_round: int
    latencies_per_round: int


@dataclass(frozen=True)
class Figure:
    """A median and the values that it is taken from."""

    value: float
    samples: list[float]

    @classmethod
    def median_of(cls, samples: Sequence[float]) -> "Figure":
        return cls(statistics.median(samples), list(samples))


@contextlib.contextmanager
def running_service(shape: Shape, log: Path) -> Iterator[str]:
    """`saeserve serve` on free loopback ports; yields the gRPC address, then interrupts it and waits.

    Raises:
        RuntimeError: the service did not become ready; the message has the end of its output.
    """
    grpc_port, http_port = free_ports(2)
    settings = {
        "grpc_port": grpc_port,
        "http_port": http_port,
        "backbone": str(shape.backbone),
        "dictionaries": [str(shape.dictionary)],
    }
    with tempfile.TemporaryDirectory() as directory, log.open("w") as output:
        config = Path(directory) / "serve.yaml"
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "service.cli", "serve", "--config", str(config)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            address = f"127.0.0.1:{grpc_port}"
            with Client(address) as client:
                deadline = time.monotonic() + 120
                while not client.is_healthy():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"the service did not start:\n{log.read_text()[-2000:]}")
                    time.sleep(0.2)
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


@contextlib.contextmanager
def sequential_server(shape: Shape) -> Iterator[str]:
    """sequential_server.py on a free loopback port; yields its address."""
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "loadtests.sequential_server",
        str(shape.backbone),
        str(shape.dictionary),
        str(port),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=10)


def measure(shape: Shape, address: str, rounds: int) -> dict[str, Figure]:
    """The figures of the module's docstring, by name without the shape's suffix, from a service of the shape."""
    manifest = read_manifest(shape.dictionary)
    bare = BareExtractor(shape.backbone, shape.dictionary)
    texts = [json.loads(line)["text"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    texts = texts[: shape.requests_per_round * rounds]
    with sequential_server(shape) as sequential:
        requests = [
            pb.ExtractFeaturesRequest(inputs=[common_pb2.TextInput(text=text)], dictionaries=[manifest.name])
            for text in texts
        ]
        rows = token_rows(address, texts, manifest.name)
        check_same_features(bare, address, requests[:4], rows[:4])
        warm_up = slice(0, 2 * CONCURRENCY)
        for server in (address, sequential):
            asyncio.run(closed_loop(server, requests[warm_up], CONCURRENCY))
        bare.extract(rows[:CONCURRENCY])

        speeds: dict[str, list[float]] = {"service": [], "bare": [], "sequential": []}
        latency_over_forward_ms: list[float] = []
        for i in range(rounds):
            this_round = slice(i * shape.requests_per_round, (i + 1) * shape.requests_per_round)
            round_rows, round_requests = rows[this_round], requests[this_round]
            arms: dict[str, Callable[[], object]] = {
                "service": lambda r=round_requests: asyncio.run(closed_loop(address, r, CONCURRENCY)),
                "bare": lambda r=round_rows: [
                    bare.extract(r[j : j + CONCURRENCY]) for j in range(0, len(r), CONCURRENCY)
                ],
                "sequential": lambda r=round_requests: asyncio.run(closed_loop(sequential, r, CONCURRENCY)),
            }
            n_tokens = sum(map(len, round_rows))
            for name in sorted(arms, key=lambda name: (list(arms).index(name) + i) % 3):  # no arm is always first
                speeds[name].append(n_tokens / timed(arms[name]))
            alone = slice(this_round.start, this_round.start + shape.latencies_per_round)
            latency_over_forward_ms += measure_latency(bare, address, requests[alone], rows[alone])

    def ratio(over: str) -> Figure:
        return Figure.median_of([a / b for a, b in zip(speeds["service"], speeds[over], strict=True)])

    return {
        "extract_vs_bare": ratio("bare"),
        "extract_vs_sequential": ratio("sequential"),
        "latency_over_forward_ms": Figure.median_of(latency_over_forward_ms),
        "extract_tokens_per_s": Figure.median_of(speeds["service"]),
        "bare_tokens_per_s": Figure.median_of(speeds["bare"]),
        "sequential_tokens_per_s": Figure.median_of(speeds["sequential"]),
    }


def measure_latency(
    bare: BareExtractor,
    address: str,
    requests: Sequence[pb.ExtractFeaturesRequest],
    rows: Sequence[Sequence[int]],
) -> list[float]:
    """For each request, the latency of a single caller without pauses, minus the forward pass of the same text, in ms.

    Both run in blocks, so that they meet the same conditions, and idle threads of one do not spin while the other runs.
    """
    over_ms: list[float] = []
    with grpc.insecure_channel(address) as channel:
        stub = FeatureServiceStub(channel)
        for start in range(0, len(requests), LATENCY_BLOCK):
            block = range(start, min(start + LATENCY_BLOCK, len(requests)))
            time.sleep(SETTLE_S)
            bare.extract([rows[start]])
            forward = [timed(lambda i=i: bare.extract([rows[i]]), 0) for i in block]
            time.sleep(SETTLE_S)
            stub.ExtractFeatures(requests[start])
            latency = [timed(lambda i=i: stub.ExtractFeatures(requests[i]), 0) for i in block]
            over_ms += [1e3 * (a - b) for a, b in zip(latency, forward, strict=True)]
    return over_ms


def token_rows(address: str, texts: Sequence[str], dictionary: str) -> list[list[int]]:
    """Token ids of each text, as the service sees them."""
    rows: list[list[int]] = []
    with Client(address) as client:
        for start in range(0, len(texts), 8):
            result = client.extract_features(
                list(texts[start : start + 8]), dictionaries=[dictionary], top_k=1, aggregation="max", tokens=True
            )
            rows += [entry.tokens.ids.tolist() for entry in result.inputs]
    return rows


def check_same_features(
    bare: BareExtractor, address: str, requests: Sequence[pb.ExtractFeaturesRequest], rows: Sequence[Sequence[int]]
) -> None:
    """AssertionError unless both arms give the same activations, that is, do the same work."""
    replies = asyncio.run(closed_loop(address, requests, len(requests))).replies
    served = [value for reply in replies for value in reply.results[0].dictionaries[0].features.values]
    values, _ = bare.extract(rows)
    expected = values[values > 0]
    torch.testing.assert_close(torch.tensor(served), expected, atol=1e-3, rtol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="flat JSON: name to number")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of every comparison")
    parser.add_argument("--shapes", nargs="+", choices=("builtin", "gpt2_shape"), default=["builtin", "gpt2_shape"])
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    numbers: dict[str, float] = {}
    table = Table(title=f"medians of {arguments.rounds} rounds on {os.cpu_count()} cores, {torch.__version__}")
    for column in ("figure", "value", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.shapes:
            if name == "builtin":
                shape = Shape(name, BUILTIN / "backbone", BUILTIN / "dictionaries" / "resid-late", 192, 40)
            else:
                folders = write_gpt2_shape(Path(directory), BUILTIN / "backbone")
                shape = Shape(name, *folders, requests_per_round=32, latencies_per_round=4)
            with running_service(shape, arguments.out.with_name(f"bench-{name}.log")) as address:
                figures = measure(shape, address, arguments.rounds)
                generation = measure_generation(
                    address, shape.backbone, shape.dictionary, GENERATION_ROUNDS, REPEATS[name]
                )
            figures |= {key: Figure.median_of(values) for key, values in generation.items()}
            for key, figure in figures.items():
                numbers[f"{key}.{name}"] = figure.value
                table.add_row(
                    f"{key}.{name}", *(f"{v:.4g}" for v in (figure.value, min(figure.samples), max(figure.samples)))
                )
    for key, value in measure_tiled_topk().items():
        numbers[key] = value
        table.add_row(key, f"{value:.4g}", "", "")
    arguments.out.write_text(json.dumps(numbers, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
