"""Random choices and confidence intervals that depend only on the seed and their purpose."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A separate random stream for each purpose: more draws for one do not change another."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def bootstrap_interval(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike | None = None,
    *,
    seed: int,
    purpose: str,
    resamples: int = 2_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of Σ numerator / Σ denominator over independent units (a mean without the latter).

    Args:
        numerator: [n], one value for each unit that is resampled as a whole: a row of text, a latent, a position.
        denominator: [n]; ones if not given.

    Returns:
        The two ends; both NaN without a unit.
    """
    top = np.asarray(numerator, np.float64)
    bottom = np.ones_like(top) if denominator is None else np.asarray(denominator, np.float64)
    n = len(top)
    if n == 0:
        return float("nan"), float("nan")
    rng = generator(seed, purpose)
    ratios = np.empty(resamples)
    for i in range(resamples):  # one draw at a time: n may be large
        drawn = rng.integers(0, n, n)
        ratios[i] = top[drawn].sum() / bottom[drawn].sum() if bottom[drawn].sum() else np.nan
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def with_interval(name: str, values: npt.ArrayLike, *, seed: int, resamples: int) -> dict[str, Any]:
    """Figures `name`, `name_low` and `name_high`: a mean over units with its 95 % interval; nothing without a unit."""
    units = np.asarray(values, np.float64)
    if len(units) == 0:
        return {}
    low, high = bootstrap_interval(units, seed=seed, purpose=name, resamples=resamples)
    return {name: float(units.mean()), f"{name}_low": low, f"{name}_high": high}
