"""Metrics of a training run: a JSON line for each logged step, and TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from sae_runtime.atomic import atomic_file
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.identity import recorded_settings


class _Sink(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """The metrics log of one process of a run. A resumed run continues the same log without duplicate steps.

    with RunLog.open(config, step=trainer.step_count) as log:
        log.log(step, tokens, {"loss": 0.3})
    """

    def __init__(self, sinks: list[_Sink]) -> None:
        self._sinks = sinks

    @classmethod
    def open(cls, config: TrainingConfig, step: int = 0) -> RunLog:
        """The log that a run's settings ask for.

        Args:
            step: the step that the run goes on from; what was logged after it is taken back. At 0 a metrics file of an
                earlier run is kept as "<file>.previous".

        Raises:
            ModuleNotFoundError: tensorboard or wandb is asked for and not installed; says how to install it.
            ValueError: the metrics file is not one.
        """
        sinks: list[_Sink] = []
        try:
            # What may be missing comes first: nothing is written by a run that cannot start.
            if config.tensorboard is not None:
                sinks.append(_TensorBoard(config.tensorboard, step))
            if config.wandb_project is not None:
                sinks.append(_WeightsAndBiases(config, step))
            sinks.append(_MetricsFile(config.log_path, step))
        except BaseException:
            for sink in sinks:
                sink.close()
            raise
        return cls(sinks)

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics after `step` optimiser steps, `tokens` tokens altogether.

        Raises:
            OSError: the metrics file cannot be written, for example as the disk is full.
        """
        for sink in self._sinks:
            sink.log(step, tokens, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _MetricsFile:
    """Lines of {"step", "tokens", "seconds" since the epoch, metrics}; what is not finite is null: JSON has no NaN."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = _lines_until(path, step) if step else []
            if kept:
                with atomic_file(path) as file:
                    file.write("".join(kept).encode())
            else:
                path.replace(path.with_name(path.name + ".previous"))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        record: dict[str, Any] = {"step": step, "tokens": tokens, "seconds": round(time.time(), 3)}
        for name, value in metrics.items():
            record[name] = float(value) if math.isfinite(value) else None
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()  # a killed run has lost no line, at most the end of its last

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Complete lines of steps up to `step`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            line_step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):  # cut short when the run was killed
                break
            raise ValueError(f"{path}:{number} is not a line of training metrics; move the file away") from error
        if line_step <= step and line.endswith("\n"):
            kept.append(line)
    return kept


class _TensorBoard:
    """Scalars by step under train/, tokens among them."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "the setting `tensorboard` needs the package tensorboard, which is not installed: "
                "pip install 'saeserve[train]'"
            ) from error
        # TensorBoard leaves out what earlier files of the folder hold from purge_step on.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        for name, value in {"tokens": float(tokens), **metrics}.items():
            self._writer.add_scalar(f"train/{name}", float(value), step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One W&B run for one training run; its id lies beside the metrics file so that a resumed run finds it again."""

    def __init__(self, config: TrainingConfig, step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ModuleNotFoundError(
                "the setting `wandb_project` needs the package wandb, which is not installed: pip install wandb"
            ) from error
        id_file = config.log_path.with_name(config.log_path.name + ".wandb")
        run_id = id_file.read_text().strip() if step and id_file.exists() else uuid.uuid4().hex[:12]
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(run_id + "\n")
        # Steps that W&B has already seen are left out by itself, so a resumed run doubles none.
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.published_name,
            id=run_id,
            resume="allow",
            config=recorded_settings(config),
        )

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"tokens": tokens, **metrics}, step=step)

    def close(self) -> None:
        self._run.finish()
