"""The simplest statements that might explain a latent, as a table of which examples they are true for.

They come from the tokens on which the latent fires: the tokens and how they are spelt, the tokens before them, their
place in the row, their text. Labels are made of them (see `labels`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.examples import Examples
from sae_runtime.catalogue.predicates import (
    AllOf,
    Before,
    Language,
    Position,
    Predicate,
    Promoted,
    Spelling,
    TextKind,
    TokenClass,
    Tokens,
)
from sae_runtime.catalogue.vocabulary import CLASSES, Vocabulary

Integers = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]

Slot = Literal["token", "previous", "before", "text", "position", "next"]
"""What a statement speaks of: the token, the one before it, those before it wherever they stand, and so on."""

NEAR = (4, 8, 23)
"""Within how many tokens before the token another one is looked for."""
LEAST_NEAR, MOST_NEAR = 3, 48
"""Active tokens that must have it before them, and how many of the most frequent ones are tried."""
AFFIX_LENGTHS = (4, 3, 2)  # of equal ones the first wins: the longest
LEAST_AFFIX_TOKENS = 3
"""Distinct tokens on which a latent must fire for letters at their beginning or end to be tried."""
POSITIONS = tuple(2**i for i in range(9))
PROMOTED_COUNTS = (1, 3, 10)


@dataclass
class Atoms:
    """m statements about n examples."""

    predicates: list[Predicate] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    _rows: list[Mask] = field(default_factory=list)

    def add(self, slot: Slot, predicates: Sequence[Predicate], rows: Mask | list[Mask]) -> None:
        """Adds statements and, for each, [n] of which examples it is true."""
        if predicates:
            self.predicates += predicates
            self.slots += [slot] * len(predicates)
            self._rows.append(np.asarray(rows))

    @property
    def matrix(self) -> Mask:
        """[m, n], of which examples each statement is true."""
        return np.concatenate(self._rows)


def find_atoms(examples: Examples, vocabulary: Vocabulary, promoted: Sequence[int] = ()) -> Atoms:
    """All atoms that are true of an active example; `promoted` are the tokens that the latent promotes, best first."""
    atoms = Atoms()
    active = examples.active
    slots: tuple[Slot, ...] = ("token", "previous")
    for back, slot in enumerate(slots):
        ids = examples.token(back)
        _add_tokens(atoms, slot, ids, active, back, vocabulary)
        _add_spellings(atoms, slot, ids, active, back, vocabulary)
        names = [name for name in CLASSES if vocabulary.classes[name][ids[active]].any()]
        atoms.add(slot, [TokenClass(name, back) for name in names], [vocabulary.classes[name][ids] for name in names])
    _add_pairs(atoms, examples)
    for within in NEAR:
        _add_near(atoms, examples, within)
    _add_text(atoms, examples)
    position = examples.position
    atoms.add("position", [Position(0, n - 1) for n in POSITIONS], [position < n for n in POSITIONS])
    atoms.add("position", [Position(n) for n in POSITIONS], [position >= n for n in POSITIONS])
    sets = [tuple(promoted[:count]) for count in PROMOTED_COUNTS if count <= len(promoted)]
    atoms.add("next", [Promoted(tokens) for tokens in sets], [np.isin(examples.next_id, tokens) for tokens in sets])
    return atoms


def _add_tokens(atoms: Atoms, slot: Slot, ids: Integers, active: Mask, back: int, vocabulary: Vocabulary) -> None:
    """Single tokens, and all the tokens of a spelling of which the latent fires on several."""
    tokens, counts = np.unique(ids[active], return_counts=True)
    tokens = tokens[(tokens >= 0) & (counts > min(back, 1))]  # what stands before is tried if it does so twice
    atoms.add(slot, [Tokens((token,), back) for token in tokens.tolist()], ids == tokens[:, None])
    spellings = Counter(vocabulary.spelling[token] for token in tokens.tolist())
    groups = [vocabulary.variants[s] for s, n in spellings.items() if n > 1 and s in vocabulary.variants]
    atoms.add(slot, [Tokens(group, back) for group in groups], [np.isin(ids, group) for group in groups])


def _add_spellings(atoms: Atoms, slot: Slot, ids: Integers, active: Mask, back: int, vocabulary: Vocabulary) -> None:
    tokens = np.unique(ids[active])
    for ends in (False, True):
        for length in AFFIX_LENGTHS:
            numbers, letters = vocabulary.affixes(length, ends=ends)
            tried, counts = np.unique(numbers[tokens], return_counts=True)
            tried = tried[(tried >= 0) & (counts >= LEAST_AFFIX_TOKENS)]
            predicates = [Spelling(letters[number], ends, back) for number in tried.tolist()]
            atoms.add(slot, predicates, numbers[ids] == tried[:, None])


def _add_pairs(atoms: Atoms, examples: Examples) -> None:
    """The token together with the one before it, or with the one before that (whatever stands between)."""
    size = int(examples.ids.max()) + 1
    token = examples.token().astype(np.int64)
    for back in (1, 2):
        earlier = examples.token(back).astype(np.int64)
        pair = np.where(earlier >= 0, token * size + earlier, -1)
        tried, counts = np.unique(pair[examples.active], return_counts=True)
        tried = tried[(tried >= 0) & (counts > 1)]
        predicates = [AllOf((Tokens((p // size,)), Tokens((p % size,), back))) for p in tried.tolist()]
        atoms.add("token", predicates, pair == tried[:, None])


def _add_near(atoms: Atoms, examples: Examples, within: int) -> None:
    before = examples.ids[:, -1 - within : -1]
    ordered = np.sort(before[examples.active], axis=1)
    is_first = np.diff(ordered, axis=1, prepend=-1) > 0  # of equal tokens of a row, and not -1
    tokens, counts = np.unique(ordered[is_first], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_NEAR]
    tokens = tokens[order][counts[order] >= LEAST_NEAR]
    predicates = [Before((token,), within) for token in tokens.tolist()]
    atoms.add("before", predicates, [(before == token).any(1) for token in tokens])


def _add_text(atoms: Atoms, examples: Examples) -> None:
    kinds = np.unique(examples.kind[examples.active])
    atoms.add("text", [TextKind((examples.kinds[kind],)) for kind in kinds], examples.kind == kinds[:, None])
    languages = np.unique(examples.language[examples.active])
    languages = languages[languages >= 0]
    predicates = [Language((examples.languages[language],)) for language in languages]
    atoms.add("text", predicates, examples.language == languages[:, None])
