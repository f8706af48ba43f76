"""Measures generation against Hugging Face's `generate`, on this machine, as ratios taken in one run.

    python -m loadtests.generation --out build/generation.json        (also part of loadtests.bench)

Greedy decoding in float32. Every stream has two edits on every token: the feature that fires most often on its prompt
is ablated, and a random feature is added to. Speeds count sampled tokens; every arm also runs the prompts.

    generate_16_vs_hf_sequential  tokens/s of 16 concurrent edited streams over gRPC, divided by those of Hugging Face's
                                  `generate` with a forward hook for the same edits, one request at a time (hooked.py)
    generate_1_vs_hf              tokens/s of one edited stream over gRPC, divided by `generate`'s without hook or edits
    edit_cost                     time of 16 edited streams over gRPC divided by that without edits, minus 1
    generate_*_tokens_per_s       the speeds in the ratios
    mixed_*                       16 edited streams and extraction by 4 callers at once: the share that each keeps of
                                  its speed alone

Before measuring, both arms must give the same tokens.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from loadtests.hooked import HookedGenerator, HookEdit
from loadtests.load import timed
from sae_runtime import Backbone
from sae_runtime.dictionary.formats.published import read_manifest
from service.pb.saeserve.v1 import common_pb2, edits_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from service.pb.saeserve.v1 import intervention_service_pb2 as pb
from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceStub
from service.pb.saeserve.v1.intervention_service_pb2_grpc import InterventionServiceStub

STREAMS = 16
PROMPT_TOKENS = 32
NEW_TOKENS = 48
CHECKED_TOKENS = 8
MIXED_CALLERS = 4
PROMPTS = Path(__file__).resolve().parent / "prompts.jsonl"


class Repeats(NamedTuple):
    """Number of repetitions in a round."""

    pairs: int
    """Pairs of two arms, one right after the other. Other load on the machine moves an arm by more than the arms
    differ, but moves the median of many pairs less."""
    sequential: int
    """Requests of Hugging Face's arm."""


REPEATS = {"builtin": Repeats(pairs=15, sequential=4), "gpt2_shape": Repeats(pairs=5, sequential=2)}
"""A request of the larger shape takes seconds."""


class Request:
    """One stream: a prompt and its two edits."""

    def __init__(self, prompt: Sequence[int], dictionary: str, hooked: HookedGenerator, seed: int) -> None:
        z = hooked.latents(prompt)
        ablated = int((z > 0).sum(0).argmax())  # the feature that fires on the most tokens
        added_to = int(torch.randint(z.shape[1], (), generator=torch.Generator().manual_seed(seed)))
        strength = 2 * float(z.max())
        self.prompt = tuple(prompt)
        self.hook_edits = [HookEdit(ablated, 0.0, 0.0), HookEdit(added_to, 1.0, strength)]
        self.messages = [
            edits_pb2.Edit(dictionary=dictionary, feature=ablated, ablate=edits_pb2.ABLATION_ZERO),
            edits_pb2.Edit(dictionary=dictionary, feature=added_to, add=edits_pb2.Amount(value=strength)),
        ]

    def message(self, n: int, *, edited: bool = True) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            prompt=common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=self.prompt)),
            max_new_tokens=n,
            edits=self.messages if edited else [],
            ignore_end_of_text=True,
        )


async def stream(stub: Any, request: pb.GenerateRequest) -> list[int]:
    """The tokens of one call."""
    return [token async for reply in stub.Generate(request) for token in reply.chunk.token_ids]


async def over_grpc(address: str, requests: Sequence[pb.GenerateRequest]) -> list[list[int]]:
    """The tokens of all calls, which run at once."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InterventionServiceStub(channel)
        return await asyncio.gather(*(stream(stub, request) for request in requests))


def measure_generation(
    address: str, backbone_folder: Path, dictionary_folder: Path, rounds: int, repeats: Repeats
) -> dict[str, list[float]]:
    """The values of each figure, by name without the shape's suffix: one for every round or pair of arms.

    `address` is that of a service of these folders.
    """
    hooked = HookedGenerator(backbone_folder, dictionary_folder)
    backbone, dictionary = Backbone.load(backbone_folder), read_manifest(dictionary_folder).name
    texts = [json.loads(line)["text"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    rows = [ids for ids in (backbone.encode_text(text).ids for text in texts) if len(ids) >= PROMPT_TOKENS]
    # Prompts of different lengths, as requests are.
    requests = [Request(row[: PROMPT_TOKENS - i % 8], dictionary, hooked, i) for i, row in enumerate(rows[:STREAMS])]
    check_same_tokens(hooked, address, requests[:3])
    edited = [request.message(NEW_TOKENS) for request in requests]
    plain = [request.message(NEW_TOKENS, edited=False) for request in requests]

    def sequentially(*, edits: bool, count: int) -> None:
        for request in requests[:count]:
            hooked.generate(request.prompt, NEW_TOKENS, request.hook_edits if edits else ())

    arms: dict[str, tuple[int, Callable[[], object]]] = {
        "16_edited": (STREAMS, lambda: asyncio.run(over_grpc(address, edited))),
        "16_plain": (STREAMS, lambda: asyncio.run(over_grpc(address, plain))),
        "1_edited": (1, lambda: asyncio.run(over_grpc(address, edited[:1]))),
        "hf_sequential": (repeats.sequential, lambda: sequentially(edits=True, count=repeats.sequential)),
        "hf_plain": (1, lambda: sequentially(edits=False, count=1)),
    }
    arms["16_edited"][1]()  # a warm-up; the check has warmed up the other arms
    seconds: dict[str, list[float]] = {name: [] for name in arms}  # per token
    turns = [*(("16_edited", "16_plain"), ("1_edited", "hf_plain")) * repeats.pairs, ("hf_sequential",)]
    for i in range(rounds):
        for j, turn in enumerate(turns[i % len(turns) :] + turns[: i % len(turns)]):  # no arm is always first
            for name in turn if (i + j) % 2 else reversed(turn):
                seconds[name].append(timed(arms[name][1]) / (arms[name][0] * NEW_TOKENS))

    def ratios(numerator: str, denominator: str) -> list[float]:
        return [a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)]

    by_round = [seconds["16_edited"][i * repeats.pairs : (i + 1) * repeats.pairs] for i in range(rounds)]
    edited_means = list(map(statistics.mean, by_round))
    figures = {
        "generate_16_vs_hf_sequential": [a / b for a, b in zip(seconds["hf_sequential"], edited_means, strict=True)],
        "generate_1_vs_hf": ratios("hf_plain", "1_edited"),
        "edit_cost": [ratio - 1 for ratio in ratios("16_edited", "16_plain")],
    }
    for name, values in seconds.items():
        figures[f"generate_{name}_tokens_per_s"] = [1 / value for value in values]
    figures |= mixed_load(address, edited, [row[:64] for row in rows], dictionary)
    return figures


def mixed_load(
    address: str, streams: Sequence[pb.GenerateRequest], rows: Sequence[Sequence[int]], dictionary: str
) -> dict[str, list[float]]:
    """Generation and extraction at once: the share that each keeps of its speed alone."""
    extractions = [
        feature_pb.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=row))], dictionaries=[dictionary]
        )
        for row in rows
    ]

    async def extract_until(stop: asyncio.Event, stub: Any) -> int:
        n = 0
        while not stop.is_set():
            request = extractions[n % len(extractions)]
            await stub.ExtractFeatures(request)
            n += 1
        return n

    async def run(*, generate: bool, extract_s: float) -> tuple[float, float]:
        """Seconds that the streams took, and extraction replies a second while they ran, or for `extract_s` without."""
        async with grpc.aio.insecure_channel(address) as channel:
            stop = asyncio.Event()
            extraction = FeatureServiceStub(channel)
            callers = [
                asyncio.create_task(extract_until(stop, extraction)) for _ in range(MIXED_CALLERS if extract_s else 0)
            ]
            started = time.perf_counter()
            if generate:
                stub = InterventionServiceStub(channel)
                await asyncio.gather(*(stream(stub, request) for request in streams))
            else:
                await asyncio.sleep(extract_s)
            seconds = time.perf_counter() - started
            stop.set()
            replies = sum(await asyncio.gather(*callers))
            return seconds, replies / (time.perf_counter() - started)

    streams_alone, _ = asyncio.run(run(generate=True, extract_s=0))
    _, replies_alone = asyncio.run(run(generate=False, extract_s=min(5.0, streams_alone)))
    streams_mixed, replies_mixed = asyncio.run(run(generate=True, extract_s=1))
    return {
        "mixed_generate_share": [streams_alone / streams_mixed],
        "mixed_extract_share": [replies_mixed / replies_alone],
    }


def check_same_tokens(hooked: HookedGenerator, address: str, requests: Sequence[Request]) -> None:
    """AssertionError unless both arms sample the same tokens, that is, do the same work."""
    served = asyncio.run(over_grpc(address, [request.message(CHECKED_TOKENS) for request in requests]))
    for request, tokens in zip(requests, served, strict=True):
        expected = hooked.generate(request.prompt, CHECKED_TOKENS, request.hook_edits)
        assert tokens == expected, f"the service sampled {tokens}, Hugging Face {expected}"


def main() -> None:
    # Imported here, because loadtests.bench imports this module.
    from loadtests.bench import BUILTIN, Shape, running_service
    from loadtests.shapes import write_gpt2_shape

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/generation.json"), help="flat JSON: name to number")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every comparison")
    parser.add_argument("--shapes", nargs="+", choices=("builtin", "gpt2_shape"), default=["builtin", "gpt2_shape"])
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    numbers: dict[str, float] = {}
    console = Console()
    console.print(f"medians of {arguments.rounds} rounds on {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.shapes:
            if name == "builtin":
                folders = (BUILTIN / "backbone", BUILTIN / "dictionaries" / "resid-late")
            else:
                folders = write_gpt2_shape(Path(directory), BUILTIN / "backbone")
            shape = Shape(name, *folders, requests_per_round=0, latencies_per_round=0)
            with running_service(shape, arguments.out.with_name(f"generation-{name}.log")) as address:
                figures = measure_generation(address, *folders, arguments.rounds, REPEATS[name])
            for key, values in figures.items():
                numbers[f"{key}.{name}"] = statistics.median(values)
                console.print(f"{key}.{name}: {statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})")
    arguments.out.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
