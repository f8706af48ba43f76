"""When a failed call is retried, and after how long.

The client does not use the retries of gRPC's service config: they stop at five attempts, silently skip requests larger
than a 256 KiB buffer, and ignore the delay that the server suggests in its error details.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.client.errors import ResourceExhausted, SaeserveError, Unavailable


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter. Only UNAVAILABLE is retried, so a call never runs twice to its end."""

    attempts: int = 4
    """At most this many attempts of one call; 1 never retries."""
    initial_backoff_s: float = 0.1
    """Mean wait before the second attempt."""
    multiplier: float = 2.0
    """Growth of the wait from one attempt to the next."""
    max_backoff_s: float = 2.0
    """Longest mean wait."""
    jitter: float = 0.3
    """Waits are drawn from mean * [1 - jitter, 1 + jitter]."""
    retry_exhausted: bool = False
    """Also retry RESOURCE_EXHAUSTED after the delay that the server gives (RetryInfo), if it gives one."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}, expected at least 1")


NO_RETRY = RetryPolicy(attempts=1)


class Attempts:
    """The attempts of one call, which share its timeout."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._uniform = uniform
        self._deadline = clock() + timeout_s  # inf: none
        self._failed = 0

    def remaining_s(self) -> float | None:
        """Seconds that the next attempt may take; None without a deadline."""
        remaining = self._deadline - self._clock()
        return None if math.isinf(remaining) else max(remaining, 0.0)

    def delay_after(self, error: SaeserveError) -> float | None:
        """Seconds to wait before the next attempt, or None if the call fails with this error."""
        self._failed += 1
        if self._failed >= self._policy.attempts:
            return None
        if isinstance(error, Unavailable):
            delay = max(self._backoff(), error.retry_after_s or 0.0)
        elif isinstance(error, ResourceExhausted) and self._policy.retry_exhausted and error.retry_after_s is not None:
            delay = error.retry_after_s
        else:
            return None
        # An attempt that the deadline ends at once would only hide the cause.
        return delay if self._clock() + delay < self._deadline else None

    def _backoff(self) -> float:
        policy = self._policy
        mean = min(policy.initial_backoff_s * policy.multiplier ** (self._failed - 1), policy.max_backoff_s)
        return mean * self._uniform(1 - policy.jitter, 1 + policy.jitter)
