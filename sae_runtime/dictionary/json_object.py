"""Reads the JSON object in a file, strictly."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in a file's content: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    ValueError: no JSON or no object, a key that an object has twice, NaN or an infinity, or nested too deeply.
    """
    try:
        value = json.loads(content, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}, expected an object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
