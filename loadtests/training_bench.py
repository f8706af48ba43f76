"""Measures the trainers against those of other projects: `make bench-training`, or

    python -m loadtests.training_bench --out build/bench-training.json [--only speed|quality] [--families topk ...]

Peers are SAELens and dictionary_learning, installed from the package registry into build/peers, which nothing else
uses. Every arm runs in its own process (training_arm.py), on the same activations.

speed    TopK at d 768, n 32,768, k 32. Arms take turns in every round. tokens/s are those of the median step. Memory is
         the peak resident set minus that before the trainer existed. Runs are in float32 (the peers' default) and in
         bfloat16 autocast; each is compared with the better peer in the same precision.
quality  every family on the same number of activations of the builtin model (resid-mid's site): NMSE, L0 and dead
         fraction of the served dictionary on held-out activations. Each arm tries the default learning rate of its
         project and higher ones, and keeps the best run; ours keeps the best of the runs with no more dead latents than
         any peer's run at that L0. For all families but TopK the L0 as served is made equal: the knob (k, or a peer's
         penalty) is moved by secants, and the NMSE is interpolated between the two nearest runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sae_runtime import Backbone, load_dictionary
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.run_rows import held_out_rows
from sae_runtime.training.activations.source import open_activation_source
from sae_runtime.training.config import TrainingConfig

PEERS = ("saelens", "dictionary_learning")
PEER_PACKAGES = ("sae-lens==6.54.12", "dictionary-learning==0.1.0")
CHOOSING = ("topk", "batch_topk", "matryoshka")
FAMILIES = (*CHOOSING, "relu", "relu_decoder_norm", "jumprelu", "gated")
SPEED = {"d": 768, "n_latents": 32_768, "k": 32, "batch": 2048, "steps": 7, "warm_up": 2}
RATE_FACTORS = (1.0, 1.75, 2.5)  # of the default learning rate, which every arm tries
MORE_RATE_FACTORS = {"jumprelu": (10.0,)}  # thresholds move by the learning rate, and have few steps to do it in
DEAD_AFTER_SHARE = 20  # to every trainer, a latent is dead if it did not fire for 1/20 of the run
L0_TOLERANCE = 0.1
SEARCH_RUNS = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of the comparison of quality."""

    n_latents: int
    k: int
    batch: int
    steps: int
    held_out: int = 16_384


def install_peers(folder: Path) -> Path:
    """The Python of an environment with the peers, which is made if it does not exist."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    modules = "sae_lens", "dictionary_learning"
    if subprocess.run([python, "-c", f"import {', '.join(modules)}"], capture_output=True).returncode:
        torch_version = torch.__version__.partition("+")[0]
        install = [python, "-m", "pip", "install", "--quiet", f"torch=={torch_version}", *PEER_PACKAGES]
        subprocess.run(install, check=True)
        # If the torchvision that is installed with them does not fit a CPU build of torch, importing them fails.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    return python


def run_arm(spec: dict[str, Any], peers: Path) -> dict[str, float]:
    """Figures of one arm; if it fails, RuntimeError with the end of its output."""
    python = sys.executable if spec["project"] == "saeserve" else str(peers)
    command = [python, "-m", "loadtests.training_arm", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{spec['project']} {spec['family']} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


# Speed


def write_speed_activations(path: Path, tokens: int, d: int) -> None:
    """Writes float32 [tokens, d]: sparse sums of random directions with noise, as dictionaries assume."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(4 * d, d)).astype(np.float32) / math.sqrt(d)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(tokens, d))
    for start in range(0, tokens, 2048):
        shape = (min(2048, tokens - start), 4 * d)
        latents = generator.exponential(size=shape) * (generator.random(shape) < 32 / (4 * d))
        rows[start : start + 2048] = latents.astype(np.float32) @ directions
        rows[start : start + 2048] += 0.05 * generator.normal(size=(shape[0], d))
    rows.flush()


def measure_speed(peers: Path, folder: Path, rounds: int) -> dict[str, float]:
    """tokens/s and peak memory of every arm, and ratios to the better peer."""
    activations = folder / "speed.npy"
    write_speed_activations(activations, SPEED["batch"] * (SPEED["steps"] + 1) + 32_768, SPEED["d"])
    arms = [(project, dtype) for dtype in ("float32", "bfloat16") for project in ("saeserve", *PEERS)]
    speeds: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    memory: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for project, dtype in arms:
            sizes = {name: SPEED[name] for name in ("n_latents", "k", "batch", "steps", "warm_up")}
            spec = {"project": project, "family": "topk", "activations": str(activations), "dtype": dtype, **sizes}
            # dictionary_learning refuses its default warm-up, which is longer than the run.
            settings = {"warmup_steps": 1} if project == "dictionary_learning" else {}
            figures = run_arm(
                spec | {"seed": 0, "settings": settings, "held_out": 0, "dead_after_tokens": 10**7}, peers
            )
            speeds[project, dtype].append(figures["tokens_per_s"])
            memory[project, dtype].append(figures["peak_mb"])
            print(f"{project} {dtype}: {figures['tokens_per_s']:.0f} tokens/s, {figures['peak_mb']:.0f} MB", flush=True)
    numbers: dict[str, float] = {}
    for dtype, suffix in (("float32", ""), ("bfloat16", ".bfloat16")):
        best = [max(pair) for pair in zip(*(speeds[peer, dtype] for peer in PEERS), strict=True)]
        least = [min(pair) for pair in zip(*(memory[peer, dtype] for peer in PEERS), strict=True)]
        ours = speeds["saeserve", dtype], memory["saeserve", dtype]
        numbers[f"train_vs_best_peer{suffix}"] = statistics.median(a / b for a, b in zip(ours[0], best, strict=True))
        numbers[f"train_memory_vs_best_peer{suffix}"] = statistics.median(
            a / b for a, b in zip(ours[1], least, strict=True)
        )
    for (project, dtype), values in speeds.items():
        numbers[f"train_tokens_per_s.{project}.{dtype}"] = statistics.median(values)
        numbers[f"train_peak_mb.{project}.{dtype}"] = statistics.median(memory[project, dtype])
    return numbers


# Quality


def write_builtin_activations(path: Path, data: Sequence[Path], tokens: int, held_out: int) -> None:
    """Writes shuffled activations of the builtin model at resid-mid's site; the last ones are of held-out text."""
    manifest = load_dictionary("resid-mid").manifest
    assert manifest is not None
    site = Site.parse(manifest.site)
    backbone = Backbone.load()
    config = TrainingConfig(
        site=str(site), data=tuple(data), out=Path("unused"), backbone_dtype="float32", held_out_fraction=0.08
    )
    source = open_activation_source(config, backbone, [site])
    rows = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(tokens + held_out, backbone.site_width(site))
    )
    for start in range(0, tokens, 2048):
        stop = min(tokens, start + 2048)
        rows[start:stop] = source.next_batch(2048)[site][: stop - start].numpy()
    source.close()
    done = tokens
    for row in held_out_rows(config, backbone, held_out):
        activations = backbone.forward(PackedTokens.from_rows([row]), capture=[site]).activations[site]
        activations = activations[: tokens + held_out - done]
        rows[done : done + len(activations)] = activations.detach().numpy()
        done += len(activations)
    if done < tokens + held_out:
        raise ValueError(f"the text has {done - tokens} held-out tokens, but {held_out} are needed")
    rows.flush()


def settings_of(project: str, family: str, sizes: Sizes, rate_factor: float) -> tuple[dict[str, Any], float]:
    """An arm's settings for a run of this length, and the first value of its knob (0: it has none)."""
    rise, n = sizes.steps // 20, sizes.n_latents
    k = 0.0 if family == "topk" else float(sizes.k)
    if project == "saeserve":
        rate = rate_factor * 5e-4 / math.sqrt(n / 2**14)
        return {"learning_rate": rate, "warmup_steps": rise}, k
    if project == "saelens":
        settings: dict[str, Any] = {
            "lr": rate_factor * 3e-4,
            "lr_warm_up_steps": rise,
            "lr_decay_steps": sizes.steps // 4,
        }
        if family == "matryoshka":
            settings["matryoshka_widths"] = [n // 32, n // 16, n // 8, n // 4, n // 2, n]
        if family in ("relu", "gated"):
            return settings | {"l1_warm_up_steps": rise}, 1.0
        return (settings | {"l0_warm_up_steps": rise}, 1.0) if family == "jumprelu" else (settings, k)
    default = {"relu": 1e-3, "relu_decoder_norm": 1e-3, "jumprelu": 7e-5, "gated": 5e-5}
    settings = {
        "lr": rate_factor * default.get(family, 2e-4 / math.sqrt(n / 2**14)),
        "warmup_steps": rise,
        "decay_start": sizes.steps * 3 // 4,
    }
    if family in CHOOSING:
        settings["threshold_start_step"] = sizes.steps // 4
        if family == "matryoshka":
            settings["group_fractions"] = [1 / 32, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
        return settings, k
    settings["sparsity_warmup_steps"] = rise
    if family == "jumprelu":
        return settings | {"target_l0": float(sizes.k)}, 1.0
    return settings, 0.1


def turns_k(project: str, family: str) -> bool:
    """Whether k sets an arm's sparsity, rather than a penalty."""
    return project == "saeserve" or family in CHOOSING


def with_knob(project: str, family: str, settings: dict[str, Any], knob: float) -> dict[str, Any]:
    """The settings with the penalty set to `knob`, if the penalty is the knob."""
    if turns_k(project, family):
        return settings
    if project == "saelens":
        return settings | {"l0_coefficient" if family == "jumprelu" else "l1_coefficient": knob}
    return settings | {"sparsity_penalty" if family == "jumprelu" else "l1_penalty": knob}


def outcomes_of(project: str, family: str, sizes: Sizes, activations: Path, peers: Path) -> list[dict[str, float]]:
    """NMSE, L0 and dead fraction of an arm at L0 = k, with each of its learning rates."""
    outcomes = []
    for rate_factor in (*RATE_FACTORS, *MORE_RATE_FACTORS.get(family, ())):
        settings, knob = settings_of(project, family, sizes, rate_factor)
        spec: dict[str, Any] = {
            "project": project,
            "family": family,
            "activations": str(activations),
            "dtype": "float32",
            "n_latents": sizes.n_latents,
            "k": sizes.k,
            "batch": sizes.batch,
            "steps": sizes.steps,
            "warm_up": 2,
            "seed": 0,
            "held_out": sizes.held_out,
            "dead_after_tokens": sizes.batch * sizes.steps // DEAD_AFTER_SHARE,
        }
        runs = []
        for _ in range(SEARCH_RUNS if knob else 1):
            k = {"k": max(1, round(knob))} if knob and turns_k(project, family) else {}
            figures = run_arm(spec | k | {"settings": with_knob(project, family, settings, knob)}, peers)
            runs.append((knob, figures))
            print(f"  {project} {family} x{rate_factor:g} knob {knob:.4g}: {_shown(figures)}", flush=True)
            if abs(figures["l0"] / sizes.k - 1) <= L0_TOLERANCE / 4 or not knob:
                break
            knob = next_knob(runs, sizes.k, falls=not turns_k(project, family))
        outcomes.append(at_l0([figures for _, figures in runs], sizes.k))
    return outcomes


def best(outcomes: Sequence[dict[str, float]], most_dead: float = 1.0) -> dict[str, float]:
    """The outcome with the least NMSE, preferring those at the target L0, and then those with few dead latents."""

    def rank(outcome: dict[str, float]) -> tuple[bool, bool, float]:
        return not outcome["l0_met"], outcome["dead_fraction"] > most_dead + 1e-9, outcome["nmse"]

    return min(outcomes, key=rank)


def next_knob(runs: Sequence[tuple[float, dict[str, float]]], target: float, *, falls: bool) -> float:
    """The knob at which L0 should be the target: a secant step in logarithms, by a factor of at most 10.

    `falls`: L0 falls as the knob rises. The slope d log L0 / d log knob is that of the last two runs, or 1 or -1 if
    there is one run, or if they have nearly the same L0 or the wrong sign.
    """
    (knob, last), slope = runs[-1], -1.0 if falls else 1.0
    if len(runs) > 1:
        previous_knob, previous = runs[-2]
        change = math.log(knob / previous_knob)
        secant = math.log(max(last["l0"], 0.1) / max(previous["l0"], 0.1)) / change if change else 0.0
        slope = secant if secant * slope > 0.2 else slope
    step = math.log(target / max(last["l0"], 0.1)) / slope
    return knob * math.exp(max(-math.log(10), min(math.log(10), step)))


def at_l0(runs: Sequence[dict[str, float]], target: float) -> dict[str, float]:
    """Figures at the target L0: interpolated between the nearest runs on both sides, or those of the nearest run."""
    below = [run for run in runs if 0 < run["l0"] <= target]
    above = [run for run in runs if run["l0"] > target]
    nearest = min(runs, key=lambda run: abs(math.log(max(run["l0"], 0.1) / target)))
    if abs(nearest["l0"] / target - 1) > L0_TOLERANCE / 4 and below and above:
        low, high = max(below, key=lambda run: run["l0"]), min(above, key=lambda run: run["l0"])
        share = math.log(target / low["l0"]) / math.log(high["l0"] / low["l0"])
        between = {name: low[name] + share * (high[name] - low[name]) for name in ("nmse", "dead_fraction")}
        return between | {"l0": target, "l0_met": 1.0}
    met = abs(nearest["l0"] / target - 1) <= L0_TOLERANCE
    return {name: nearest[name] for name in ("nmse", "l0", "dead_fraction")} | {"l0_met": float(met)}


def measure_quality(
    peers: Path, folder: Path, data: Sequence[Path], sizes: Sizes, families: Sequence[str]
) -> dict[str, float]:
    """NMSE, L0 and dead fraction by family and project.

    `train_nmse_vs_best_peer.<family>` is below 1 if our NMSE is below both peers'.
    `train_dead_above_least_peer.<family>` is our dead fraction minus the least of all the peers' runs.
    """
    activations = folder / "quality.npy"
    write_builtin_activations(activations, data, sizes.batch * sizes.steps, sizes.held_out)
    numbers: dict[str, float] = {}
    for family in families:
        peers_at_l0: list[dict[str, float]] = []  # the peers' outcomes at the target L0
        for project in (*PEERS, "saeserve"):
            if project == "saelens" and family == "relu_decoder_norm":
                continue
            outcomes = outcomes_of(project, family, sizes, activations, peers)
            least_dead = min((peer["dead_fraction"] for peer in peers_at_l0), default=1.0)
            figures = best(outcomes, least_dead if project == "saeserve" else 1.0)
            print(f"{family} {project}: {_shown(figures)}", flush=True)
            for name, value in figures.items():
                numbers[f"quality_{name}.{family}.{project}"] = value
            if project != "saeserve":
                peers_at_l0 += [outcome for outcome in outcomes if outcome["l0_met"]]
            elif peers_at_l0:
                least_nmse = min(peer["nmse"] for peer in peers_at_l0)
                numbers[f"train_nmse_vs_best_peer.{family}"] = figures["nmse"] / least_nmse
                numbers[f"train_dead_above_least_peer.{family}"] = figures["dead_fraction"] - least_dead
    return numbers


def _shown(figures: dict[str, float]) -> str:
    return f"NMSE {figures['nmse']:.4f}, L0 {figures['l0']:.1f}, dead {100 * figures['dead_fraction']:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench-training.json"), help="flat JSON: name to number")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="the peers' environment")
    parser.add_argument("--only", choices=("speed", "quality"), help="one of the two")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the speed comparison")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="for quality")
    parser.add_argument("--data", nargs="+", type=Path, help="text for quality; the shipped held-out text if not given")
    parser.add_argument("--n-latents", type=int, default=2048, help="for quality")
    parser.add_argument("--k", type=int, default=32, help="for quality")
    parser.add_argument("--batch", type=int, default=1024, help="tokens in a step, for quality")
    parser.add_argument("--steps", type=int, default=300, help="for quality")
    arguments = parser.parse_args()
    peers = install_peers(arguments.peers)
    numbers: dict[str, float] = {}
    if arguments.out.exists() and (arguments.only or arguments.families != list(FAMILIES)):
        numbers = json.loads(arguments.out.read_text())  # figures that are not measured now are kept
    builtin = Path(__file__).resolve().parent.parent / "sae_runtime" / "builtin" / "data" / "heldout.jsonl.xz"
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.only != "quality":
            numbers |= measure_speed(peers, Path(temporary), arguments.rounds)
        if arguments.only != "speed":
            sizes = Sizes(arguments.n_latents, arguments.k, arguments.batch, arguments.steps)
            data = arguments.data or [builtin]
            numbers |= measure_quality(peers, Path(temporary), data, sizes, arguments.families)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(numbers, indent=1) + "\n")
    table = Table("figure", "value")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)


if __name__ == "__main__":
    main()
