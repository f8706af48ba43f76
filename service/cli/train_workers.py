"""The flags of `saeserve train` that spread a run over workers, and the run itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_runtime.dictionary.formats.published import read_manifest
from sae_runtime.dictionary.manifest import Manifest
from sae_runtime.progress import ProgressCallback
from sae_runtime.training.config import TrainingConfig
from service.cli.argument_types import natural
from service.cli.command_error import CommandError
from service.local_ray import StartError
from service.training.ray_session import Distribution, TrainingFailed


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workers")
    defaults = Distribution(workers=1)
    group.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help="train with this many processes on Ray Train, each with a GPU of its own if device is cuda; they give the "
        "weights of one process but for rounding, and a lost one is replaced (one process without Ray if not given)",
    )
    group.add_argument(
        "--latent-shards",
        type=natural,
        default=defaults.latent_shards,
        metavar="S",
        help="split the latents of a topk dictionary into this many parts; workers / latent-shards replicas share each "
        "batch",
    )
    group.add_argument(
        "--max-restarts",
        type=natural,
        default=defaults.max_restarts,
        metavar="N",
        help="how often lost workers are replaced, from the last checkpoint on, before the run fails",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="running Ray cluster to train on, which sees the same files; a Ray instance of the run's own if not given",
    )
    group.add_argument("--ray-log", action="store_true", help="show what Ray and the workers print")


def train_on_workers(
    config: TrainingConfig, arguments: argparse.Namespace, show: ProgressCallback
) -> list[tuple[Path, Manifest]]:
    """Trains with the workers that the flags ask for; the published folders and their manifests.

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
