"""Predicates as English: `tokens " =", "=" in text of kind "maths"`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
)
from sae_runtime.catalogue.vocabulary import CLASSES, Vocabulary, quoted

MOST_NAMED = 8
"""Tokens that a label names; of more it says how many there are."""

_LANGUAGES = {
    "ar": "Arabic",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "sv": "Swedish",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "zh": "Chinese",
}
_FIRST = "at the first token of the row"
_PLACES = {1: "", 2: "two places ", 3: "three places "}


def describe(predicate: Predicate, vocabulary: Vocabulary) -> str:
    """What a predicate says, on one line. The same predicate always reads the same."""
    if isinstance(predicate, AnyOf):
        return "; or ".join(describe(member, vocabulary) for member in predicate.members)
    members = predicate.members if isinstance(predicate, AllOf) else (predicate,)
    subjects = [member for member in members if _is_subject(member)]
    conditions = [_condition(member, vocabulary) for member in members if not _is_subject(member)]
    subject = " that are ".join(_subject(member, vocabulary) for member in subjects)
    if not subject and conditions == [_FIRST]:
        return _FIRST[3:]
    several = any(isinstance(member, AnyOf) for member in subjects)  # the conditions are of all of them
    return (", " if several else " ").join([subject or "any token", *conditions])


def _is_subject(predicate: Predicate) -> bool:
    """Whether a predicate speaks of the token itself."""
    if isinstance(predicate, AllOf | AnyOf):
        return any(map(_is_subject, predicate.members))
    return isinstance(predicate, Tokens | TokenClass | Spelling) and predicate.back == 0


def _subject(predicate: Predicate, vocabulary: Vocabulary) -> str:
    if isinstance(predicate, AnyOf):
        return " or ".join(_subject(member, vocabulary) for member in predicate.members)
    if isinstance(predicate, AllOf):
        return describe(predicate, vocabulary)
    if isinstance(predicate, Tokens):
        names = _token_names(predicate.tokens, vocabulary)
        return f"token{'s' if len(names) > 1 else ''} {_list(names)}"
    named = _named(predicate, vocabulary)
    return named if isinstance(predicate, TokenClass) else f"tokens {named}"


def _named(predicate: Predicate, vocabulary: Vocabulary) -> str:
    match predicate:
        case Tokens():
            return _list(_token_names(predicate.tokens, vocabulary))
        case TokenClass():
            return CLASSES[predicate.name]
        case Spelling():
            return f"that {'end' if predicate.ends else 'begin'} with {quoted(predicate.letters)}"
    return describe(predicate, vocabulary)


def _condition(predicate: Predicate, vocabulary: Vocabulary) -> str:
    match predicate:
        case Tokens() | TokenClass():
            return f"{_PLACES.get(predicate.back, f'{predicate.back} places ')}after {_named(predicate, vocabulary)}"
        case Spelling():
            place = _PLACES.get(predicate.back, f"{predicate.back} places ")
            return f"{place}after tokens {_named(predicate, vocabulary)}"
        case Before():
            return f"with {_list(_token_names(predicate.tokens, vocabulary))} in the {predicate.within} tokens before"
        case Position():
            return _position(predicate)
        case TextKind():
            return f"in {_list(map(quoted, predicate.names))} text"
        case Language():
            return f"in {_list(_LANGUAGES.get(name, quoted(name)) for name in predicate.names)} text"
        case Promoted():
            return f"before {_list(_token_names(predicate.tokens, vocabulary))}, which it promotes"
        case AnyOf():
            return " or ".join(_condition(member, vocabulary) for member in predicate.members)
        case AllOf():
            return " ".join(_condition(member, vocabulary) for member in predicate.members)
    raise TypeError(f"no words for {predicate!r}")


def _position(predicate: Position) -> str:
    first, last = predicate.first, predicate.last
    if last is None:
        return f"after the first {first} tokens of the row" if first > 1 else "after the first token of the row"
    if first == last:
        return f"at position {first} of the row" if first else _FIRST
    if first == 0:
        return f"in the first {last + 1} tokens of the row"
    return f"at positions {first} to {last} of the row"


def _token_names(tokens: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """Tokens in quotes; all the tokens of one spelling are named once: `"king" in any case`."""
    left = dict.fromkeys(tokens)
    names = []
    for token in tokens:
        group = vocabulary.variants.get(vocabulary.spelling[token], ())
        if token not in left:
            continue
        if group and all(member in left for member in group):
            for member in group:
                del left[member]
            names.append(_spelling_name(vocabulary.spelling[token]))
        else:
            del left[token]
            names.append(vocabulary.shown(token))
    return names


def _spelling_name(spelling: str) -> str:
    how = "in any case" if spelling.casefold() != spelling.upper() else "with or without a space"
    return f"{quoted(spelling)} {how}"


def _list(names: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`, and of very many the first and how many more."""
    listed = list(names)
    if len(listed) > MOST_NAMED:
        return f"{', '.join(listed[: MOST_NAMED - 1])} or {len(listed) - MOST_NAMED + 1} more"
    return " or ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
