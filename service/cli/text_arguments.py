"""Texts on the command line: as arguments, from files, from standard input."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae_runtime.data.text_files import DAMAGE, first_wrong_byte, open_text
from service.cli.parser import CommandError


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", metavar="TEXT", help="a text")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="read a text from a file (.gz, .xz and .zst are decompressed); - is standard input (can be repeated)",
    )
    parser.add_argument("--lines", action="store_true", help="take each line of the files as a text; skip blank lines")
    add_truncate_argument(parser)


def add_truncate_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of failing")


def read_texts(arguments: argparse.Namespace, command: str) -> list[str]:
    """The texts of a command line.

    Raises:
        CommandError: there are none, or a file cannot be read.
    """
    texts = [*arguments.text, *read_files(arguments.file, arguments.lines)]
    if not texts:
        raise CommandError(f'no text; try: saeserve {command} "The cat sat on the mat."', exit_code=2)
    return texts


def read_files(files: Sequence[str], lines: bool) -> Iterator[str]:
    """The text of each file, or with `lines` each of its lines that is not blank.

    Raises:
        CommandError: a file cannot be read, or is not UTF-8; names the line.
    """
    for file in files:
        try:
            text = _read(file)
        except (OSError, ModuleNotFoundError, *DAMAGE) as error:
            raise CommandError(f"cannot read {file}: {error}") from error
        if (wrong := first_wrong_byte(text)) is not None:
            raise CommandError(f"cannot read {file}:{wrong[0]}: {wrong[1]}")
        if lines:
            # Not splitlines: a form feed or U+2028 in a text does not end it.
            yield from (line for line in text.split("\n") if line.strip())
        else:
            yield text


def _read(file: str) -> str:
    raw = io.BytesIO(sys.stdin.buffer.read()) if file == "-" else Path(file).open("rb")  # noqa: SIM115
    with raw, open_text(raw, Path(file)) as text:
        return text.read()
