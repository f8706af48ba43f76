"""Speed and memory of training steps on given batches: `python -m loadtests.trainers --help`.

Activations are synthetic: sums of 64 of 4,096 fixed random directions. They are good for measuring speed only; the
quality of a trained dictionary must be measured on real activations.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sae_runtime.training.config import FAMILIES, TrainingConfig
from sae_runtime.training.trainers import new_trainer


def synthetic_activations(n_tokens: int, d_in: int, seed: int) -> Tensor:
    """[n_tokens, d_in] float32."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4096, d_in, generator=generator) / d_in**0.5
    generator.manual_seed(seed + 1)
    chosen = torch.randint(4096, (n_tokens, 64), generator=generator)
    strengths = torch.rand(n_tokens, 64, generator=generator)
    return torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strengths, mode="sum")


def measure(config: TrainingConfig, d_in: int, *, steps: int, warm_up: int, dead_fraction: float) -> dict[str, float]:
    """Median tokens/s over `steps` steps, after `warm_up` uncounted ones, and the peak memory of the process in GiB.

    A random `dead_fraction` of the latents counts as dead throughout.
    """
    batch = config.batch_tokens
    trainer = new_trainer(config, d_in, synthetic_activations(min(8192, 4 * batch), d_in, 0))
    dead = torch.rand(trainer.n_latents, generator=torch.Generator().manual_seed(0)) < dead_fraction
    batches = [synthetic_activations(batch, d_in, seed) for seed in range(1, 5)]
    seconds = []
    for step in range(warm_up + steps):
        trainer.tokens_since_fired[dead] = config.dead_after_tokens
        start = time.perf_counter()
        metrics = trainer.step(batches[step % len(batches)])
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[warm_up:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens_per_second": round(batch / median, 1),
        "step_seconds": round(median, 4),
        "fastest_step_seconds": round(min(seconds[warm_up:]), 4),
        "peak_memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3),
        "l0": metrics.l0,
        "dead_fraction": metrics.dead_fraction,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures training steps on synthetic activations; prints JSON.")
    parser.add_argument("--family", choices=FAMILIES, default="topk")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--n-latents", type=int, default=32_768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-batch-tokens", type=int)
    parser.add_argument("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--dead-fraction", type=float, default=0.0)
    parser.add_argument("--multi-topk-coefficient", type=float, default=0.0)
    parser.add_argument("--ema-decay", type=float)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = vars(parser.parse_args())
    d_in, steps, warm_up = (arguments.pop(name) for name in ("d_in", "steps", "warm_up"))
    dead_fraction = arguments.pop("dead_fraction")
    config = TrainingConfig(
        site="0.resid_pre",
        data=(Path("unused"),),
        out=Path("none"),
        tokens=10**9,
        buffer_tokens=2 * arguments["batch_tokens"],
        dead_after_tokens=10**7,
        **arguments,
    )
    figures = measure(config, d_in, steps=steps, warm_up=warm_up, dead_fraction=dead_fraction)
    print(json.dumps({**arguments, "d_in": d_in, "threads": torch.get_num_threads(), **figures}))


if __name__ == "__main__":
    main()
