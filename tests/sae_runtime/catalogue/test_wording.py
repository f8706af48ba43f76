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
)
from sae_runtime.catalogue.wording import describe
from tests.sae_runtime.catalogue.vocabulary import VOCABULARY, token

KINGS = tuple(token(piece) for piece in ("king", " king", "King"))
THE, STOP, NEWLINE = token(" The"), token("."), token("\n")


@pytest.mark.parametrize(
    ("predicate", "text"),
    [
        (Tokens((THE,)), 'token " The"'),
        (Tokens((THE, STOP, NEWLINE)), 'tokens " The", "." or "\\n"'),
        (Tokens(KINGS), 'token "king" in any case'),
        (Tokens((STOP, *KINGS)), 'tokens "." or "king" in any case'),
        (Tokens(KINGS[:2]), 'tokens "king" or " king"'),
        (Tokens((token(" ="), token("="))), 'token "=" with or without a space'),
        (
            Tokens(tuple(range(3, 13))),
            'tokens "=" with or without a space, "\\n", " ", "12", ".", "ing", " The" or 2 more',
        ),
        (Tokens((THE,), 1), 'any token after " The"'),
        (Tokens((THE,), 2), 'any token two places after " The"'),
        (TokenClass("digits"), "digits"),
        (TokenClass("digits", 1), "any token after digits"),
        (Spelling("ing", ends=True), 'tokens that end with "ing"'),
        (Spelling("un", back=1), 'any token after tokens that begin with "un"'),
        (Before((THE,), 8), 'any token with " The" in the 8 tokens before'),
        (Position(0, 0), "the first token of the row"),
        (Position(0, 7), "any token in the first 8 tokens of the row"),
        (Position(8), "any token after the first 8 tokens of the row"),
        (Position(1), "any token after the first token of the row"),
        (Position(4, 7), "any token at positions 4 to 7 of the row"),
        (TextKind(("code",)), 'any token in "code" text'),
        (Language(("fr", "xx")), 'any token in French or "xx" text'),
        (Promoted((THE, STOP)), 'any token before " The" or ".", which it promotes'),
        (AllOf((Tokens((STOP,)), TextKind(("maths",)))), 'token "." in "maths" text'),
        (AllOf((TokenClass("word_start"), Language(("nl",)))), "letters with a space before them in Dutch text"),
        (AllOf((Tokens((STOP,)), Tokens((THE, NEWLINE), 1))), 'token "." after " The" or "\\n"'),
        (
            AllOf((AnyOf((Tokens((STOP,)), TokenClass("digits"))), Position(0, 7))),
            'token "." or digits, in the first 8 tokens of the row',
        ),
        (
            AllOf((TokenClass("digits"), AnyOf((TextKind(("code",)), Language(("fr",)))))),
            'digits in "code" text or in French text',
        ),
        (
            AnyOf((Tokens((STOP,)), AllOf((TokenClass("digits"), Position(0, 7))))),
            'token "."; or digits in the first 8 tokens of the row',
        ),
        (AllOf(()), "any token"),
    ],
)
def test_description(predicate: Predicate, text: str) -> None:
    assert describe(predicate, VOCABULARY) == text
