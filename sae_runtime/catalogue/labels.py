"""Finds a label for a latent: the predicate that best tells the tokens on which it fires from others.

The search sees the fit half of the examples only. Atoms of one slot are joined by "or" as long as that pays; the best
unions are narrowed by another slot ("and"), and the best of all may be joined with one more:

    token " ="                                     one slot
    token " =" in "maths" text                     two slots
    token " =" in "maths" text; or line breaks     two clauses

What is weighed against a statement is false alarms (as if one token in ten were active, so that a statement that is
true everywhere does not win), and its length. Strong activations weigh more than weak ones. The winner is tested once
on the held-out half, by `detection`: nothing is chosen there, so its F1 is as good as it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.atoms import Slot, find_atoms
from sae_runtime.catalogue.detection import detection, silent_weights
from sae_runtime.catalogue.examples import Examples, LatentExamples
from sae_runtime.catalogue.predicates import AllOf, Before, Language, Predicate, TextKind, Tokens, any_of
from sae_runtime.catalogue.records import Label
from sae_runtime.catalogue.vocabulary import Vocabulary
from sae_runtime.catalogue.wording import describe

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

LEAST_F1 = 0.5
"""A label with less on held-out examples is none: "no simple label"."""
LEAST_POSITIVES = 5
"""Active examples that each half must have."""

SILENT_PER_ACTIVE = 9
"""While a label is chosen, silent tokens weigh this many times as much as active ones."""
MOST_FALSE_ALARMS = 0.2
"""Share of the random silent tokens for which a label may be true."""
STRENGTH = 0.5
"""An active token weighs 1 - STRENGTH, and STRENGTH times its share of the largest activation."""

COST = 0.02
"""Of a statement: what it must add to F1 to be worth its words."""
_COSTS: dict[type[Any], float] = {Tokens: 0.25, TextKind: 0.5, Language: 0.5, Before: 2.0}
"""In units of COST; of others 1. One more token is cheap, a token somewhere before is easily there by chance."""
_MOST_ATOMS = 24
_NARROWED, _NARROWING = 3, 2
"""How many of the best unions are narrowed, and by how many slots each."""
_LENGTHENED = 3
"""How many of the best rules are tried with one more clause."""
_RECALL_BETA = 2.0
"""Unions for narrowing are also grown by F-beta, which loves recall: false alarms may go when they are narrowed."""


def find_label(examples: LatentExamples, vocabulary: Vocabulary, promoted: Sequence[int] = ()) -> Label | None:
    """The best predicate as a label, with its figures on the held-out examples.

    Args:
        examples: of one latent.
        vocabulary: of the backbone's tokenizer.
        promoted: tokens that the latent promotes, most promoted first.

    Returns:
        None, "no simple label": there are too few examples, or the best has a held-out F1 below LEAST_F1.
    """
    for half in (examples.fit, examples.held_out):
        if not LEAST_POSITIVES <= half.active.sum() < len(half):
            return None
    predicate = find_predicate(examples.fit, vocabulary, promoted)
    if predicate is None:
        return None
    test = detection(predicate.matches(examples.held_out, vocabulary), examples.held_out)
    if test.f1 < LEAST_F1:
        return None
    return Label(
        text=describe(predicate, vocabulary),
        source="rule",
        f1=test.f1,
        precision=test.precision,
        recall=test.recall,
        n_positive=test.n_positive,
        n_negative=test.n_negative,
        predicate=predicate.to_json(),
    )


def find_predicate(examples: Examples, vocabulary: Vocabulary, promoted: Sequence[int] = ()) -> Predicate | None:
    """The best predicate on these examples; None if each is true of too many silent tokens."""
    return _Search(examples, vocabulary, promoted).best()


@dataclass(frozen=True, eq=False)
class _Rule:
    """Clauses, joined by "or", of unions of atoms, joined by "and"."""

    clauses: tuple[tuple[Integers, ...], ...]
    """Numbers of the atoms."""
    slots: frozenset[Slot]
    matches: Array
    """[n], 1 where it is true, else 0."""
    cost: float
    score: float
    """F1, less the cost."""
    recall_score: float
    """F-beta, less the cost."""


class _Search:
    def __init__(self, examples: Examples, vocabulary: Vocabulary, promoted: Sequence[int]) -> None:
        atoms = find_atoms(examples, vocabulary, promoted)
        self._predicates = atoms.predicates
        self._matrix = atoms.matrix.astype(np.float32)  # [m, n]
        self._costs = np.array([COST * _COSTS.get(type(p), 1.0) for p in atoms.predicates], np.float32)
        slots = np.array(atoms.slots)
        self._slots: dict[Slot, Integers] = {slot: np.flatnonzero(slots == slot) for slot in dict.fromkeys(atoms.slots)}
        activation = examples.activation
        active = examples.active * (1 - STRENGTH + STRENGTH * activation / activation.max())
        silent = silent_weights(examples)
        # [n, 2]: what an example adds to true positives (of 1) and to false ones (of SILENT_PER_ACTIVE)
        self._weights = np.stack([active / active.sum(), SILENT_PER_ACTIVE * silent], axis=1).astype(np.float32)
        self._random = (~examples.active & ~examples.hard).astype(np.float32)

    def best(self) -> Predicate | None:
        rules = []
        for slot, of_slot in self._slots.items():
            for beta in (1.0, _RECALL_BETA):
                atoms, matches = self._union(of_slot, None, beta)
                if len(atoms):
                    rules.append(self._rule([(atoms,)], {slot}, matches))
        if not rules:
            return None
        narrowed = self._narrowed(_strongest(rules, _NARROWED, by_recall=True), _NARROWING)
        rules += narrowed + self._narrowed(_strongest(narrowed, 1), 1)
        rules += [longer for rule in _strongest(rules, _LENGTHENED) for longer in self._lengthened(rule, rules)]
        n_random = max(float(self._random.sum()), 1.0)
        specific = [rule for rule in rules if rule.matches @ self._random <= MOST_FALSE_ALARMS * n_random]
        return self._predicate(self._pruned(max(specific, key=lambda rule: rule.score))) if specific else None

    def _f(self, sums: Array, beta: float = 1.0) -> Array:
        """F-beta of [..., 2] true and false positives, where the active tokens weigh 1."""
        scores: Array = (1 + beta**2) * sums[..., 0] / (beta**2 + sums[..., 0] + sums[..., 1])
        return scores

    def _union(
        self, atoms: Integers, within: Array | None, beta: float = 1.0, start: Array | None = None
    ) -> tuple[Integers, Array]:
        """Chooses atoms, each as the best to add to those before, until none is worth its cost.

        Args:
            atoms: to choose from.
            within: [n], what must hold as well; None: nothing.
            start: [n], what is true already.

        Returns:
            The chosen atoms, and [n], where `start` holds or one of them and `within`.
        """
        matrix = self._matrix[atoms] if within is None else self._matrix[atoms] * within
        matches = np.zeros(matrix.shape[1], np.float32) if start is None else start
        chosen: list[int] = []
        score = float(self._f(matches @ self._weights, beta))
        while len(chosen) < _MOST_ATOMS:
            added = matrix @ (self._weights * (1 - matches)[:, None])
            scores = self._f(matches @ self._weights + added, beta) - self._costs[atoms]
            best = int(scores.argmax())
            if scores[best] <= score:
                break
            chosen.append(best)
            matches = np.maximum(matches, matrix[best])
            score = float(scores[best] + self._costs[atoms[best]])
        return atoms[chosen], matches

    def _narrowed(self, rules: Sequence[_Rule], n_slots: int) -> list[_Rule]:
        """Rules of one clause, each with a union of another slot as one more condition: the most promising slots."""
        narrowed = []
        for rule in rules:
            single = self._f(self._matrix @ (self._weights * rule.matches[:, None])) - self._costs
            others = [slot for slot in self._slots if slot not in rule.slots]
            others.sort(key=lambda slot: -float(single[self._slots[slot]].max()))
            for slot in others[:n_slots]:
                atoms, matches = self._union(self._slots[slot], rule.matches)
                if len(atoms):
                    narrowed.append(self._rule([(*rule.clauses[0], atoms)], rule.slots | {slot}, matches))
        return narrowed

    def _lengthened(self, rule: _Rule, others: Sequence[_Rule]) -> list[_Rule]:
        """The rule with one more clause: the best of the other rules, or the atoms that add most to it."""
        matches = np.maximum([other.matches for other in others], rule.matches)
        best = int((self._f(matches @ self._weights) - [other.cost for other in others]).argmax())
        lengthened = [
            self._rule([*rule.clauses, *others[best].clauses], rule.slots | others[best].slots, matches[best])
        ]
        atoms, all_matches = self._union(np.arange(len(self._matrix)), None, start=rule.matches)
        if len(atoms):
            lengthened.append(self._rule([*rule.clauses, (atoms,)], rule.slots, all_matches))
        return lengthened

    def _pruned(self, rule: _Rule) -> _Rule:
        """The rule without the atoms that others have made superfluous; the last chosen goes first."""
        for clause in reversed(range(len(rule.clauses))):
            for union in reversed(range(len(rule.clauses[clause]))):
                for atom in reversed(rule.clauses[clause][union]):
                    without = self._without(rule, clause, union, atom)
                    if without is not None and without.score + without.cost >= rule.score + rule.cost:
                        rule = without
        return rule

    def _without(self, rule: _Rule, clause: int, union: int, atom: int) -> _Rule | None:
        """The rule without an atom; None if the union holds nothing else: then the clause would never be true."""
        unions = list(rule.clauses[clause])
        unions[union] = unions[union][unions[union] != atom]
        if not len(unions[union]):
            return None
        clauses = [*rule.clauses[:clause], tuple(unions), *rule.clauses[clause + 1 :]]
        holds = [np.min([self._matrix[union].max(0) for union in unions], axis=0) for unions in clauses]
        return self._rule(clauses, rule.slots, np.max(holds, axis=0))

    def _rule(
        self, clauses: Sequence[tuple[Integers, ...]], slots: set[Slot] | frozenset[Slot], matches: Array
    ) -> _Rule:
        unions = [union for clause in clauses for union in clause]
        cost = sum(float(self._costs[union].sum()) for union in unions) + COST * (len(unions) - 1)
        sums = matches @ self._weights
        score, recall_score = float(self._f(sums)) - cost, float(self._f(sums, _RECALL_BETA)) - cost
        return _Rule(tuple(clauses), frozenset(slots), matches, cost, score, recall_score)

    def _predicate(self, rule: _Rule) -> Predicate:
        clauses = []
        for unions in rule.clauses:
            conditions = tuple(any_of([self._predicates[atom] for atom in union]) for union in unions)
            clauses.append(conditions[0] if len(conditions) == 1 else AllOf(conditions))
        return any_of(clauses)


def _strongest(rules: Sequence[_Rule], n: int, *, by_recall: bool = False) -> list[_Rule]:
    return sorted(rules, key=lambda rule: rule.recall_score if by_recall else rule.score, reverse=True)[:n]
