"""`saeserve train --workers` on Ray Train: a killed worker is replaced, and the result is an undisturbed run's."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sae_runtime import load_dictionary
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.distributed.sharded_checkpoint import workers_folder
from sae_runtime.training.run import run_training
from tests.e2e.running_service import poll
from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)
from tests.sae_runtime.training.distributed.worker_processes import WorkerProcesses
from tests.sae_runtime.training.test_worker import train_undisturbed

STEPS = 300
RELATIVE = 1e-3
"""To the run in one process, relative to a tensor's largest weight: sums in another order, over 300 steps."""


@pytest.fixture(scope="module")
def settings(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    folder = tmp_path_factory.mktemp("train")
    generator = random.Random(0)
    words = ("a", "small", "dictionary", "latent", "fires", "on", "every", "word")
    lines = [{"text": " ".join(generator.choices(words, k=60))} for _ in range(300)]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "site": "1.resid_post_mlp",
        "data": [str(folder / "words.jsonl")],
        "backbone": str(tiny_backbone_folder),
        "out": str(folder / "killed"),
        "n_latents": 256,
        "k": 8,
        "tokens": STEPS * 256,
        "batch_tokens": 256,
        "buffer_tokens": 4096,
        "held_out_fraction": 0.1,
        "evaluation_tokens": 500,
        "statistics_tokens": 500,
        "aux_k": 16,
        "dead_after_tokens": 2000,
        "threads": 1,
        "backbone_dtype": "float32",
        "compute_dtype": "float32",
        "storage_dtype": "float32",
        "adam_eps": 1e-6,
        "checkpoint_interval": 0.1,
    }


def start(config_file: Path, *flags: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAESERVE_", "RAY_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "service.cli", "train", str(config_file), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=kept | {"PYTHONPATH": str(root)},
    )


def weights(folder: Path) -> dict[str, Tensor]:
    dictionary = load_dictionary(folder)
    return {name: getattr(dictionary, name) for name in ("encoder", "decoder", "pre_bias", "latent_bias")}


@pytest.mark.timeout(600)  # two starts of all workers, a run of two processes and one of one
def test_a_killed_worker_is_replaced_and_the_run_ends_right(settings: dict[str, Any], tmp_path: Path) -> None:
    importlib.import_module("ray")  # brings psutil
    import psutil

    config = TrainingConfig(**settings)
    config_file = tmp_path / "train.yaml"
    config_file.write_text(yaml.safe_dump(settings))
    run = start(config_file, "--workers", "2", "--latent-shards", "2", "--json")
    try:
        assert poll(lambda: (workers_folder(config) / "latest.json").exists() or run.poll() is not None, timeout_s=120)
        assert run.poll() is None, run.communicate()
        processes = psutil.Process(run.pid).children(recursive=True)
        victims = [process for process in processes if "RayTrainWorker" in " ".join(process.cmdline())]
        assert len(victims) == 2
        victims[1].kill()
        out, err = run.communicate(timeout=180)
    finally:
        if run.poll() is None:
            run.terminate()
            run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert json.loads(out)["path"] == str(config.out)
    assert err.count("prepare 0 of") == 2, f"workers were not started twice:\n{err}"
    assert f"train {STEPS * 256:,} of {STEPS * 256:,}" in err
    # Nothing is left but the dictionary.
    assert psutil.wait_procs(processes, timeout=60)[1] == []
    assert not workers_folder(config).exists()

    trained = weights(config.out)
    workers = WorkerProcesses(2)
    try:
        undisturbed = workers.run(train_undisturbed, 2, config.model_copy(update={"out": tmp_path / "calm"}), 2)[0]
    finally:
        workers.close()
    for name, tensor in undisturbed.items():
        assert torch.equal(trained[name], tensor), f"{name} differs from a run that nobody disturbed"
    alone = config.model_copy(update={"out": tmp_path / "alone"})
    run_training(alone)
    for name, tensor in weights(alone.out).items():
        assert float((trained[name] - tensor).abs().max() / tensor.abs().max()) < RELATIVE, name


def test_what_cannot_be_trained_is_one_line_and_leaves_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    config_file = tmp_path / "train.yaml"
    config_file.write_text(yaml.safe_dump({**settings, "out": str(tmp_path / "out"), "n_latents": 255}))
    run = start(config_file, "--workers", "2", "--latent-shards", "2")
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (1, "")
    assert err == "saeserve: 255 latents cannot be split into 2 equal shards\n"
    assert list(tmp_path.iterdir()) == [config_file]
