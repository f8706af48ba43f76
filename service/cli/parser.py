"""The parser of every command: argparse, what a flag that is given twice means, and hints for other projects' flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from sae_runtime.older_words import our_word

WRONG_USAGE = 2


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
        self._line: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing may be left over, so that this parser can say what is meant, and not the one above it."""
        self._line = list(args or ())
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Ends the program with what is wrong, and what flags of other projects are called here."""
        lines = [f"{self.prog}: error: {message}", *self._hints(), f"`{self.prog} --help` lists what there is."]
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
