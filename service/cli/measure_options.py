"""Options of the commands that measure effects: tokens by their text, and plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae_runtime.evaluation.plots import MissingPlotLibrary
from service.cli.parser import CommandError
from service.cli.view.output import add_json_argument
from service.cli.view.plots import write_png
from service.cli.view.tokens import visible
from service.client import Client, SaeserveError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from service.client.options import Token

MEASURE_TIMEOUT_S = 300.0
"""A study runs many variants of a text, and long texts take a while."""


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the result")
    add_json_argument(parser)


def add_logit_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--logit-token",
        action="append",
        default=[],
        type=token,
        metavar="TOKEN",
        help="also show the logit of this token: its text, such as ' Paris', or #ID (can be repeated)",
    )


def token(text: str) -> Token:
    """A token on the command line: its text, or #ID."""
    if text.startswith("#") and text[1:].isascii() and text[1:].isdigit() and int(text[1:]) < 2**32:
        return int(text[1:])
    if not text:
        raise argparse.ArgumentTypeError("a token is empty, expected its text, such as ' Paris', or #ID")
    return text


def name_tokens(client: Client, ids: Sequence[int]) -> list[str]:
    """The text of each token, by the server's tokenizer; #ID where it has none."""
    if not ids:
        return []
    dictionaries = client.server_info().dictionaries
    try:
        reply = client.extract_features([list(ids)], dictionaries[:1], top_k=1, tokens=True)
    except SaeserveError:
        return [f"#{token_id}" for token_id in ids]
    tokens = reply[0].tokens
    return [f"#{token_id}" for token_id in ids] if tokens is None else [visible(piece) for piece in tokens.pieces]


def draw_plot(path: Path | None, draw: Callable[[Figure], None]) -> None:
    """Writes a PNG if a path was given.

    Raises:
        CommandError: matplotlib is not installed, or the file cannot be written.
    """
    if path is None:
        return
    try:
        write_png(path, draw)
    except MissingPlotLibrary as error:
        raise CommandError(f"--plot: {error}") from error
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
