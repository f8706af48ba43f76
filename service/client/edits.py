"""Edits of features as data. Light on purpose: the client must not import torch, where the library's own Edit lives.

    edits = [set_feature("resid-mid", 123, 2.0, unit="max"), ablate_feature("resid-mid", 7)]

Units: "raw" is the dictionary's activation units, "max" multiples of the feature's recorded maximum. Positions: "all",
"prompt", "generated", or explicit 0-based token positions. `where` = (feature, threshold) limits an edit to tokens on
which that feature of the same dictionary exceeds the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Operation = Literal["set", "add", "scale", "clamp", "ablate_zero", "ablate_mean"]
Unit = Literal["raw", "max"]
Positions = Literal["all", "prompt", "generated"] | tuple[int, ...]


@dataclass(frozen=True)
class Condition:
    """Holds on tokens where the feature's activation is larger than the threshold (raw units, at least 0)."""

    feature: int
    threshold: float


@dataclass(frozen=True)
class Edit:
    """One change of one feature; the functions below make them."""

    dictionary: str
    feature: int
    operation: Operation
    value: float = 0.0
    """set: the activation. add: what is added. scale: the factor. Not used by the others."""
    minimum: float | None = None
    """clamp: the lower bound."""
    maximum: float | None = None
    """clamp: the upper bound."""
    unit: Unit = "raw"
    """Of value, minimum and maximum; a scale has none."""
    positions: Positions = "all"
    condition: Condition | None = None


Where = tuple[int, float] | None


def set_feature(
    dictionary: str,
    feature: int,
    value: float,
    *,
    unit: Unit = "raw",
    positions: Positions | Sequence[int] = "all",
    where: Where = None,
) -> Edit:
    """The activation becomes `value`."""
    return _edit(dictionary, feature, "set", positions, where, value=value, unit=unit)


def add_to_feature(
    dictionary: str,
    feature: int,
    value: float,
    *,
    unit: Unit = "raw",
    positions: Positions | Sequence[int] = "all",
    where: Where = None,
) -> Edit:
    """`value` is added to the activation."""
    return _edit(dictionary, feature, "add", positions, where, value=value, unit=unit)


def scale_feature(
    dictionary: str, feature: int, factor: float, *, positions: Positions | Sequence[int] = "all", where: Where = None
) -> Edit:
    """The activation is multiplied by `factor`."""
    return _edit(dictionary, feature, "scale", positions, where, value=factor)


def clamp_feature(
    dictionary: str,
    feature: int,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: Unit = "raw",
    positions: Positions | Sequence[int] = "all",
    where: Where = None,
) -> Edit:
    """The activation is kept inside the bounds, of which at least one must be given."""
    if minimum is None and maximum is None:
        raise ValueError("clamp_feature needs minimum, maximum or both")
    return _edit(dictionary, feature, "clamp", positions, where, minimum=minimum, maximum=maximum, unit=unit)


def ablate_feature(
    dictionary: str,
    feature: int,
    to: Literal["zero", "mean"] = "zero",
    *,
    positions: Positions | Sequence[int] = "all",
    where: Where = None,
) -> Edit:
    """The activation becomes zero, or the feature's recorded mean."""
    return _edit(dictionary, feature, "ablate_mean" if to == "mean" else "ablate_zero", positions, where)


def _edit(
    dictionary: str,
    feature: int,
    operation: Operation,
    positions: Positions | Sequence[int],
    where: Where,
    *,
    value: float = 0.0,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: Unit = "raw",
) -> Edit:
    return Edit(
        dictionary,
        feature,
        operation,
        value=value,
        minimum=minimum,
        maximum=maximum,
        unit=unit,
        positions=positions if isinstance(positions, str) else tuple(positions),
        condition=None if where is None else Condition(*where),
    )
