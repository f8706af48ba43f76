"""Edits as data: what may be said about one change of one latent, and what is wrong by itself. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

_Wrong = Callable[[str, str], "InvalidEdit"]
"""Makes the error of a field and what is wrong with it."""
Operation = Literal["set", "add", "scale", "clamp", "ablate_zero", "ablate_mean", "resample", "replace"]
OPERATIONS: tuple[str, ...] = get_args(Operation)
Unit = Literal["raw", "max"]
ReferenceTokens = Literal["last", "aligned", "mean", "max"]
Comparison = Literal["above", "at_most"]
Occurrence = Literal["first", "each"]
POSITION_NAMES: tuple[str, ...] = ("all", "prompt", "generated", "last")
MAX_CONDITION_DEPTH = 4
"""Combinations of conditions inside one another."""
MAX_CONDITION_TERMS = 16
"""Thresholds in one edit's condition."""
MAX_AFTER_TEXT_BYTES = 256
"""UTF-8 bytes of the text of AfterText."""


class InvalidEdit(ValueError):
    """A field of an edit is wrong; `field` names it and `index` is the edit's place in its list, where known."""

    def __init__(self, field: str, message: str, index: int | None = None) -> None:
        where = field if index is None else f"edits[{index}].{field}"
        super().__init__(f"{where}: {message}")
        self.field, self.reason, self.index = field, message, index


@dataclass(frozen=True)
class AfterText:
    """Positions of the tokens that follow a text: their first byte is at the end of an occurrence, or later.

    The text is sought in the bytes of all tokens of the row, prompt and generated ones, so it may lie across tokens;
    where it ends inside a token, that token is not covered. Occurrences may overlap.
    """

    text: str
    occurrence: Occurrence = "first"
    max_tokens: int | None = None  # so many tokens after an occurrence; None: to the end of the row, "first" only


Positions = Literal["all", "prompt", "generated", "last"] | tuple[int, ...] | AfterText


@dataclass(frozen=True)
class Condition:
    """Holds on the tokens on which a latent is above a threshold, or at most at it (before any edit at its site)."""

    feature: int
    threshold: float = 0.0  # in `unit`
    dictionary: str | None = None  # at the edit's site or an earlier one; None: the edit's own
    comparison: Comparison = "above"  # "at_most" is the opposite: with threshold 0, the latent is not active
    unit: Unit = "raw"  # latent activation units, or × the recorded maximum


@dataclass(frozen=True)
class AllOf:
    """Holds where all of the conditions hold."""

    conditions: tuple[Where, ...]


@dataclass(frozen=True)
class AnyOf:
    """Holds where at least one of the conditions holds."""

    conditions: tuple[Where, ...]


Where = Condition | AllOf | AnyOf


def terms(where: Where | None) -> Iterator[Condition]:
    """The thresholds of a condition, from left to right."""
    if isinstance(where, Condition):
        yield where
    elif where is not None:
        for inner in where.conditions:
            yield from terms(inner)


@dataclass(frozen=True)
class Reference:
    """A text whose activation a latent takes (operation "resample"); it runs once, unedited, before the edited row."""

    text: str | tuple[int, ...]  # or token ids
    tokens: ReferenceTokens = "last"  # which of its tokens: "aligned" is the one at the same position


@dataclass(frozen=True)
class Edit:
    """One change to one latent. Positions count tokens from the start of the row, 0-based, across cached decoding.

    set: z' = value.  add: z' = z + value.  scale: z' = value * z.  clamp: z' = z limited to [minimum, maximum].
    ablate_zero: z' = 0.  ablate_mean: z' = the latent's mean over all tokens.  resample: z' = the latent on a reference
    text, see `resolve_references`.  replace: not of a latent; h' is the dictionary's reconstruction from all z', which
    loses what the dictionary does not explain.
    """

    dictionary: str
    feature: int  # of replace: 0
    operation: Operation
    value: float = 0.0  # of set, add and scale
    minimum: float | None = None  # of clamp, at least one of the two
    maximum: float | None = None
    unit: Unit = "raw"  # of set, add and clamp: latent activation units, or × the recorded maximum
    positions: Positions = "all"  # "prompt": below the row's prompt length, "generated": from there on
    condition: Where | None = None
    reference: Reference | None = None  # of resample
    values: tuple[float, ...] | None = None  # of set, instead of value: one for each position; none beyond their end

    def validate(self, index: int | None = None) -> None:
        """InvalidEdit names the first field that is wrong by itself; `check_edits` also looks at the dictionary."""

        def wrong(field: str, message: str) -> InvalidEdit:
            return InvalidEdit(field, message, index)

        if not self.dictionary:
            raise wrong("dictionary", "is empty, expected a dictionary's name")
        if not is_index(self.feature):
            raise wrong("feature", f"is {self.feature!r}, expected a latent index, 0 or more")
        if self.operation not in OPERATIONS:
            raise wrong("operation", f"is {self.operation!r}, expected one of {', '.join(OPERATIONS)}")
        if self.operation == "replace" and self.feature:
            raise wrong("feature", f"is {self.feature}, but replace is of the whole dictionary; expected 0")
        self._validate_numbers(wrong)
        self._validate_positions(wrong)
        if self.operation == "resample":
            if self.reference is None:
                raise wrong("reference", "is missing; resample needs a reference text")
            if not self.reference.text:
                raise wrong("reference", "has no tokens, expected at least one")
            if self.reference.tokens not in get_args(ReferenceTokens):
                expected = ", ".join(get_args(ReferenceTokens))
                raise wrong("reference", f"tokens is {self.reference.tokens!r}, expected one of {expected}")
        elif self.reference is not None:
            raise wrong("reference", f"belongs to resample, the operation is {self.operation}")
        if self.condition is not None:
            _validate_condition(self.condition, wrong, depth=0)
            n = sum(1 for _ in terms(self.condition))
            if n > MAX_CONDITION_TERMS:
                raise wrong("condition", f"has {n} thresholds, more than {MAX_CONDITION_TERMS}")

    def _validate_numbers(self, wrong: _Wrong) -> None:
        for field in ("value", "minimum", "maximum"):
            number = getattr(self, field)
            if number is not None and not math.isfinite(number):
                raise wrong(field, f"is {number}, expected a finite number")
        if self.operation == "clamp":
            if self.minimum is None and self.maximum is None:
                raise wrong("minimum", "clamp needs a minimum, a maximum or both")
            if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
                raise wrong("minimum", f"is {self.minimum}, above the maximum {self.maximum}")
        elif self.minimum is not None or self.maximum is not None:
            field = "minimum" if self.minimum is not None else "maximum"
            raise wrong(field, f"belongs to clamp, the operation is {self.operation}")
        if self.operation not in ("set", "add", "scale") and self.value != 0:
            raise wrong("value", f"is {self.value}, but {self.operation} takes no value")
        if self.unit not in ("raw", "max"):
            raise wrong("unit", f"is {self.unit!r}, expected 'raw' or 'max'")
        if self.unit == "max" and self.operation not in ("set", "add", "clamp"):
            raise wrong("unit", f"'max' applies to set, add and clamp, the operation is {self.operation}")
        if self.values is not None:
            if self.operation != "set" or self.value != 0:
                raise wrong("values", "belongs to set, without a value")
            if not self.values or not all(map(math.isfinite, self.values)):
                raise wrong("values", "expected one finite number or more")

    def _validate_positions(self, wrong: _Wrong) -> None:
        positions = self.positions
        if isinstance(positions, AfterText):
            if not positions.text:
                raise wrong("positions", "after an empty text, expected at least one character")
            size = len(positions.text.encode(errors="replace"))
            if size > MAX_AFTER_TEXT_BYTES:
                raise wrong("positions", f"after a text of {size} bytes, more than {MAX_AFTER_TEXT_BYTES}")
            if positions.occurrence not in ("first", "each"):
                raise wrong("positions", f"occurrence is {positions.occurrence!r}, expected 'first' or 'each'")
            if positions.max_tokens is not None and (not is_index(positions.max_tokens) or positions.max_tokens == 0):
                raise wrong("positions", f"max_tokens is {positions.max_tokens!r}, expected 1 or more")
            if positions.max_tokens is None and positions.occurrence == "each":
                raise wrong("positions", "after each occurrence, but without max_tokens that is after the first")
        elif isinstance(positions, tuple):
            if not positions:
                raise wrong("positions", "is empty, expected token positions or " + _NAMES)
            for position in positions:
                if not is_index(position):
                    raise wrong("positions", f"holds {position!r}, expected token positions, 0 or more")
        elif positions not in POSITION_NAMES:
            raise wrong("positions", f"is {positions!r}, expected {_NAMES}, AfterText or token positions")

    def with_reference_values(self, z: tuple[float, ...]) -> Edit:
        """A resample edit as the set edit that it comes to; z holds the latent's value on each reference token."""
        assert self.reference is not None, "only resample edits have a reference"
        plain = replace(self, operation="set", reference=None)
        match self.reference.tokens:
            case "aligned":
                return replace(plain, values=z)
            case "last":
                return replace(plain, value=z[-1])
            case "max":
                return replace(plain, value=max(z))
            case _:
                return replace(plain, value=math.fsum(z) / len(z))


_NAMES = ", ".join(map(repr, POSITION_NAMES))


def is_index(value: object) -> bool:
    """Whether a value is an integer of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _validate_condition(where: Where, wrong: _Wrong, depth: int) -> None:
    if not isinstance(where, Condition):
        if not where.conditions:
            raise wrong("condition", "combines no conditions, expected at least one")
        if depth == MAX_CONDITION_DEPTH:
            raise wrong("condition", f"has combinations more than {MAX_CONDITION_DEPTH} inside one another")
        for inner in where.conditions:
            _validate_condition(inner, wrong, depth + 1)
        return
    if not is_index(where.feature):
        raise wrong("condition", f"feature is {where.feature!r}, expected a latent index, 0 or more")
    if not math.isfinite(where.threshold):
        raise wrong("condition", f"threshold is {where.threshold}, expected a finite number")
    if where.dictionary == "":
        raise wrong("condition", "dictionary is empty, expected a name, or None for the edit's own")
    if where.comparison not in ("above", "at_most"):
        raise wrong("condition", f"comparison is {where.comparison!r}, expected 'above' or 'at_most'")
    if where.unit not in ("raw", "max"):
        raise wrong("condition", f"unit is {where.unit!r}, expected 'raw' or 'max'")
