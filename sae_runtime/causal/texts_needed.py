"""The number of texts that a contrast of two sets needs before a feature can pass its test. Needs no torch.

The clearest difference is a feature that fires on every one of the n_1 texts of one set, each time with another value,
and on none of the n_0 texts of the other. With n = n_1 + n_0, the test of `contrast_columns` then has

    U = n_1 n_0
    variance = n_1 n_0 / 12 · ((n + 1) − (n_0³ − n_0) / (n (n − 1)))
    z = (U / 2 − 1/2) / √variance
    p = erfc(z / √2)

If it is the only feature of m that differs, its q-value is p m.
"""

from __future__ import annotations

import math

_MOST = 1_000_000


def clearest_p_value(n_a: int, n_b: int) -> float:
    """p of the clearest difference between sets of n_a and n_b texts, if the feature is silent in the larger set."""
    n_1, n_0 = sorted((n_a, n_b))
    n = n_1 + n_0
    variance = n_1 * n_0 / 12 * ((n + 1) - (n_0**3 - n_0) / (n * (n - 1)))
    z = (n_1 * n_0 / 2 - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def texts_needed(n_tested: int, false_discovery_rate: float) -> int:
    """The least number of texts per set with which a single feature of `n_tested` can pass."""
    low, high = 1, 2  # low is too few
    while clearest_p_value(high, high) * n_tested > false_discovery_rate and high < _MOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        passes = clearest_p_value(middle, middle) * n_tested <= false_discovery_rate
        low, high = (low, middle) if passes else (middle, high)
    return high
