"""Metrics files have one line for each step also after a resume or a kill; TensorBoard and W&B only where asked for."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.run_log import RunLog


def config_in(folder: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig(site="0.resid_pre", data=(folder / "a.txt",), out=folder / "run", **settings)


def lines(config: TrainingConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in config.log_path.read_text().splitlines()]


def test_a_line_for_each_step(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with RunLog.open(config) as log:
        log.log(10, 640, {"loss": 0.5, "l0": 32.0})
        # Each line is there at once: a killed run has it.
        assert lines(config)[0].items() >= {"step": 10, "tokens": 640, "loss": 0.5, "l0": 32.0}.items()
        log.log(20, 1280, {"loss": float("nan")})
    assert config.log_path == tmp_path / "run.metrics.jsonl"
    assert lines(config)[1]["loss"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["run.metrics.jsonl"]


def test_a_resumed_run_takes_back_what_its_checkpoint_has_not_seen(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with RunLog.open(config) as log:
        for step in range(1, 8):
            log.log(step, step * 64, {"loss": 1 / step})
    with config.log_path.open("a") as file:
        file.write('{"step": 8, "tok')  # killed while writing
    with RunLog.open(config, step=5) as log:
        for step in range(6, 10):
            log.log(step, step * 64, {"loss": 2 / step})
    assert [line["step"] for line in lines(config)] == list(range(1, 10))
    assert [line["loss"] for line in lines(config)] == [1 / s for s in range(1, 6)] + [2 / s for s in range(6, 10)]


def test_a_last_line_without_its_end_is_not_joined_by_the_next(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.log_path.write_text('{"step": 1}\n{"step": 2}')
    with RunLog.open(config, step=2) as log:
        log.log(3, 3, {})
    assert [line["step"] for line in lines(config)] == [1, 3]


def test_a_new_run_keeps_the_log_of_the_last(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.log_path.write_text('{"step": 1}\n')
    with RunLog.open(config) as log:
        log.log(1, 64, {"loss": 3.0})
    assert [line["loss"] for line in lines(config)] == [3.0]
    assert (tmp_path / "run.metrics.jsonl.previous").read_text() == '{"step": 1}\n'


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.log_path.write_text("my notes\nmore notes\n")
    with pytest.raises(ValueError, match=r"run\.metrics\.jsonl:1 is not a line of training metrics"):
        RunLog.open(config, step=5)
    assert config.log_path.read_text() == "my notes\nmore notes\n"


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_in(tmp_path, tensorboard=tmp_path / "tb")
    with RunLog.open(config) as log:
        for step in range(1, 8):
            log.log(step, step * 64, {"loss": 1.0})
    with RunLog.open(config, step=5) as log:
        for step in range(6, 10):
            log.log(step, step * 64, {"loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(s, 1.0) for s in range(1, 6)] + [(s, 2.0) for s in range(6, 10)]
    assert events.Scalars("train/tokens")[-1].value == 9 * 64


@pytest.mark.parametrize(
    ("setting", "module", "advice"),
    [("tensorboard", "torch.utils.tensorboard", r"saeserve\[train\]"), ("wandb_project", "wandb", "pip install wandb")],
)
def test_what_is_not_installed_is_an_error_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, module: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    RunLog.open(config_in(tmp_path)).close()
    config = config_in(tmp_path, **{setting: "asked"})
    config.log_path.unlink()
    with pytest.raises(ModuleNotFoundError, match=advice):
        RunLog.open(config)
    assert not config.log_path.exists()


def test_wandb_gets_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finished")

    def init(**settings: Any) -> Run:
        calls.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    config = config_in(tmp_path, wandb_project="dictionaries")
    with RunLog.open(config) as log:
        log.log(1, 64, {"loss": 1.0})
    RunLog.open(config, step=1).close()
    RunLog.open(config).close()
    first, logged, _, second, _, third, _ = calls
    assert (first["project"], first["name"], first["resume"]) == ("dictionaries", "run", "allow")
    assert first["config"]["site"] == "0.resid_pre"
    assert logged == (1, {"tokens": 64, "loss": 1.0})
    assert second["id"] == first["id"] != third["id"]
