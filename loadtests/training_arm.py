"""One trainer on given activations: `python -m loadtests.training_arm SPEC` (JSON) prints speed, memory and quality.

`training_bench` runs this file in a new process for every arm, with this project's Python for saeserve and with the
peers' for the others, so only saeserve's arm imports the project. Every trainer gets the same raw activations in the
same order, and scales them by one number, as its project recommends.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DEAD_BELOW = 1  # a latent is dead if it fires on fewer held-out tokens


class Arm(NamedTuple):
    """A trainer, in the form that `run` uses."""

    step: Callable[[Tensor], object]
    """One optimiser step on raw activations [batch, d]."""
    finish: Callable[[], Callable[[Tensor], tuple[Tensor, Tensor]]]
    """Ends training and returns the served dictionary: from raw activations [n, d] to latents [n, n_latents] and
    reconstructions [n, d]."""


def saeserve(spec: dict[str, Any], sample: Tensor) -> Arm:
    from sae_runtime.dictionary.dictionary import Dictionary
    from sae_runtime.training.config import TrainingConfig
    from sae_runtime.training.trainers import new_trainer

    config = TrainingConfig(
        site="0.resid_post_mlp",
        data=(Path("unused"),),
        out=Path("unused"),
        family=spec["family"],
        n_latents=spec["n_latents"],
        k=spec["k"],
        tokens=spec["batch"] * spec["steps"],
        batch_tokens=spec["batch"],
        buffer_tokens=2 * spec["batch"],
        normalize=False,
        compute_dtype=spec["dtype"],
        seed=spec["seed"],
        dead_after_tokens=spec["dead_after_tokens"],
        **spec["settings"],
    )
    trainer = new_trainer(config, sample.shape[1], sample)

    def finish() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        dictionary = Dictionary(**trainer.export())

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            features = dictionary.encode(x)
            return features.to_dense(), dictionary.decode(features)

        return run

    return Arm(trainer.step, finish)


def dictionary_learning(spec: dict[str, Any], sample: Tensor) -> Arm:
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # not exported
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # not exported

    classes = {
        "topk": trainers.TopKTrainer,
        "batch_topk": trainers.BatchTopKTrainer,
        "matryoshka": MatryoshkaBatchTopKTrainer,
        "relu": trainers.StandardTrainer,
        "relu_decoder_norm": StandardTrainerAprilUpdate,
        "jumprelu": trainers.JumpReluTrainer,
        "gated": trainers.GatedSAETrainer,
    }
    takes_k = spec["family"] in ("topk", "batch_topk", "matryoshka")
    settings: dict[str, Any] = {"k": spec["k"]} if takes_k else {}
    trainer = classes[spec["family"]](
        steps=spec["steps"],
        activation_dim=sample.shape[1],
        dict_size=spec["n_latents"],
        layer=0,
        lm_name="bench",
        device="cpu",
        seed=spec["seed"],
        **settings,
        **spec["settings"],
    )
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = spec["dead_after_tokens"]
    scale = float(sample.square().sum(1).mean().sqrt())  # its trainSAE's normalize_activations: unit mean squared norm
    count = iter(range(spec["steps"] + 1))

    def finish() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        @torch.no_grad()
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            latents = trainer.ae.encode(x / scale)
            return latents, trainer.ae.decode(latents) * scale

        return run

    return Arm(lambda x: trainer.update(next(count), x / scale), finish)


def saelens(spec: dict[str, Any], sample: Tensor) -> Arm:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAE
    from sae_lens.training.sae_trainer import SAETrainer

    names = {
        "topk": "TopK",
        "batch_topk": "BatchTopK",
        "matryoshka": "MatryoshkaBatchTopK",
        "relu": "Standard",
        "jumprelu": "JumpReLU",
        "gated": "Gated",
    }
    name, sae_settings = names[spec["family"]], dict(spec["settings"])
    training_keys = [key for key in ("lr", "lr_warm_up_steps", "lr_decay_steps") if key in sae_settings]
    training = {key: sae_settings.pop(key) for key in training_keys}
    takes_k = spec["family"] in ("topk", "batch_topk", "matryoshka")
    torch.manual_seed(spec["seed"])
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=sample.shape[1],
        d_sae=spec["n_latents"],
        normalize_activations="none",  # done here, once: expected_average_only_in
        **({"k": spec["k"]} if takes_k else {}),
        **sae_settings,
    )
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    trainer: Any = SAETrainer(
        SAETrainerConfig(
            total_training_samples=spec["batch"] * spec["steps"],
            train_batch_size_samples=spec["batch"],
            autocast=spec["dtype"] == "bfloat16",
            lr_end=0.1 * training.get("lr", 3e-4),  # as its runner's configuration sets it
            dead_feature_window=spec["dead_after_tokens"] // spec["batch"],
            **training,
        ),
        sae,
        iter(()),
    )
    scale = float(sample.norm(dim=1).mean()) / sample.shape[1] ** 0.5

    def step(x: Tensor) -> None:
        trainer.step(x / scale)
        trainer.n_training_steps += 1

    def finish() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:  # saving for inference turns batch top-k into a threshold
            sae.save_inference_model(folder)
            served = SAE.load_from_disk(folder)

        @torch.no_grad()
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            latents = served.encode(x / scale)
            return latents, served.decode(latents) * scale

        return run

    return Arm(step, finish)


ARMS = {"saeserve": saeserve, "saelens": saelens, "dictionary_learning": dictionary_learning}


def run(spec: dict[str, Any]) -> dict[str, float]:
    """Trains on `steps` batches in order; figures of training and, with held_out, of the served dictionary."""
    activations = np.load(spec["activations"], mmap_mode="r")  # float32 [tokens, d]

    def rows(start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(activations[start:stop]))

    sample = rows(0, 32_768)
    torch.nn.functional.linear(sample[:256], sample[:256])  # so that no trainer's memory includes the matrix library
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    with contextlib.redirect_stdout(sys.stderr):
        arm = ARMS[spec["project"]](spec, sample)
        autocast = spec["dtype"] == "bfloat16" and spec["project"] == "dictionary_learning"
        times = []
        for i in range(spec["steps"]):
            batch = rows(i * spec["batch"], (i + 1) * spec["batch"])
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                arm.step(batch)
            times.append(time.perf_counter() - began)
        figures = {
            "tokens_per_s": spec["batch"] / sorted(times[spec["warm_up"] :])[len(times[spec["warm_up"] :]) // 2],
            "peak_mb": status_mb("VmHWM") - before,
            "seconds": sum(times),
        }
        if spec["held_out"]:
            figures |= quality(arm.finish(), rows(len(activations) - spec["held_out"], len(activations)))
    return figures


def quality(served: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> dict[str, float]:
    """NMSE (relative to predicting the mean), L0 and dead fraction on raw activations [n, d]."""
    error, active, fired = 0.0, 0, torch.zeros(())
    for rows in x.split(2048):
        latents, reconstruction = served(rows)
        error += float((rows - reconstruction).double().square().sum())
        active += int((latents > 0).sum())
        fired = fired + (latents > 0).sum(0)
    spread = float((x - x.mean(0)).double().square().sum())
    return {
        "nmse": error / spread,
        "l0": active / len(x),
        "dead_fraction": float((fired < DEAD_BELOW).double().mean()),
    }


def status_mb(field: str) -> float:
    """A size from /proc/self/status, in MB (1e6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def main() -> None:
    print(json.dumps(run(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
