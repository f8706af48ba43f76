"""Conditions as text: `resid-mid:12 > 0.5 and (7 <= 0 or 9 > 2 max)`.

    condition  ::= both ("or" both)*
    both       ::= one ("and" one)*
    one        ::= "(" condition ")" | FEATURE (">" | "<=") NUMBER ["max"]
    FEATURE    ::= [DICTIONARY ":"] number

A feature without a dictionary belongs to the edit's dictionary. With `max` the threshold is in multiples of the
feature's recorded maximum.
"""

from __future__ import annotations

import math
import re

from sae_runtime.edits.edit import AllOf, AnyOf, Condition, Where

_TOKEN = re.compile(r"\s*(\(|\)|<=|>|[^\s()<>=]+)")
FORM = "FEATURE > NUMBER or FEATURE <= NUMBER, joined by and, or and parentheses, such as '12 > 0.5 and 7 <= 0'"


def parse_condition(text: str) -> Where:
    """Reads a condition.

    Raises:
        ValueError: the text is no condition; the message says where.
    """
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text!r} is no condition at {text[at:].strip()!r}; expected {FORM}")
        tokens.append(match[1])
        at = match.end()
    parser = _Parser(text, tokens)
    where = parser.condition()
    if parser.tokens:
        raise parser.error(f"{parser.tokens[0]!r} follows its end")
    return where


class _Parser:
    """A method for each rule of the grammar. `tokens` are those not yet read."""

    def __init__(self, text: str, tokens: list[str]) -> None:
        self.text, self.tokens = text, tokens

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.text!r} is no condition: {problem}; expected {FORM}")

    def take(self) -> str:
        if not self.tokens:
            raise self.error("it ends too early")
        return self.tokens.pop(0)

    def condition(self) -> Where:
        alternatives = [self.both()]
        while self.tokens[:1] == ["or"]:
            self.take()
            alternatives.append(self.both())
        return alternatives[0] if len(alternatives) == 1 else AnyOf(tuple(alternatives))

    def both(self) -> Where:
        conditions = [self.one()]
        while self.tokens[:1] == ["and"]:
            self.take()
            conditions.append(self.one())
        return conditions[0] if len(conditions) == 1 else AllOf(tuple(conditions))

    def one(self) -> Where:
        token = self.take()
        if token == "(":
            inner = self.condition()
            if self.take() != ")":
                raise self.error("a parenthesis is not closed")
            return inner
        dictionary, _, number = token.rpartition(":")
        if not (number.isascii() and number.isdigit() and int(number) < 2**32):
            raise self.error(f"{token!r} is not a feature")
        comparison = self.take()
        if comparison not in (">", "<="):
            raise self.error(f"{comparison!r} is not a comparison")
        threshold_text = self.take()
        try:
            threshold = float(threshold_text)
        except ValueError:
            threshold = math.nan
        if not math.isfinite(threshold):
            raise self.error(f"{threshold_text!r} is not a number")
        in_maxima = self.tokens[:1] == ["max"]
        if in_maxima:
            self.take()
        return Condition(
            int(number),
            threshold,
            dictionary or None,
            "above" if comparison == ">" else "at_most",
            "max" if in_maxima else "raw",
        )


def format_condition(where: Where) -> str:
    """The text of a condition, which `parse_condition` reads back."""
    if isinstance(where, Condition):
        feature = f"{where.dictionary}:{where.feature}" if where.dictionary else str(where.feature)
        sign, unit = ">" if where.comparison == "above" else "<=", " max" if where.unit == "max" else ""
        return f"{feature} {sign} {repr(where.threshold).removesuffix('.0')}{unit}"
    word = " or " if isinstance(where, AnyOf) else " and "
    return word.join(
        format_condition(inner) if isinstance(inner, Condition) else f"({format_condition(inner)})"
        for inner in where.conditions
    )
