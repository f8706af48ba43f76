from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.sequence import TextStream

pytestmark = pytest.mark.any_cpu

TEXT = st.text(alphabet="abé€😀\n", max_size=30)


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str, str | None]:
    """What each piece releases, what the end releases, and the stop string that was met."""
    text = TextStream(stop)
    released = [text.push(piece) for piece in pieces]
    return released, text.finish(), text.stopped_by


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


@given(TEXT, st.lists(st.integers(0, 200), max_size=20))
def test_text_is_the_same_wherever_tokens_are_cut(text: str, places: list[int]) -> None:
    released, rest, _ = stream(cut(text.encode(), places))
    assert "".join(released) == text
    assert rest == ""


@given(TEXT, st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(st.integers(0, 200)))
def test_stops_at_the_first_stop_string_to_be_completed(text: str, stop: list[str], places: list[int]) -> None:
    released, rest, stopped_by = stream(cut(text.encode(), places), tuple(stop))
    # The same, by looking at every start of the text.
    for end in range(len(text) + 1):
        met = [s for s in stop if text[:end].endswith(s)]
        if met:
            longest = max(met, key=len)
            assert "".join(released) + rest == text[: end - len(longest)]
            assert stopped_by == longest
            break
    else:
        assert "".join(released) + rest == text
        assert stopped_by is None


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    text = TextStream(("STOP", "end"))
    assert text.push(b"one S") == "one "
    assert text.push(b"TO") == ""
    assert text.push(b"ne, ") == "STOne, "
    assert text.push(b"en") == ""
    assert text.finish() == "en"


def test_holds_back_half_a_character() -> None:
    text = TextStream()
    assert text.push("é".encode()[:1]) == ""
    assert text.push("é".encode()[1:]) == "é"
    assert text.push("€".encode()[:2]) == ""
    assert text.finish() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    assert "".join(stream([b"a\xff", b"b\xc3", b"c"])[0]) == "a\ufffdb\ufffdc"


def test_nothing_follows_a_stop_string() -> None:
    text = TextStream(("x",))
    assert text.push(b"axb") == "a"
    assert text.push(b"more") == ""
    assert text.finish() == ""
    assert text.stopped_by == "x"


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(("",))
