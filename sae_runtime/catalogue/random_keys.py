"""Random numbers that belong to things, not to an order: the same thing has the same number in every run."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def random_bits(seed: int, purpose: str, *numbers: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """64 random bits for each tuple of numbers (arrays of one shape, whole, at least 0), by SplitMix64."""
    start = seed & _MASK
    for byte in purpose.encode():
        start = (start * 31 + byte + _GOLDEN) & _MASK
    state = np.full(np.broadcast_shapes(*(np.shape(n) for n in numbers)), start, np.uint64)
    for number in numbers:
        state = _mixed(state ^ np.asarray(number).astype(np.uint64))
    return state


def random_keys(seed: int, purpose: str, *numbers: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The same as numbers above 0 and at most 1, in steps of 2^-24."""
    bits = random_bits(seed, purpose, *numbers) >> np.uint64(40)
    return (bits.astype(np.float32) + np.float32(1)) / np.float32(2**24)


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = state + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
