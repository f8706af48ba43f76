"""Refuses keys of a configuration that may change what the dictionary computes and that are not read."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path

from sae_runtime.errors import DictionaryFormatError


def key_set(names: str) -> frozenset[str]:
    """The keys in a text, separated by white space."""
    return frozenset(names.split())


def check_keys(
    file: Path,
    config: Mapping[str, object],
    known: Collection[str],
    neutral: Mapping[str, Collection[object]] | None = None,
    *,
    where: str = "",
) -> None:
    """Checks the keys of a configuration; a value of null says nothing and is always allowed.

    Args:
        known: keys that are read, or that concern only training or description.
        neutral: keys that are not read, with the values at which they change nothing.
        where: the configuration's place in the file, such as "trainer.".

    Raises:
        DictionaryFormatError: a key of neither kind, or one with another value than its neutral ones.
    """
    for key, value in config.items():
        allowed = (neutral or {}).get(key)
        if value is None or key in known or (allowed is not None and _is_one_of(value, allowed)):
            continue
        shown = f"{file}: {where}{key} is {reprlib.repr(value)}"
        if allowed is None:
            raise DictionaryFormatError(
                f"{shown}, an unknown key, which may change what the dictionary computes; remove it if it does not"
            )
        expected = " or ".join(map(json.dumps, [*allowed, None]))
        raise DictionaryFormatError(f"{shown}, which is not supported; expected {expected}")


def _is_one_of(value: object, allowed: Collection[object]) -> bool:
    """Equality in JSON's sense: 1 is 1.0 and is not true."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)
