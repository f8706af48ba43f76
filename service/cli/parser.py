"""The command line: its parser, the types of its values, and the error that ends a command.

The parser is argparse's. It also knows what a flag that is given twice means, and what other projects call our flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from sae_runtime.older_words import our_word

WRONG_USAGE = 2


class CommandError(Exception):
    """Ends a command with one line for the person at the terminal; exit code 2 if the command line is wrong."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CommandParser(argparse.ArgumentParser):
    """Reads one command line.

    A flag that takes a list gathers the values of all its occurrences. Any other flag that takes a value may be given
    once only: argparse would keep the last value without a word.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used: set[argparse.Action] = set()
        for name in (None, "store"):
            self.register("action", name, _Store)
        self._line: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown arguments here, where the hints are known, and not in the parser above."""
        self._line = list(args or ())
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the program: says what is wrong, and our names for flags of other projects."""
        lines = [f"{self.prog}: error: {message}", *self._hints(), f"`{self.prog} --help` lists all arguments."]
        self.exit(WRONG_USAGE, "\n".join(lines) + "\n")

    def _hints(self) -> Iterator[str]:
        arguments = {action.metavar for action in self._actions if not action.option_strings}
        for word in self._line:
            flag = word.partition("=")[0]
            ours = our_word(flag) if flag.startswith("--") and flag not in self._option_string_actions else None
            if ours is None:
                continue
            known = next((name for name in ours.flags if name in self._option_string_actions), None)
            if known is None and ours.argument in arguments:
                known = f"{ours.argument}, without a flag"
            yield f"{flag}: " + (ours.elsewhere if known is None else f"use {known}")


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
    """--flag and --no-flag, of which only one may be given."""

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
    """Whether a flag has occurred on this command line before. Records that it has now."""
    if option_string is None:  # a positional argument
        return False
    assert isinstance(parser, CommandParser)
    repeated = action in parser.used
    parser.used.add(action)
    return repeated


def natural(text: str, bits: int = 32) -> int:
    """The type of a whole number, 0 or more, that fits the API's fields."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**bits):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**bits - 1:,}")
    return int(text)


def seed(text: str) -> int:
    """The type of a seed: a natural number of 64 bits."""
    return natural(text, bits=64)


def seconds(text: str) -> float:
    """The type of a duration above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
