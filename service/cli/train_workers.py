"""`saeserve train` on several workers: its flags, and the run."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_runtime.dictionary.formats.published import read_manifest
from sae_runtime.dictionary.manifest import Manifest
from sae_runtime.progress import ProgressCallback
from sae_runtime.training.config import TrainingConfig
from service.cli.parser import CommandError, natural
from service.local_ray import StartError
from service.training.ray_session import Distribution, TrainingFailed


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workers")
    defaults = Distribution(workers=1)
    group.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help="train with N processes on Ray Train, each with its own GPU if device is cuda; the weights equal those of "
        "one process up to rounding, and lost workers are replaced [one process, without Ray]",
    )
    group.add_argument(
        "--latent-shards",
        type=natural,
        default=defaults.latent_shards,
        metavar="S",
        help="split the latents of a topk dictionary into S shards; workers / latent-shards replicas share each batch",
    )
    group.add_argument(
        "--max-restarts",
        type=natural,
        default=defaults.max_restarts,
        metavar="N",
        help="replace lost workers, from the last checkpoint, at most N times before the run fails",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="train on this running Ray cluster, which must see the same files [a Ray instance for this run]",
    )
    group.add_argument("--ray-log", action="store_true", help="show what Ray and the workers print")


def train_on_workers(
    config: TrainingConfig, arguments: argparse.Namespace, show: ProgressCallback
) -> list[tuple[Path, Manifest]]:
    """Trains with the workers that the flags ask for. Returns the published folders and their manifests.

    Raises:
        CommandError: the run failed, or cannot be started.
    """
    from service.training.ray_train import train_on_ray  # imports torch.distributed

    distribution = Distribution(
        arguments.workers, arguments.latent_shards, arguments.max_restarts, arguments.ray_address
    )
    try:
        folders = train_on_ray(config, distribution, show, verbose=arguments.ray_log)
    except (StartError, TrainingFailed) as error:
        raise CommandError(str(error)) from error
    return [(folder, read_manifest(folder)) for folder in folders]
