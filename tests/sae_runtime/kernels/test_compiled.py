"""Compiled loops: what they give, and that a missing cache is no error."""

from __future__ import annotations

import math

import numpy as np

from sae_runtime.kernels.compiled import compiled


@compiled
def largest(values: np.ndarray) -> float:
    """The largest of the values."""
    found = -np.inf
    for value in values:
        found = max(found, value)
    return found


def test_gives_what_the_function_gives() -> None:
    assert largest(np.array([1.0, 7.0, 3.0])) == 7.0
    assert largest(np.array([], np.float32)) == -math.inf
    assert largest.__doc__ == "The largest of the values."


def test_compiles_where_nothing_can_be_kept() -> None:
    names: dict = {}
    exec("def doubled(x):\n    return 2 * x", names)  # of no file, beside which it could be kept
    assert compiled(names["doubled"])(21) == 42
