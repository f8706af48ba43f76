"""The code of a Ray Train worker process: the worker of sae_runtime, and publication on the first worker."""

from __future__ import annotations

import dataclasses
import json
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.progress import Progress, ProgressMeter
from sae_runtime.training.communicator import ProcessGroupCommunicator
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.distributed.sharded_checkpoint import ShardedCheckpoint, workers_folder, write_json
from sae_runtime.training.publication import publish_run
from sae_runtime.training.worker import Worker

PROGRESS, FAILURE, SKIPPED, STOP = "progress.jsonl", "failure.json", "skipped.json", "stop"
"""Files beside the checkpoints: progress of the first worker; why the run failed; bad documents; a request to stop."""


def run_worker(arguments: dict[str, Any]) -> None:
    """Ray Train calls this on every worker, once the process group is set up.

    Args:
        arguments: config (TrainingConfig as JSON values), latent_shards.
    """
    config = TrainingConfig(**arguments["config"])
    folder = workers_folder(config)
    if (folder / FAILURE).exists():
        return  # Ray Train restarts workers after any failure, and this one would recur
    if config.out.exists():
        return  # published, and then a worker was lost
    try:
        _train_and_publish(config, arguments["latent_shards"], folder)
    except RuntimeError:
        # A lost connection or device: Ray Train restarts the workers, unless a peer has recorded a failure.
        if not (folder / FAILURE).exists():
            raise
    except Exception as error:
        # A restart would fail again. The other workers notice when their connections close.
        write_json({"kind": type(error).__name__, "message": str(error)}, folder / FAILURE)
        traceback.print_exc()
        dist.destroy_process_group()


def _train_and_publish(config: TrainingConfig, latent_shards: int, folder: Path) -> None:
    if config.device.startswith("cuda"):
        config = config.model_copy(update={"device": f"cuda:{torch.cuda.current_device()}"})  # Ray Train chose it
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    communicator = ProcessGroupCommunicator(latent_shards)
    first = communicator.data_rank == 0 and communicator.shard_rank == 0
    meter = ProgressMeter(_Reporter(folder / PROGRESS) if first else None)
    meter.begin("prepare", config.buffer_tokens)
    bad = BadDocuments(config.bad_documents)  # every worker reads the whole text
    worker = Worker(config, ShardedCheckpoint(folder, communicator), communicator, bad)
    try:
        if not worker.train(meter, (folder / STOP).exists):
            return
        exports = worker.exports()
    finally:
        worker.close()
    if exports:
        publish_run(worker.config, exports, meter, bad)
        write_json({"summary": bad.summary}, folder / SKIPPED)


class _Reporter:
    """Writes progress events as lines of JSON, which the driver reads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Progress) -> None:
        self._file.write(json.dumps(dataclasses.asdict(event)) + "\n")
        self._file.flush()
