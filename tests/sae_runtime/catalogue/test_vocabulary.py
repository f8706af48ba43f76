import pytest

from sae_runtime.catalogue.vocabulary import quoted
from tests.sae_runtime.catalogue.vocabulary import PIECES, VOCABULARY, token


def test_spellings_ignore_case_and_one_space() -> None:
    king = tuple(token(piece) for piece in ("king", " king", "King"))
    assert VOCABULARY.variants == {"king": king, "=": (token(" ="), token("="))}
    assert VOCABULARY.spelling[token(b"\xc3")] == ""  # half a character has no spelling
    assert VOCABULARY.spelling[token(" ")] == " "


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("digits", ["12"]),
        ("punctuation", [" =", "=", ".", '"']),
        ("line_break", ["\n"]),
        ("whitespace", [" "]),
        ("word_start", [" king", " The", " été", " walking"]),
        ("word_piece", ["king", "King", "ing", "NATO", "a", "talking"]),
        ("capitalised", ["King", " The"]),
        ("capitals", ["NATO"]),
        ("single_letter", ["a"]),
        ("other_letters", [" été"]),
        ("cut_character", [b"\xc3"]),
    ],
)
def test_classes(name: str, members: list[str | bytes]) -> None:
    mask = VOCABULARY.classes[name]
    assert set(mask.nonzero()[0]) == {token(piece) for piece in members}
    assert len(mask) == len(PIECES) + 1
    assert not mask[-1]  # of id -1, which stands for no token


def test_beginnings_and_ends() -> None:
    ends = {token(piece) for piece in ("king", " king", "King", "ing", " walking", "talking")}
    assert set(VOCABULARY.spelt("ing", ends=True).nonzero()[0]) == ends
    assert set(VOCABULARY.spelt("th").nonzero()[0]) == {token(" The")}
    assert not VOCABULARY.spelt("zz").any()
    numbers, letters = VOCABULARY.affixes(2)
    assert letters[numbers[token("NATO")]] == "na"
    assert numbers[token("x1")] == -1  # not letters alone
    assert numbers[token("a")] == -1  # too short
    assert numbers[-1] == -1


@pytest.mark.parametrize(
    ("piece", "shown"), [(" king", '" king"'), ("\n", '"\\n"'), ('"', "'\"'"), (b"\xc3", '"\\xc3"'), (" été", '" été"')]
)
def test_tokens_are_shown_on_one_line(piece: str | bytes, shown: str) -> None:
    assert VOCABULARY.shown(token(piece)) == shown


def test_quoted_text_cannot_break_the_line() -> None:
    assert quoted("a\u2028b\x1b[31m") == '"a\\u2028b\\x1b[31m"'
    assert quoted("both ' and \"") == "'both \\' and \"'"
