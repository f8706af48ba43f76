"""Predicates: what they match, and that they come back from JSON."""

import json
from typing import Any

import pytest

from sae_runtime.catalogue.predicates import (
    AllOf,
    AnyOf,
    Before,
    Language,
    Position,
    Predicate,
    Promoted,
    Spelling,
    TextKind,
    TokenClass,
    Tokens,
    any_of,
    family,
    from_json,
)
from tests.sae_runtime.catalogue.vocabulary import VOCABULARY, examples, token

KING, THE, EQUALS, STOP = token(" king"), token(" The"), token(" ="), token(".")
ROWS = examples(
    [[" king"], [" The", " king"], [" The", " =", ".", " king"], [" The", "12"], [".", " walking"]],
    position=[0, 1, 3, 9, 1],
    kind=[0, 1, 1, 0, 1],
    language=[-1, 0, 1, 0, 1],
    next_pieces=["12", None, ".", ".", "12"],
)

CASES: list[tuple[Predicate, list[int]]] = [
    (Tokens((KING,)), [0, 1, 2]),
    (Tokens((THE, STOP), back=1), [1, 2, 3, 4]),
    (Tokens((THE,), back=9), []),  # farther back than the window
    (TokenClass("digits"), [3]),
    (TokenClass("capitalised", back=1), [1, 3]),
    (Spelling("ing", ends=True), [0, 1, 2, 4]),
    (Spelling("th", back=1), [1, 3]),
    (Before((THE,), 1), [1, 3]),
    (Before((THE,), 3), [1, 2, 3]),
    (Before((KING,), 100), []),  # the token itself is not before itself
    (Position(0, 1), [0, 1, 4]),
    (Position(2), [2, 3]),
    (TextKind(("maths",)), [1, 2, 4]),
    (Language(("de", "xx")), [1, 3]),
    (Promoted((STOP,)), [2, 3]),
    (AllOf((Tokens((KING,)), TextKind(("maths",)))), [1, 2]),
    (AllOf(()), [0, 1, 2, 3, 4]),
    (AnyOf((TokenClass("digits"), Position(0, 0))), [0, 3]),
    (AnyOf(()), []),
]


@pytest.mark.parametrize(("predicate", "expected"), CASES)
def test_matches(predicate: Predicate, expected: list[int]) -> None:
    assert predicate.matches(ROWS, VOCABULARY).nonzero()[0].tolist() == expected


@pytest.mark.parametrize("predicate", [predicate for predicate, _ in CASES])
def test_json_round_trip(predicate: Predicate) -> None:
    assert from_json(json.loads(json.dumps(predicate.to_json()))) == predicate


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "unknown kind of predicate: None"),
        ({"kind": "regex", "pattern": "(a+)+"}, "unknown kind of predicate: 'regex'"),
        ({"kind": "tokens"}, "'tokens' lacks or misspells a parameter"),
        ({"kind": "tokens", "tokens": 3}, "'tokens' lacks or misspells a parameter"),
        ({"kind": "class", "class": "emoji"}, "unknown class of tokens 'emoji'"),
        ({"kind": "all", "of": [{"kind": "no"}]}, "unknown kind of predicate: 'no'"),
        ({"kind": "any", "of": [3]}, "unknown kind of predicate: None"),
    ],
)
def test_json_of_no_predicate(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(data)


def test_lists_of_the_same_kind_become_one() -> None:
    joined = any_of(
        [Tokens((1,)), TextKind(("code",)), Tokens((3,), 1), Tokens((2, 1)), TextKind(("maths",)), Position(0, 3)]
    )
    assert joined == AnyOf((Tokens((1, 2)), TextKind(("code", "maths")), Tokens((3,), 1), Position(0, 3)))
    pairs = [AllOf((Tokens((7,)), Tokens((i,), 1))) for i in (1, 2)]
    assert any_of(pairs) == AllOf((Tokens((7,)), Tokens((1, 2), 1)))
    assert any_of([Position(0, 3), Position(0, 3)]) == Position(0, 3)
    nested = AnyOf((Tokens((1,)), AnyOf((Position(0, 3), Tokens((2,))))))
    assert any_of([nested, Tokens((3,))]) == AnyOf((Tokens((1, 2, 3)), Position(0, 3)))


def test_the_family_says_what_a_predicate_speaks_of() -> None:
    predicate = AnyOf((AllOf((Tokens((KING,)), TextKind(("code",)))), Tokens((EQUALS,))))
    assert family(predicate) == "text_kind+tokens"
    assert family(Position(0)) == "position"
