"""`saeserve train`: trains and publishes a dictionary; each field of TrainingConfig is a flag."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from rich.text import Text

from sae_runtime.dictionary.manifest import Manifest
from sae_runtime.errors import DictionaryFormatError
from sae_runtime.evaluation.figure_names import describe
from sae_runtime.training.config import TrainingConfig, preset_names
from sae_runtime.training.distributed.sharded_checkpoint import workers_folder
from sae_runtime.training.run import run_training
from sae_runtime.training.stop_signals import TrainingStopped
from service.cli.parser import CommandError
from service.cli.setting_flags import add_setting_flags, given_settings, settings_errors
from service.cli.train_workers import add_worker_flags, train_on_workers
from service.cli.view.output import add_json_argument, open_console, print_json, print_sentence
from service.cli.view.progress import ProgressDisplay
from service.cli.view.tables import fact_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train dictionaries on the activations of a backbone, measure them on held-out text and publish them. "
        "Settings come from a preset, a YAML file and flags of the same names; flags win over the file, and the file "
        "over the preset. The same command resumes an interrupted run from its checkpoint."
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="YAML file of settings")
    parser.add_argument(
        "--preset", choices=preset_names(), help="settings to start from; the file can name a preset, too"
    )
    add_json_argument(parser)
    add_worker_flags(parser)
    add_setting_flags(parser, TrainingConfig)


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    console = open_console(stderr=True)
    try:
        with ProgressDisplay(console) as display:
            if arguments.workers is None:
                results = [(result.path, result.manifest) for result in run_training(config, display.show)]
            else:
                results = train_on_workers(config, arguments, display.show)
    except KeyboardInterrupt as stopped:
        checkpoint = config.checkpoint_path if arguments.workers is None else workers_folder(config)
        if checkpoint.exists():
            print_sentence(console, f"Stopped. The checkpoint is {checkpoint}; the same command resumes from it.")
        if isinstance(stopped, TrainingStopped) and stopped.signal_number == signal.SIGTERM:
            return 128 + signal.SIGTERM  # as shells report a program that SIGTERM ended
        raise
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError, DictionaryFormatError) as error:
        raise CommandError(str(error)) from error
    if not arguments.json:
        for path, manifest in results:
            _print_result(path, manifest)
    elif config.sites:
        print_json({"dictionaries": [_summary(*result) for result in results]})
    else:
        print_json(_summary(*results[0]))
    return 0


def read_config(arguments: argparse.Namespace) -> TrainingConfig:
    """Settings of the preset, the file and the flags.

    Raises:
        CommandError: settings are unknown, missing or wrong; one line for each.
    """
    with settings_errors():
        flags = given_settings(arguments, TrainingConfig)
        return TrainingConfig.from_yaml(arguments.config, preset=arguments.preset, **flags)


def _summary(path: Path, manifest: Manifest) -> dict[str, object]:
    return {"path": str(path), "name": manifest.name, "figures": manifest.evaluation}


def _print_result(path: Path, manifest: Manifest) -> None:
    console = open_console()
    console.print(f"Published {manifest.name} in {path}", soft_wrap=True)
    rows: dict[str, str | Text] = {}
    for name, value in manifest.evaluation.items():
        figure = f"{value:,.0f}" if name == "n_tokens" else f"{value:.4f}"
        rows[name] = Text.assemble(f"{figure:>9}  ", (describe(name), "dim"))
    print_table(console, fact_table(rows))
    console.print(f"Serve it: saeserve serve --dictionaries {path}", soft_wrap=True)
