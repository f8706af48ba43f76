"""Violations of one request are collected field by field, and raised together."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from service.rpc.checks import Violations
from service.rpc.errors import RpcError
from service.rpc.limits import Limits

pytestmark = pytest.mark.any_cpu


def found(violations: Violations) -> list[tuple[str, str]]:
    with pytest.raises(RpcError) as raised:
        violations.raise_if_any()
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (details,) = raised.value.details
    assert isinstance(details, error_details_pb2.BadRequest)
    return [(violation.field, violation.description) for violation in details.field_violations]


def test_what_is_right_adds_nothing() -> None:
    violations = Violations(Limits(max_edits=2, max_dictionaries=2))
    assert violations.check_limit("a", 2, "max_edits")
    assert violations.check_at_most("a", 0, "max_edits")
    assert violations.check_count("a", 1, "max_edits")
    violations.check_enum("a", 1, (0, 1))
    violations.check_range("a", 1.0, 1)
    violations.check_threshold("a", 0.0)
    violations.check_distinct("a", [1, 2], str)
    violations.check_dictionary_names(["a", "b"])
    assert not violations
    violations.raise_if_any()


def test_everything_that_is_wrong_is_told_at_once() -> None:
    violations = Violations(Limits(max_edits=2, max_dictionaries=2))
    assert not violations.check_limit("a", 3, "max_edits")
    assert not violations.check_limit("b", 3, "max_edits", "has {} rows")
    assert not violations.check_count("c", 0, "max_edits")
    assert not violations.check_count("d", 3, "max_edits")
    violations.check_enum("e", 9, (0, 1))
    violations.check_range("f", float("nan"), 1)
    violations.check_threshold("g", -1.0)
    violations.check_distinct("h", [5, 6, 5, 6], lambda value: f"position {value}")
    violations.check_dictionary_names(["mid", ""])
    violations.check_dictionary_names(["mid", "mid"], "i")
    assert violations
    assert found(violations) == [
        ("a", "is 3, more than max_edits = 2"),
        ("b", "has 3 rows, more than max_edits = 2"),
        ("c", "is empty; at least one is needed"),
        ("d", "has 3 entries, more than max_edits = 2"),
        ("e", "9 is not a value of this enum"),
        ("f", "is nan, expected a number in 0..1"),
        ("g", "is -1.0, expected a finite number, at least 0"),
        ("h[2]", "position 5 is named twice"),
        ("dictionaries[1]", "is empty"),
        ("i[1]", "'mid' is named twice"),
    ]
