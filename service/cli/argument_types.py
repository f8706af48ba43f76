"""Types of command-line values, with messages that say what was expected."""

from __future__ import annotations

import argparse


def natural(text: str, bits: int = 32) -> int:
    """A whole number from 0 that fits the API's fields."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**bits):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**bits - 1:,}")
    return int(text)


def seed(text: str) -> int:
    return natural(text, bits=64)


def seconds(text: str) -> float:
    """More than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
