"""What the commands that measure effects share: texts, tokens, features, plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae_runtime.evaluation.plots import MissingPlotLibrary
from service.cli.command_error import CommandError
from service.cli.features import read_files
from service.client import Client, SaeserveError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from service.client.options import Token


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts to measure on")
    parser.add_argument(
        "--file", action="append", default=[], metavar="FILE", help="the text of a file; - is standard input"
    )
    parser.add_argument(
        "--lines", action="store_true", help="make each line of the files that has words a text of its own"
    )
    add_truncate_argument(parser)


def add_truncate_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of failing")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the result")
    parser.add_argument("--json", action="store_true", help="print JSON")


def read_texts(arguments: argparse.Namespace, command: str) -> list[str]:
    """The texts of the command line; CommandError if there are none."""
    texts = [*arguments.text, *read_files(arguments.file, arguments.lines)]
    if not texts:
        raise CommandError(f'no text; try: saeserve {command} "The cat sat on the mat."', exit_code=2)
    return texts


def token(text: str) -> Token:
    """A token of the command line: its text, or #ID."""
    if text.startswith("#") and text[1:].isascii() and text[1:].isdigit() and int(text[1:]) < 2**32:
        return int(text[1:])
    if not text:
        raise argparse.ArgumentTypeError("a token is empty, expected its text, such as ' Paris', or #ID")
    return text


def name_tokens(client: Client, ids: Sequence[int]) -> list[str]:
    """How tokens look, by the server's tokenizer; their numbers where it has none."""
    if not ids:
        return []
    from service.cli.token_view import visible

    dictionaries = client.server_info().dictionaries
    try:
        reply = client.extract_features([list(ids)], dictionaries[:1], top_k=1, tokens=True)
    except SaeserveError:
        return [f"#{each}" for each in ids]
    tokens = reply[0].tokens
    return [f"#{each}" for each in ids] if tokens is None else [visible(piece) for piece in tokens.pieces]


def draw_plot(path: Path | None, draw: Callable[[Figure], None]) -> None:
    """Writes a PNG, if a path was given.

    Raises:
        CommandError: matplotlib is not installed, or the file cannot be written.
    """
    if path is None:
        return
    try:
        from service.cli.causal_plots import write_png

        write_png(path, draw)
    except MissingPlotLibrary as error:
        raise CommandError(f"--plot: {error}") from error
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
