"""Whole runs by several workers: data, training, checkpoints and result, against a run in one process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime import load_dictionary
from sae_runtime.progress import ProgressMeter
from sae_runtime.training.communicator import SINGLE, ProcessGroupCommunicator
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.distributed.sharded_checkpoint import ShardedCheckpoint, workers_folder
from sae_runtime.training.run import run_training
from sae_runtime.training.worker import Worker, check_distribution
from tests.sae_runtime.training.distributed.worker_processes import WorkerProcesses

WORDS = ("a", "small", "dictionary", "latent", "fires", "on", "every", "word", "that", "begins", "with", "this")

RELATIVE = 1e-4
"""Tolerance of a weight after 40 steps, relative to the largest of its tensor: other orders of float32 sums (as in
test_sharded_topk_trainer), and a backbone that computes other batches of rows."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    lines = [{"text": " ".join(generator.choices(WORDS, k=generator.randint(5, 80)))} for _ in range(200)]
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(corpus: Path, tiny_backbone_folder: Path, tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        site="1.resid_post_mlp",
        data=(corpus,),
        backbone=str(tiny_backbone_folder),
        out=tmp_path / "tiny",
        n_latents=64,
        k=8,
        tokens=40 * 128,
        batch_tokens=128,
        data_lanes=4,
        backbone_tokens=512,
        buffer_tokens=2048,
        held_out_fraction=0.1,
        evaluation_tokens=500,
        statistics_tokens=500,
        aux_k=8,
        dead_after_tokens=1000,
        learning_rate=3e-3,
        warmup_steps=5,
        backbone_dtype="float32",
        compute_dtype="float32",
        storage_dtype="float32",
        adam_eps=1e-6,
    )


class StopAfter:
    """Wishes to stop when it has been asked `steps` times."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0


def _run(config: TrainingConfig, n_shards: int, stop_after: int | None) -> dict[str, Tensor] | None:
    """The exported weights on the first worker, nothing on the others, None if the run was stopped."""
    communicator = ProcessGroupCommunicator(n_shards)
    worker = Worker(config, ShardedCheckpoint(workers_folder(config), communicator), communicator)
    stop: Callable[[], bool] = StopAfter(stop_after) if stop_after is not None else lambda: False
    if not worker.train(ProgressMeter(), stop):
        return None
    exports = worker.exports()
    worker.close()
    return {name: x for export in exports.values() for name, x in export.items() if isinstance(x, Tensor)}


def train_undisturbed(config: TrainingConfig, n_shards: int) -> dict[str, Tensor] | None:
    """What workers export of a run from beginning to end."""
    return _run(config, n_shards, None)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """Weights of runs in one process, by family."""
    return {}


def weights_alone(config: TrainingConfig, alone: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    if config.family not in alone:
        run_training(config)
        dictionary = load_dictionary(config.out)
        alone[config.family] = {n: getattr(dictionary, n) for n in ("encoder", "decoder", "pre_bias", "latent_bias")}
    return alone[config.family]


@pytest.mark.parametrize(
    ("world", "n_shards", "family"), [(2, 1, "topk"), (2, 2, "topk"), (4, 2, "topk"), (2, 1, "batch_topk")]
)
def test_workers_publish_what_one_process_publishes(
    workers: WorkerProcesses,
    config: TrainingConfig,
    alone: dict[str, dict[str, Tensor]],
    world: int,
    n_shards: int,
    family: Any,
) -> None:
    config = config.model_copy(update={"family": family})
    expected = weights_alone(config, alone)
    found, *others = workers.run(_run, world, config, n_shards, None)
    assert others == [{}] * (world - 1)
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max() / tensor.abs().max()) < RELATIVE, name


@pytest.mark.parametrize(("before", "after", "n_shards"), [(4, 4, 2), (4, 2, 2), (2, 2, 1)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    workers: WorkerProcesses, config: TrainingConfig, tmp_path: Path, before: int, after: int, n_shards: int
) -> None:
    """Bit for bit with the same workers; to rounding with another number of replicas."""
    whole = workers.run(_run, after, config.model_copy(update={"out": tmp_path / "whole"}), n_shards, None)[0]
    assert workers.run(_run, before, config, n_shards, 13) == [None] * before
    assert workers.run(_run, before, config, n_shards, 9) == [None] * before
    latest = json.loads((workers_folder(config) / "latest.json").read_text())
    assert (latest["step"], latest["workers"]) == (22, before)
    found = workers.run(_run, after, config, n_shards, None)[0]
    for name, tensor in whole.items():
        if before == after:
            assert torch.equal(found[name], tensor), name
        assert float((found[name] - tensor).abs().max() / tensor.abs().max()) < RELATIVE, name


def test_a_checkpoint_of_another_run_is_refused(workers: WorkerProcesses, config: TrainingConfig) -> None:
    assert workers.run(_run, 2, config, 2, 3) == [None, None]
    with pytest.raises(AssertionError, match=r"is of 2 latent shards, this run has 1; restore the number"):
        workers.run(_run, 2, config, 1, None)
    with pytest.raises(AssertionError, match=r"belongs to another run: k was 8, is 4; restore the settings"):
        workers.run(_run, 2, config.model_copy(update={"k": 4}), 2, None)


def _save(folder: Path, steps: list[int], n_shards: int, blocked_rank: int | None) -> Any:
    """Saves steps in turn; in the last one the given worker cannot write. What is loaded afterwards, or the error."""
    checkpoint = ShardedCheckpoint(folder, ProcessGroupCommunicator(n_shards))
    rank = torch.distributed.get_rank()
    message = None
    for step in steps:
        if blocked_rank == rank and step == steps[-1]:
            (folder / f"step-{step}").mkdir(parents=True, exist_ok=True)
            (folder / f"step-{step}" / f"source-{rank}.pt.tmp").mkdir()  # where the file would be written
        try:
            source = {"n_lanes": 4, "lanes": {str(rank): {"position": step}}}
            checkpoint.save({"settings": {"k": 8}}, step, {"weight": torch.tensor([step, rank % n_shards])}, source)
        except OSError as error:
            message = str(error)
    return message, checkpoint.load()


def test_the_last_complete_checkpoint_is_the_one_that_loads(workers: WorkerProcesses, tmp_path: Path) -> None:
    for rank, (message, loaded) in enumerate(workers.run(_save, 4, tmp_path, [3, 5], 2, None)):
        assert message is None
        trainer, source = loaded
        assert trainer["weight"].tolist() == [5, rank % 2]
        assert source["lanes"] == {str(rank): {"position": 5}}
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-5"]
    assert sorted(path.name for path in (tmp_path / "step-5").iterdir()) == [
        "shard-0.pt",
        "shard-1.pt",
        *(f"source-{rank}.pt" for rank in range(4)),
    ]
    # Killed while the next one is written: some files are there, one is half done, and the last one loads.
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / "shard-0.pt").write_bytes(b"half a file")
    (tmp_path / "latest.json.tmp").write_text('{"step":')
    for rank, (_, loaded) in enumerate(workers.run(_save, 4, tmp_path, [], 2, None)):
        assert loaded[0]["weight"].tolist() == [5, rank % 2]


def test_a_worker_that_cannot_write_stops_all_and_the_last_checkpoint_stays(
    workers: WorkerProcesses, tmp_path: Path
) -> None:
    for rank, (message, loaded) in enumerate(workers.run(_save, 4, tmp_path, [3, 5], 2, 3)):
        assert "the checkpoint of step 5 could not be written" in message
        assert "by 1 of 4 workers" in message
        assert loaded[0]["weight"].tolist() == [3, rank % 2]


def test_runs_that_cannot_be_split_are_refused(config: TrainingConfig) -> None:
    with pytest.raises(ValueError, match="3 workers with 2 latent shards: expected a multiple of the shards"):
        check_distribution(config, 3, 2)
    with pytest.raises(ValueError, match="latent shards are for the family topk, found batch_topk"):
        check_distribution(config.model_copy(update={"family": "batch_topk"}), 2, 2)
    with pytest.raises(ValueError, match="4 data streams, which 8 workers cannot share equally; set data_lanes"):
        check_distribution(config, 8, 1)
    with pytest.raises(ValueError, match="66 latents cannot be split into 4 equal shards"):
        check_distribution(config.model_copy(update={"n_latents": 66}), 4, 4)


def test_one_worker_may_keep_its_checkpoints_as_many_do(
    config: TrainingConfig, alone: dict[str, dict[str, Tensor]]
) -> None:
    checkpoint = ShardedCheckpoint(workers_folder(config), SINGLE)
    assert not Worker(config, checkpoint).train(ProgressMeter(), StopAfter(5))
    worker = Worker(config, checkpoint)
    assert worker.step_count == 5
    assert worker.train(ProgressMeter())
    (export,) = worker.exports().values()
    expected = weights_alone(config, alone)
    assert all(torch.equal(export[name], tensor) for name, tensor in expected.items())
