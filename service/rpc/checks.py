"""What is wrong with a request: collected field by field, then raised at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from service.rpc.errors import Violation, invalid_argument, shown
from service.rpc.limits import Limits

if TYPE_CHECKING:
    from sae_runtime import Dictionary


class Violations:
    """The violations of one request so far. False while there are none."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self._found.append(Violation(field, description))

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        """RpcError INVALID_ARGUMENT that names them all."""
        if self._found:
            raise invalid_argument(self._found)

    def check_limit(self, field: str, amount: int, limit_name: str, described: str = "is {}") -> bool:
        """Whether an amount keeps to a limit of `Limits`; `described` says what the amount is."""
        limit = getattr(self._limits, limit_name)
        if amount > limit:
            self.add(field, f"{described.format(amount)}, more than {limit_name} = {limit}")
        return bool(amount <= limit)

    def check_at_most(self, field: str, count: int, limit_name: str) -> bool:
        """Whether a list has at most as many entries as a limit of `Limits` allows."""
        return self.check_limit(field, count, limit_name, "has {} entries")

    def check_count(self, field: str, count: int, limit_name: str) -> bool:
        """Whether a list has at least one entry, and at most as many as a limit of `Limits` allows."""
        if count == 0:
            self.add(field, "is empty; at least one is needed")
        return count > 0 and self.check_at_most(field, count, limit_name)

    def check_enum(self, field: str, value: int, known: Collection[int]) -> None:
        """Checks that an enum field has a value of the enum: proto3 lets any number through."""
        if value not in known:
            self.add(field, f"{value} is not a value of this enum")

    def check_range(self, field: str, value: float, most: float) -> None:
        """Checks that a number is in [0, most]."""
        if not (math.isfinite(value) and 0 <= value <= most):
            self.add(field, f"is {value}, expected a number in 0..{most:g}")

    def check_threshold(self, field: str, value: float) -> None:
        """Checks that a number can be a threshold of activations."""
        if not (math.isfinite(value) and value >= 0):
            self.add(field, f"is {value}, expected a finite number, at least 0")

    def check_distinct(self, field: str, values: Sequence[Any], described: Callable[[Any], str]) -> None:
        """Checks that a list has no value twice."""
        seen = set()
        for place, value in enumerate(values):
            if value in seen:
                self.add(f"{field}[{place}]", f"{described(value)} is named twice")
                return
            seen.add(value)

    def check_dictionary_name(self, name: str, field: str) -> None:
        """Checks that a dictionary is named, not that it is loaded."""
        if not name:
            self.add(field, "is empty, expected a dictionary's name")

    def check_dictionary_names(self, names: Sequence[str], field: str = "dictionaries") -> None:
        """Checks that one or more dictionaries are named, none twice, not that they are loaded."""
        if not self.check_count(field, len(names), "max_dictionaries"):
            return
        for place, name in enumerate(names):
            if not name:
                self.add(f"{field}[{place}]", "is empty")
        self.check_distinct(field, names, shown)

    def check_feature(self, feature: int, dictionary: Dictionary | None, field: str) -> None:
        """Checks that a dictionary, where it is known, has a feature."""
        if dictionary is not None and feature >= dictionary.n_latents:
            of = f"0..{dictionary.n_latents - 1} of {shown(dictionary.name)}"
            self.add(field, f"feature {feature} is outside {of}")
