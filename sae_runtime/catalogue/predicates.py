"""Statements about a token and the text before it that are true or false: what a label of a rule says.

A predicate tests examples, reads as English, and is kept as JSON. What it says is all that it means: nothing is read
into the tokens that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.examples import Examples
from sae_runtime.catalogue.vocabulary import CLASSES, Vocabulary

Mask = npt.NDArray[np.bool_]


class Predicate(Protocol):
    """A statement about a token in its context."""

    @property
    def kind(self) -> str: ...

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        """[n], of which examples it is true."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Tokens:
    """The token that many places back is one of these."""

    tokens: tuple[int, ...]
    back: int = 0
    kind = "tokens"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        return np.isin(examples.token(self.back), self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokens": list(self.tokens), "back": self.back}


@dataclass(frozen=True)
class TokenClass:
    """The token that many places back belongs to a class of `CLASSES`."""

    name: str
    back: int = 0
    kind = "class"

    def __post_init__(self) -> None:
        if self.name not in CLASSES:
            raise ValueError(f"unknown class of tokens {self.name!r}; there are {', '.join(CLASSES)}")

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        return vocabulary.classes[self.name][examples.token(self.back)]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "class": self.name, "back": self.back}


@dataclass(frozen=True)
class Spelling:
    """The token that many places back begins, or ends, with these letters, in any case."""

    letters: str
    ends: bool = False
    back: int = 0
    kind = "spelling"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        return vocabulary.spelt(self.letters, ends=self.ends)[examples.token(self.back)]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "ends" if self.ends else "begins": self.letters, "back": self.back}


@dataclass(frozen=True)
class Before:
    """One of these tokens is among the last `within` tokens before the token."""

    tokens: tuple[int, ...]
    within: int
    kind = "before"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        hits: Mask = np.any(np.isin(examples.ids[:, -1 - self.within : -1], self.tokens), axis=1)
        return hits

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokens": list(self.tokens), "within": self.within}


@dataclass(frozen=True)
class Position:
    """The token stands at positions first to last of the row, both from 0; without `last`: to its end."""

    first: int = 0
    last: int | None = None
    kind = "position"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        inside: Mask = examples.position >= self.first
        return inside if self.last is None else inside & (examples.position <= self.last)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "first": self.first, "last": self.last}


@dataclass(frozen=True)
class TextKind:
    """The text is of one of these kinds."""

    names: tuple[str, ...]
    kind = "text_kind"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        return np.isin(examples.kind, [i for i, name in enumerate(examples.kinds) if name in self.names])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": list(self.names)}


@dataclass(frozen=True)
class Language:
    """The text is in one of these languages."""

    names: tuple[str, ...]
    kind = "language"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        return np.isin(examples.language, [i for i, name in enumerate(examples.languages) if name in self.names])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": list(self.names)}


@dataclass(frozen=True)
class Promoted:
    """The token after is one of these, which the latent promotes."""

    tokens: tuple[int, ...]
    kind = "promoted"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        return np.isin(examples.next_id, self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokens": list(self.tokens)}


@dataclass(frozen=True)
class AllOf:
    """All of these are true; of none of them: any token."""

    members: tuple[Predicate, ...]
    kind = "all"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        hits = np.ones(len(examples), bool)
        for member in self.members:
            hits &= member.matches(examples, vocabulary)
        return hits

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": [member.to_json() for member in self.members]}


@dataclass(frozen=True)
class AnyOf:
    """One of these or several are true."""

    members: tuple[Predicate, ...]
    kind = "any"

    def matches(self, examples: Examples, vocabulary: Vocabulary) -> Mask:
        hits = np.zeros(len(examples), bool)
        for member in self.members:
            hits |= member.matches(examples, vocabulary)
        return hits

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": [member.to_json() for member in self.members]}


def any_of(predicates: Iterable[Predicate]) -> Predicate:
    """The predicate that is true where one of these is; those that differ only in what they list become one."""
    lists: dict[Any, list[Any]] = {}
    others: list[Predicate] = []
    for predicate in _alternatives(predicates):
        match predicate:
            case Tokens():
                lists.setdefault((Tokens, predicate.back), []).extend(predicate.tokens)
            case Before():
                lists.setdefault((Before, predicate.within), []).extend(predicate.tokens)
            case TextKind() | Language():
                lists.setdefault((type(predicate),), []).extend(predicate.names)
            case AllOf((Tokens((_,), 0) as token, Tokens() as earlier)):
                lists.setdefault((AllOf, token, earlier.back), []).extend(earlier.tokens)
            case _:
                others.append(predicate)
    members: list[Predicate] = []
    for key, listed in lists.items():
        values = tuple(dict.fromkeys(listed))
        if key[0] is AllOf:
            members.append(AllOf((key[1], Tokens(values, key[2]))))
        else:
            members.append(key[0](values, *key[1:]))
    members += dict.fromkeys(others)
    return members[0] if len(members) == 1 else AnyOf(tuple(members))


def _alternatives(predicates: Iterable[Predicate]) -> Iterator[Predicate]:
    for predicate in predicates:
        if isinstance(predicate, AnyOf):
            yield from _alternatives(predicate.members)
        else:
            yield predicate


def statements(predicate: Predicate) -> Iterator[Predicate]:
    """The simple statements that a predicate is made of."""
    if isinstance(predicate, AllOf | AnyOf):
        for member in predicate.members:
            yield from statements(member)
    else:
        yield predicate


def family(predicate: Predicate) -> str:
    """The kinds of its simple statements, as one word: "tokens", "text_kind+tokens"."""
    return "+".join(sorted({statement.kind for statement in statements(predicate)}))


def from_json(data: Mapping[str, Any]) -> Predicate:
    """The predicate that `to_json` gave.

    Raises:
        ValueError: it is no predicate; the message says what is wrong.
    """
    kind: Any = data.get("kind") if isinstance(data, Mapping) else None
    try:
        match kind:
            case "tokens":
                return Tokens(_integers(data["tokens"]), int(data.get("back", 0)))
            case "class":
                return TokenClass(data["class"], int(data.get("back", 0)))
            case "spelling":
                ends = "ends" in data
                return Spelling(str(data["ends" if ends else "begins"]), ends, int(data.get("back", 0)))
            case "before":
                return Before(_integers(data["tokens"]), int(data["within"]))
            case "position":
                last = data.get("last")
                return Position(int(data.get("first", 0)), None if last is None else int(last))
            case "text_kind":
                return TextKind(tuple(map(str, data["names"])))
            case "language":
                return Language(tuple(map(str, data["names"])))
            case "promoted":
                return Promoted(_integers(data["tokens"]))
            case "all":
                return AllOf(tuple(map(from_json, data["of"])))
            case "any":
                return AnyOf(tuple(map(from_json, data["of"])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"predicate of kind {kind!r} lacks or misspells a parameter: {error!r}") from error
    raise ValueError(f"unknown kind of predicate: {kind!r}")


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
