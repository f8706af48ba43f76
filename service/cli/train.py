"""`saeserve train`: trains and publishes a dictionary; every field of TrainingConfig is a flag."""

from __future__ import annotations

import argparse
import time
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from yaml import YAMLError

from sae_runtime.errors import DictionaryFormatError
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.progress import TrainingProgress
from sae_runtime.training.run import TrainingResult, run_training
from service.cli.command_error import CommandError
from service.cli.fact_table import fact_table
from service.cli.json_output import print_json

_LOG_INTERVAL_S = 10.0

FIGURES = {
    "nmse": "error over that of always predicting the mean activation",
    "relative_error": "squared error over squared norm",
    "nmse_normalized": "nmse on layer-normalised activations",
    "l0": "active latents per token",
    "dead_fraction": "latents active on no token",
    "dense_fraction": "latents active on more than a tenth of the tokens",
    "ce_clean": "cross-entropy of the model, nats per token",
    "ce_spliced": "the same with reconstructions in place of activations",
    "ce_ablated": "the same with zeros in place of activations",
    "loss_recovered": "1: reconstructions cost nothing; 0: as much as zeros",
    "n_tokens": "held-out tokens measured",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains a dictionary on the activations of a backbone, measures it on held-out text and publishes it. Settings "
        "come from a YAML file, flags of the same names, or both; flags win. A run that was stopped goes on from its "
        "checkpoint when it is started again."
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="YAML file of settings")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    group = parser.add_argument_group("settings")
    for name, field in TrainingConfig.model_fields.items():
        # SUPPRESS: what is not given must not hide the file's value.
        group.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, help=_help(field), **_form(field))


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    console = Console(stderr=True, highlight=False)
    try:
        with ProgressDisplay(console) as display:
            result = run_training(config, display.show)
    except KeyboardInterrupt:
        if config.checkpoint_path.exists():
            console.print(f"Stopped. The checkpoint is {config.checkpoint_path}; the same command goes on from it.")
        raise
    except (OSError, ValueError, FloatingPointError, DictionaryFormatError) as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        print_json({"path": str(result.path), "name": config.published_name, "figures": result.evaluation.figures()})
    else:
        _print_result(result, config)
    return 0


def read_config(arguments: argparse.Namespace) -> TrainingConfig:
    """Settings of the file and the flags.

    Raises:
        CommandError: a setting is unknown, missing or wrong; one line for each.
    """
    flags = {name: _value(value) for name, value in vars(arguments).items() if name in TrainingConfig.model_fields}
    try:
        return (
            TrainingConfig(**flags) if arguments.config is None else TrainingConfig.from_yaml(arguments.config, **flags)
        )
    except ValidationError as error:
        problems = [_problem(each) for each in error.errors()]
        raise CommandError("; ".join(problems), exit_code=2) from error
    except (OSError, ValueError, YAMLError) as error:
        raise CommandError(f"cannot read settings: {error}", exit_code=2) from error


class ProgressDisplay:
    """A progress bar for each stage of a run; on something that is no terminal, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._figures = ""
        self._line_at = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, event: TrainingProgress) -> None:
        """Shows a moment of the run; figures of training stay until there are new ones."""
        if event.stage != self._stage:
            if self._task is not None:
                self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
            self._task = self._bars.add_task(event.stage, total=event.total_tokens, figures="")
            self._stage, self._figures, self._line_at = event.stage, "", 0.0
        if event.nmse is not None or event.stage != "train":
            self._figures = _figures(event)
        assert self._task is not None
        self._bars.update(self._task, completed=event.tokens, total=event.total_tokens, figures=self._figures)
        done = event.tokens >= event.total_tokens
        if not self._console.is_terminal and (done or time.monotonic() - self._line_at > _LOG_INTERVAL_S):
            self._line_at = time.monotonic()
            share = f"{event.stage} {event.tokens:,} of {event.total_tokens:,}"
            self._console.print(f"{share}  {self._figures}".rstrip(), soft_wrap=True)


def _figures(event: TrainingProgress) -> str:
    parts = [f"{event.tokens_per_second:,.0f} tokens/s"] if event.tokens_per_second and event.stage != "publish" else []
    if event.nmse is not None:
        parts.append(f"NMSE {event.nmse:.4f}")
    if event.l0 is not None:
        parts.append(f"L0 {event.l0:.1f}")
    if event.dead_fraction is not None:
        parts.append(f"dead {100 * event.dead_fraction:.1f} %")
    return "  ".join(parts)


def _print_result(result: TrainingResult, config: TrainingConfig) -> None:
    console = Console(highlight=False)
    console.print(f"Published {config.published_name} in {result.path}", soft_wrap=True)
    print_figures(console, result.evaluation.figures())
    console.print(f"Serve it: saeserve serve --dictionaries {result.path}", soft_wrap=True)


def print_figures(console: Console, figures: dict[str, float]) -> None:
    """Figures of a DictionaryEvaluation with what they mean."""
    rows = {}
    for name, value in figures.items():
        shown = f"{value:,.0f}" if name == "n_tokens" else f"{value:.4f}"
        rows[name] = f"{shown:>9}  [dim]{FIGURES.get(name, '')}[/dim]"
    console.print(fact_table(rows))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if field.is_required() or field.default is None or field.default == ():
        return text
    return f"{text} [{field.default}]"


def _form(field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a field. Values stay text: TrainingConfig converts and checks them, as it does for a file."""
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if any(typing.get_origin(kind) is Literal for kind in kinds):
        return {"choices": [value for kind in kinds for value in typing.get_args(kind)]}
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return {"nargs": "+", "metavar": "FILE"}
    return {"metavar": "PATH" if Path in kinds else "N" if {int, float} & set(kinds) else "TEXT"}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _value(value: Any) -> Any:
    return None if value == "none" else value


def _problem(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            return f"{name} is not given (in the file, or as {_flag(name)})"
        case "extra_forbidden":
            return f"{name}: no such setting"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{name}: {message}" if name else message
        case _:
            return f"{name}: {problem['msg']}, found {problem['input']!r}"
