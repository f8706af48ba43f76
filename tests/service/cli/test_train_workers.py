"""The flags of `saeserve train` that spread a run over workers. Runs on Ray are in tests/e2e."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sae_runtime.training.config import TrainingConfig
from service.cli import train_workers
from service.training import ray_train
from service.training.ray_session import Distribution, TrainingFailed
from service.training.ray_train import with_absolute_paths

Saeserve = Callable[..., tuple[int, str, str]]
SETTINGS = ("train", "--site", "1.resid_post_mlp", "--data", "a.txt", "--out", "d")


class Manifest:
    name = "tiny"
    evaluation: ClassVar = {"nmse": 0.25, "n_tokens": 100.0}


def test_the_flags_reach_the_run(saeserve: Saeserve, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(config: TrainingConfig, distribution: Distribution, show: Any, *, verbose: bool) -> list[Path]:
        seen.extend([config.out, distribution, verbose])
        return [Path("d")]

    monkeypatch.setattr(ray_train, "train_on_ray", record)
    monkeypatch.setattr(train_workers, "read_manifest", lambda folder: Manifest)
    flags = ("--workers", "4", "--latent-shards", "2", "--max-restarts", "5", "--ray-address", "auto", "--json")
    code, out, _ = saeserve(*SETTINGS, *flags)
    assert code == 0
    assert seen == [Path("d"), Distribution(4, 2, 5, "auto"), False]
    assert json.loads(out) == {"path": "d", "name": "tiny", "figures": Manifest.evaluation}


def test_a_failed_run_is_one_line(saeserve: Saeserve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Path]:
        raise TrainingFailed("loss is nan at step 3")

    monkeypatch.setattr(ray_train, "train_on_ray", fail)
    assert saeserve(*SETTINGS, "--workers", "2") == (1, "", "saeserve: loss is nan at step 3\n")


def test_runs_that_cannot_be_split_are_one_line(saeserve: Saeserve, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.touch()
    settings = ("train", "--site", "1.resid_post_mlp", "--data", str(text), "--out", str(tmp_path / "d"))
    code, _, err = saeserve(*settings, "--workers", "3", "--latent-shards", "2")
    assert (code, err) == (1, "saeserve: 3 workers with 2 latent shards: expected a multiple of the shards\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = with_absolute_paths(
        TrainingConfig(site="1.resid_post_mlp", data=(Path("a"), Path("b")), out=Path("d"), backbone="model")
    )
    assert config.data == (tmp_path / "a", tmp_path / "b")
    assert (config.out, config.backbone) == (tmp_path / "d", str(tmp_path / "model"))
    assert config.checkpoint is None
    assert config.held_out == ()
    other = TrainingConfig(site="1.resid_post_mlp", data=(Path("a"),), out=Path("d"), backbone="gpt2")
    assert with_absolute_paths(other).backbone == "gpt2"
