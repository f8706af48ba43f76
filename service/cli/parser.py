"""The parser of every command: argparse, and what a flag that is given twice means."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Reads one command line.

    A flag that takes a list gathers the values of all its occurrences. Any other flag that takes a value is an error
    when it is given twice: argparse would keep the last value without a word.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: set[argparse.Action] = set()
        for name in (None, "store"):
            self.register("action", name, _Store)


class _Store(argparse._StoreAction):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if _is_repeated(self, parser, option_string):
            if not isinstance(values, list):
                raise argparse.ArgumentError(self, "given twice, expected once")
            values = [*getattr(namespace, self.dest), *values]
        super().__call__(parser, namespace, values, option_string)


class YesOrNo(argparse.BooleanOptionalAction):
    """--flag and --no-flag, of which one may be given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if _is_repeated(self, parser, option_string):
            raise argparse.ArgumentError(self, "given twice, expected once")
        super().__call__(parser, namespace, values, option_string)


def _is_repeated(action: argparse.Action, parser: argparse.ArgumentParser, option_string: str | None) -> bool:
    """Whether a flag stood on the command line before. Notes that it does now."""
    if option_string is None:  # a positional argument
        return False
    assert isinstance(parser, CommandParser)
    repeated = action in parser.given
    parser.given.add(action)
    return repeated
