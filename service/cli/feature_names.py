"""Features as people write them: `123`, or `resid-mid:123` where the dictionary is part of the name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.cli.command_error import CommandError


@dataclass(frozen=True)
class FeatureName:
    dictionary: str | None
    feature: int


def feature_name(text: str) -> FeatureName:
    """Parses a command line's `[DICTIONARY:]FEATURE`."""
    dictionary, _, number = text.rpartition(":")
    if not (number.isascii() and number.isdigit() and int(number) < 2**32):
        raise argparse.ArgumentTypeError(f"{text!r} is not a feature, such as 123 or resid-mid:123")
    return FeatureName(dictionary or None, int(number))


def dictionary_of(name: FeatureName, default: str | None, loaded: Callable[[], Iterable[str]]) -> str:
    """The dictionary that a feature belongs to: its own, else `default`, else the only one that is loaded.

    Raises:
        CommandError: several are loaded, or none.
    """
    if name.dictionary or default:
        return name.dictionary or default or ""
    names = list(loaded())
    if len(names) != 1:
        raise CommandError(
            f"feature {name.feature} of which dictionary? Loaded: {', '.join(names) or 'none'}. "
            f"Give --dictionary, or write DICTIONARY:{name.feature}",
            exit_code=2,
        )
    return names[0]
