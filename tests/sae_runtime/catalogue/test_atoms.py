"""Atoms: what is tried, and that the table says what the predicates say."""

import numpy as np
import pytest

from sae_runtime.catalogue.atoms import find_atoms
from sae_runtime.catalogue.examples import Examples
from sae_runtime.catalogue.predicates import AllOf, Before, Language, Position, Promoted, Spelling, TextKind, Tokens
from tests.sae_runtime.catalogue.vocabulary import PIECES, VOCABULARY, examples, token

KING, THE = token(" king"), token(" The")


@pytest.fixture(scope="module")
def random_examples() -> Examples:
    generator = np.random.default_rng(0)
    known = [piece for piece in PIECES if piece]
    texts = [[known[i] for i in generator.integers(0, len(known), generator.integers(1, 7))] for _ in range(80)]
    return examples(
        texts,
        active=generator.random(80) < 0.5,
        next_pieces=[None if i % 3 else "12" for i in range(80)],
        kind=generator.integers(0, 2, 80),
        language=generator.integers(-1, 2, 80),
        position=generator.integers(0, 300, 80),
    )


def test_the_table_is_what_each_predicate_matches(random_examples: Examples) -> None:
    atoms = find_atoms(random_examples, VOCABULARY, promoted=[token("12"), THE, KING])
    matrix = atoms.matrix
    assert len(matrix) == len(atoms.predicates) == len(atoms.slots) > 100
    for predicate, row in zip(atoms.predicates, matrix, strict=True):
        np.testing.assert_array_equal(row, predicate.matches(random_examples, VOCABULARY), str(predicate))


def test_every_slot_is_tried(random_examples: Examples) -> None:
    atoms = find_atoms(random_examples, VOCABULARY, promoted=[THE])
    assert set(atoms.slots) == {"token", "previous", "before", "text", "position", "next"}
    assert "next" not in find_atoms(random_examples, VOCABULARY).slots


def test_what_is_tried_comes_from_the_active_examples() -> None:
    rows = [[" The", " king"], [" The", "King"], ["12", " walking"], ["12", "talking"], [" The", "."], ["=", "a"]]
    atoms = find_atoms(examples(rows, active=[1, 1, 1, 1, 0, 0], kind=[1, 1, 1, 1, 0, 0]), VOCABULARY, promoted=[THE])
    assert Tokens((KING,)) in atoms.predicates
    assert Tokens((token("king"), KING, token("King"))) in atoms.predicates  # it fires on two of the three
    assert Tokens((token("."),)) not in atoms.predicates
    assert Spelling("ing", ends=True) in atoms.predicates
    assert Tokens((token("12"),), 1) in atoms.predicates
    assert Tokens((token("="),), 1) not in atoms.predicates
    assert TextKind(("maths",)) in atoms.predicates
    assert TextKind(("code",)) not in atoms.predicates
    assert Language(("de",)) in atoms.predicates
    assert Position(0, 0) in atoms.predicates
    assert Promoted((THE,)) in atoms.predicates
    assert not any(isinstance(atom, Before) for atom in atoms.predicates)  # none stands before three of them


def test_pairs_are_tried_from_two_occurrences_on() -> None:
    rows = [[" The", " king"], ["a", " The", " king"], ["12", "a"], ["=", ".", "ing"], ["=", "\n", "ing"]]
    predicates = find_atoms(examples(rows, active=[1] * 5), VOCABULARY).predicates
    assert AllOf((Tokens((KING,)), Tokens((THE,), 1))) in predicates
    assert AllOf((Tokens((token("ing"),)), Tokens((token("="),), 2))) in predicates  # whatever stands between
    assert AllOf((Tokens((token("a"),)), Tokens((token("12"),), 1))) not in predicates
