"""Edits of features: the library's classes, which need no torch, and functions that make them.

    edits = [
        set_feature("resid-mid", 123, 2.0, unit="max", where="7 > 0.5 and resid-late:9 <= 0"),
        ablate_feature("resid-mid", 7, positions=AfterText("Once upon a time")),
    ]

Units: "raw" is the dictionary's activation units, "max" multiples of the feature's recorded maximum. Positions: "all",
"prompt", "generated", "last" (the prompt's last token), 0-based token positions, or AfterText. `where` limits an edit
to tokens on which a condition holds: a text (service/edits/conditions.py has its form), Condition, AllOf or AnyOf, or
(feature, threshold), which holds where that feature of the same dictionary is above the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sae_runtime.edits.edit import (
    AfterText,
    AllOf,
    AnyOf,
    Condition,
    Edit,
    Operation,
    Positions,
    Reference,
    ReferenceTokens,
    Unit,
    Where,
)
from service.edits.conditions import parse_condition

__all__ = [
    "AfterText",
    "AllOf",
    "AnyOf",
    "Condition",
    "Edit",
    "Operation",
    "Positions",
    "Reference",
    "ReferenceTokens",
    "Unit",
    "Where",
    "ablate_feature",
    "add_to_feature",
    "clamp_feature",
    "replace_by_reconstruction",
    "resample_feature",
    "scale_feature",
    "set_feature",
]

PositionsArgument = Positions | Sequence[int]
WhereArgument = Where | str | tuple[int, float] | None


def set_feature(
    dictionary: str,
    feature: int,
    value: float,
    *,
    unit: Unit = "raw",
    positions: PositionsArgument = "all",
    where: WhereArgument = None,
) -> Edit:
    """The activation becomes `value`."""
    return _edit(dictionary, feature, "set", positions, where, value=value, unit=unit)


def add_to_feature(
    dictionary: str,
    feature: int,
    value: float,
    *,
    unit: Unit = "raw",
    positions: PositionsArgument = "all",
    where: WhereArgument = None,
) -> Edit:
    """`value` is added to the activation."""
    return _edit(dictionary, feature, "add", positions, where, value=value, unit=unit)


def scale_feature(
    dictionary: str,
    feature: int,
    factor: float,
    *,
    positions: PositionsArgument = "all",
    where: WhereArgument = None,
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
    positions: PositionsArgument = "all",
    where: WhereArgument = None,
) -> Edit:
    """The activation is kept within bounds, of which at least one must be given."""
    if minimum is None and maximum is None:
        raise ValueError("clamp_feature needs minimum, maximum or both")
    return _edit(dictionary, feature, "clamp", positions, where, minimum=minimum, maximum=maximum, unit=unit)


def ablate_feature(
    dictionary: str,
    feature: int,
    to: Literal["zero", "mean"] = "zero",
    *,
    positions: PositionsArgument = "all",
    where: WhereArgument = None,
) -> Edit:
    """The activation becomes zero, or the feature's recorded mean."""
    return _edit(dictionary, feature, "ablate_mean" if to == "mean" else "ablate_zero", positions, where)


def resample_feature(
    dictionary: str,
    feature: int,
    reference: str | Sequence[int],
    tokens: ReferenceTokens = "last",
    *,
    positions: PositionsArgument = "all",
    where: WhereArgument = None,
) -> Edit:
    """The activation becomes the feature's activation on a reference text (or token ids).

    Args:
        tokens: which activation of the reference: of its "last" token, the "mean" or "max" over its tokens, or
            "aligned": of the token at the same position. Positions after the reference's end are then not edited.
    """
    text = reference if isinstance(reference, str) else tuple(int(token) for token in reference)
    return _edit(dictionary, feature, "resample", positions, where, reference=Reference(text, tokens))


def replace_by_reconstruction(
    dictionary: str, *, positions: PositionsArgument = "all", where: WhereArgument = None
) -> Edit:
    """The dictionary's input becomes its reconstruction from edited features; the reconstruction error is lost."""
    return _edit(dictionary, 0, "replace", positions, where)


def _edit(
    dictionary: str,
    feature: int,
    operation: Operation,
    positions: PositionsArgument,
    where: WhereArgument,
    *,
    value: float = 0.0,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: Unit = "raw",
    reference: Reference | None = None,
) -> Edit:
    if isinstance(where, str):
        condition: Where | None = parse_condition(where)
    elif isinstance(where, tuple):
        condition = Condition(*where)
    else:
        condition = where
    return Edit(
        dictionary,
        feature,
        operation,
        value=value,
        minimum=minimum,
        maximum=maximum,
        unit=unit,
        positions=positions if isinstance(positions, str | AfterText) else tuple(positions),
        condition=condition,
        reference=reference,
    )
