"""Sentences on a terminal or in a pipe, and the --json output of commands."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text


def open_console(*, stderr: bool = False) -> Console:
    """Standard output (or standard error) for text that is shown as it is: without markup or :emoji:."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def has_width(console: Console) -> bool:
    """Whether output must fit a width: on a terminal, and where COLUMNS is set. Elsewhere a row is a line."""
    return console.is_terminal or "COLUMNS" in os.environ


def print_sentence(console: Console, text: str, style: str = "") -> None:
    """Prints text that breaks between words where output has a width, and stays on its line elsewhere."""
    console.print(Text(text, style=style), soft_wrap=not has_width(console))


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(value: Any) -> None:
    """One JSON document on one line of standard output; dataclasses become objects, arrays lists, times ISO 8601."""
    print(json.dumps(value, default=_plain, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
