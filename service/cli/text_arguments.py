"""Texts on the command line: as arguments, from files, from standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from service.cli.parser import CommandError


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", metavar="TEXT", help="a text")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="read a text from a file; - is standard input (can be repeated)",
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
        CommandError: a file cannot be read.
    """
    for file in files:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"cannot read {file}: {error}") from error
        if lines:
            yield from (line for line in text.splitlines() if line.strip())
        else:
            yield text
