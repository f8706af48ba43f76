"""What can happen to a long run: it is killed, stopped, runs out of disk, meets bad numbers or the wrong model."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_runtime import load_dictionary
from sae_runtime.model.sites import Site
from sae_runtime.progress import Progress
from sae_runtime.training.activations.source import ActivationSource
from sae_runtime.training.checkpoint import load_checkpoint, save_checkpoint
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.run import run_training
from sae_runtime.training.stop_signals import TrainingStopped

pytestmark = pytest.mark.any_cpu


@pytest.fixture(autouse=True)
def _every_step_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_runtime.progress.INTERVAL", 0.0)


def at_tokens(tokens: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    def callback(event: Progress) -> None:
        if event.stage == "train" and event.done >= tokens:
            act()

    return callback


def assert_bit_equal(a: Path, b: Path) -> None:
    ours, theirs = vars(load_dictionary(a)), vars(load_dictionary(b))
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name


# Trains in child processes with a checkpoint after every step, and each child kills itself: after some steps, or in the
# middle of writing one. (Children are forked so that torch is imported once.) Says which step the checkpoint is of.
KILLED = """
import io, json, os, signal, sys
import torch
from sae_runtime import progress
from sae_runtime.training import run
from sae_runtime.training.checkpoint import load_checkpoint
from sae_runtime.training.config import TrainingConfig

torch.set_num_threads(1)
config = TrainingConfig(**json.loads(sys.argv[1]))
progress.INTERVAL = 0.0

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def train(how, count):
    done = 0
    save = torch.save
    def save_half(state, file):
        nonlocal done
        done += 1
        if done < count:
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        kill()
    def show(event):
        nonlocal done
        done += event.stage == "train"
        if done == count:
            kill()
    if how == "writing":
        torch.save = save_half
    run.run_training(config, show if how == "training" else None)

for how, count in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        try:
            train(how, count)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    path = config.checkpoint_path
    saved = load_checkpoint(path) if path.exists() else None
    print(saved["trainers"][config.site]["step_count"] if saved else 0)
"""


def test_a_killed_run_leaves_a_checkpoint_that_goes_on_bit_by_bit(tiny_settings: dict[str, Any]) -> None:
    settings = tiny_settings | {"checkpoint_interval": 1e-9}
    whole = TrainingConfig(**{**settings, "out": settings["out"].with_name("whole")})
    run_training(whole)
    config = TrainingConfig(**settings)
    plain = json.dumps(settings | {"data": [str(settings["data"][0])], "out": str(settings["out"])})
    kills = json.dumps([["writing", 1], ["writing", 4], ["training", 5], ["writing", 2]])
    killed = subprocess.run([sys.executable, "-c", KILLED, plain, kills], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    steps = [int(line) for line in killed.stdout.split()]
    # Killed in its first write: nothing; in its fourth: three steps; and so on from there.
    assert steps[:2] == [0, 3]
    assert steps[3] > steps[2] >= 6
    run_training(config)
    assert_bit_equal(config.out, whole.out)
    assert not list(config.out.parent.glob("*.tmp*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_step_and_write_a_checkpoint(tiny_settings: dict[str, Any], number: signal.Signals) -> None:
    config = TrainingConfig(**tiny_settings)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingStopped) as stopped:
        run_training(config, at_tokens(640, lambda: os.kill(os.getpid(), number)))
    assert stopped.value.signal_number == number
    assert isinstance(stopped.value, KeyboardInterrupt)
    saved = load_checkpoint(config.checkpoint_path)
    assert saved["trainers"]["1.resid_post_mlp"]["step_count"] == 5
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_interrupt_inside_a_step_does_not_write_half_of_it(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(**tiny_settings)
    with pytest.raises(TrainingStopped):
        run_training(config, at_tokens(256, lambda: os.kill(os.getpid(), signal.SIGINT)))
    before = config.checkpoint_path.read_bytes()
    give = ActivationSource.next_batch

    def interrupted(source: ActivationSource, size: int) -> dict[Site, Tensor]:
        give(source, size)
        raise KeyboardInterrupt

    monkeypatch.setattr(ActivationSource, "next_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    assert config.checkpoint_path.read_bytes() == before


class FullDisk:
    """A file of which only so many bytes find room."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets checkpoints be written up to a number of bytes."""
    really_open = pathlib.Path.open

    def fill(room: int) -> None:
        def limited(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = really_open(path, mode, *args, **kwargs)
            return FullDisk(file, room) if path.name.endswith("checkpoint.pt.tmp") else file

        monkeypatch.setattr(pathlib.Path, "open", limited)

    return fill


@pytest.mark.parametrize("room", [0, 5_000, 60_000])
def test_a_full_disk_keeps_the_last_checkpoint(
    tiny_settings: dict[str, Any],
    fill_disk: Callable[[int], None],
    room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainingConfig(**tiny_settings, checkpoint_interval=1e-9)
    with (
        pytest.raises(OSError, match=r"tiny\.checkpoint\.pt cannot be written: No space left.*last checkpoint is kept"),
        monkeypatch.context(),
    ):
        run_training(config, at_tokens(640, lambda: fill_disk(room)))
    monkeypatch.undo()
    assert not list(config.out.parent.glob("*.tmp"))
    saved = load_checkpoint(config.checkpoint_path)
    assert saved["trainers"]["1.resid_post_mlp"]["step_count"] == 4
    run_training(config)
    whole = TrainingConfig(**{**tiny_settings, "out": config.out.with_name("whole")})
    run_training(whole)
    assert_bit_equal(config.out, whole.out)


def test_the_error_of_a_first_checkpoint_promises_nothing(fill_disk: Callable[[int], None], tmp_path: Path) -> None:
    fill_disk(100)
    with pytest.raises(OSError, match="No space left") as error:
        save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "checkpoint.pt")
    assert error.value.errno == errno.ENOSPC
    assert "kept" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(**tiny_settings, checkpoint_interval=1e-9)
    give = ActivationSource.next_batch
    calls = 0

    def spoiled(source: ActivationSource, size: int) -> dict[Site, Tensor]:
        nonlocal calls
        calls += 1
        return {site: x if calls < 8 else x * torch.inf for site, x in give(source, size).items()}

    monkeypatch.setattr(ActivationSource, "next_batch", spoiled)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 7 .* the last checkpoint is .*tiny\.checkpoint"):
        run_training(config)
    saved = load_checkpoint(config.checkpoint_path)["trainers"]["1.resid_post_mlp"]
    assert saved["step_count"] == 7
    assert all(torch.isfinite(p).all() for p in saved["parameters"].values())


def test_a_checkpoint_of_another_model_is_refused(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_settings["backbone"], model)
    config = TrainingConfig(**{**tiny_settings, "backbone": str(model)})
    with pytest.raises(TrainingStopped):
        run_training(config, at_tokens(256, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = config.checkpoint_path.read_bytes()
    weights = load_file(model / "model.safetensors")
    save_file({name: w + 0.01 for name, w in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"belongs to another run: its backbone has fingerprint \w+, this one \w+"):
        run_training(config)
    assert config.checkpoint_path.read_bytes() == before


def test_empty_text_is_an_error(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"no text to train on in .*empty\.txt"):
        run_training(TrainingConfig(**{**tiny_settings, "data": [empty]}))


def test_several_sites_in_one_pass_are_what_each_would_be_alone(tiny_settings: dict[str, Any]) -> None:
    del tiny_settings["site"]
    sites = ("0.resid_post_mlp", "1.mlp_post_act")
    out = tiny_settings["out"]
    both = TrainingConfig(**{**tiny_settings, "sites": sites})
    with pytest.raises(TrainingStopped):
        run_training(both, at_tokens(1280, lambda: os.kill(os.getpid(), signal.SIGINT)))
    results = run_training(both)
    assert [result.path for result in results] == [out / site for site in sites]
    for site, result in zip(sites, results, strict=True):
        alone = TrainingConfig(**{**tiny_settings, "site": site, "out": out.with_name(site)})
        run_training(alone)
        assert_bit_equal(out / site, alone.out)
        assert result.manifest.name == f"tiny-{site}"
        assert result.manifest.site == site
    assert not out.with_name("tiny.partial").exists()
    # The log keeps the sites apart.
    lines = [json.loads(line) for line in both.log_path.read_text().splitlines()]
    assert f"{sites[0]}/nmse" in lines[0]
    assert [line["step"] for line in lines] == [10, 20]
