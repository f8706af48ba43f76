"""`saeserve tokenize`: turns text into a folder of token files for training; each field of TokenizeConfig is a flag."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sae_runtime.data.token_folder.manifest import TokenManifest
from sae_runtime.data.token_folder.reader import TokenFolder
from sae_runtime.data.token_folder.tokenize import TokenizeConfig, TokenizeProgress, tokenize
from sae_runtime.settings import read_settings
from service.cli.parser import CommandError
from service.cli.setting_flags import add_setting_flags, given_settings, settings_errors
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.tables import fact_table, print_table

_LOG_INTERVAL_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize text once, into a folder that `saeserve train --data FOLDER` maps into memory. The same command "
        "resumes an interrupted run after its last finished file."
    )
    parser.add_argument("source", nargs="*", metavar="SOURCE", help="the same as --sources")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="YAML file of settings; flags win over it")
    parser.add_argument("--restart", action="store_true", help="delete an unfinished folder and start again")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only verify the checksums of a finished folder")
    add_json_argument(parser)
    add_setting_flags(parser, TokenizeConfig)


def run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.check is not None:
            folder, path = TokenFolder(arguments.check), arguments.check
            folder.check_sums()
            manifest = folder.manifest
        else:
            config = read_config(arguments)
            path = config.out
            with _Display(open_console(stderr=True)) as display:
                manifest = tokenize(config, display.show, restart=arguments.restart)
    except KeyboardInterrupt:
        print("Stopped. The same command resumes after the last finished file.", file=sys.stderr)
        raise
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    figures = _figures(manifest)
    if arguments.json:
        print_json({"path": str(path), **figures})
        return 0
    console = open_console()
    console.print(f"{'Verified' if arguments.check else 'Wrote'} {path}", soft_wrap=True)
    rows = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in figures.items()}
    print_table(console, fact_table(rows))
    if not arguments.check:
        console.print(f"Train on it: saeserve train --data {path} ...", soft_wrap=True)
    return 0


def read_config(arguments: argparse.Namespace) -> TokenizeConfig:
    """Settings of the file and the flags.

    Raises:
        CommandError: settings are unknown, missing or wrong; names all of them.
    """
    flags = given_settings(arguments, TokenizeConfig)
    if arguments.source:
        flags["sources"] = arguments.source
    with settings_errors():
        return read_settings(TokenizeConfig, arguments.config, flags)


def _figures(manifest: TokenManifest) -> dict[str, str | int]:
    return {
        "training tokens": manifest.tokens("train"),
        "training documents": manifest.documents("train"),
        "held-out tokens": manifest.tokens("held_out"),
        "held-out documents": manifest.documents("held_out"),
        "context length": manifest.context_length,
        "tokenizer": f"{manifest.tokenizer.backbone} {manifest.tokenizer.fingerprint[:16]}",
        "fingerprint": manifest.fingerprint[:16],
    }


class _Display:
    """A progress bar on a terminal, a line every 10 seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("tokenize"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("tokenize", total=1.0, figures="")
        self._line_at = time.monotonic()

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, event: TokenizeProgress) -> None:
        figures = f"{event.tokens:,} tokens  {event.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=event.share, figures=figures)
        if not self._console.is_terminal and time.monotonic() - self._line_at > _LOG_INTERVAL_S:
            self._line_at = time.monotonic()
            self._console.print(f"tokenize {event.share:.0%}  {figures}", soft_wrap=True)
