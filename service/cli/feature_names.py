"""Features on the command line: `123`, or `resid-mid:123` with the dictionary's name."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from service.cli.parser import WRONG_USAGE, CommandError
from service.client import Client


@dataclass(frozen=True)
class FeatureName:
    dictionary: str | None
    feature: int


def feature_name(text: str) -> FeatureName:
    """The type of `[DICTIONARY:]FEATURE`."""
    dictionary, _, number = text.rpartition(":")
    if not (number.isascii() and number.isdigit() and int(number) < 2**32):
        raise argparse.ArgumentTypeError(f"{text!r} is not a feature, such as 123 or resid-mid:123")
    return FeatureName(dictionary or None, int(number))


def add_dictionaries_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dictionary", action="append", default=[], metavar="NAME", help="use this dictionary (can be repeated) [all]"
    )


def dictionary_of(name: FeatureName, default: str | None, client: Client) -> str:
    """The dictionary that a feature names, or `default`, or the only one that the server has loaded.

    Raises:
        CommandError: the server has loaded several, or none.
    """
    dictionary = name.dictionary or default
    if dictionary:
        return dictionary
    loaded = client.server_info().dictionaries
    if len(loaded) != 1:
        raise CommandError(
            f"feature {name.feature} of which dictionary? Loaded: {', '.join(loaded) or 'none'}. "
            f"Give --dictionary, or write DICTIONARY:{name.feature}",
            WRONG_USAGE,
        )
    return loaded[0]
