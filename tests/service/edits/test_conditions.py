"""Conditions as text."""

import pytest

from sae_runtime.edits import AllOf, AnyOf, Condition
from service.edits.conditions import format_condition, parse_condition

PARSED = {
    "12 > 0.5": Condition(12, 0.5),
    "12>0.5": Condition(12, 0.5),
    "resid-mid:12 <= 0": Condition(12, 0.0, "resid-mid", "at_most"),
    "a:b:7 > 1e-2 max": Condition(7, 0.01, "a:b", "above", "max"),
    "1 > 2 and 3 > 4": AllOf((Condition(1, 2.0), Condition(3, 4.0))),
    "1 > 2 and 3 > 4 or 5 > 6": AnyOf((AllOf((Condition(1, 2.0), Condition(3, 4.0))), Condition(5, 6.0))),
    "1 > 2 and (3 > 4 or d:5<=6 max) and 7 > 8": AllOf(
        (
            Condition(1, 2.0),
            AnyOf((Condition(3, 4.0), Condition(5, 6.0, "d", "at_most", "max"))),
            Condition(7, 8.0),
        )
    ),
    "((1 > 2))": Condition(1, 2.0),
}


@pytest.mark.parametrize("text", PARSED)
def test_reading_and_writing(text: str) -> None:
    assert parse_condition(text) == PARSED[text]
    assert parse_condition(format_condition(PARSED[text])) == PARSED[text]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "it ends too early"),
        ("12", "it ends too early"),
        ("12 >", "it ends too early"),
        ("12 > x", "'x' is not a number"),
        ("12 > nan", "'nan' is not a number"),
        ("12 < 3", "'< 3'"),
        ("12 = 3", "'= 3'"),
        ("x > 3", "'x' is not a feature"),
        ("d: > 3", "'d:' is not a feature"),
        ("-1 > 3", "'-1' is not a feature"),
        ("1 > 2 3", "'3' follows its end"),
        ("1 > 2 and", "it ends too early"),
        ("(1 > 2", "it ends too early"),
        ("(1 > 2 4", "a parenthesis is not closed"),
        ("1 > 2)", "')' follows its end"),
    ],
)
def test_what_is_no_condition(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match="is no condition") as error:
        parse_condition(text)
    assert wrong in str(error.value)
