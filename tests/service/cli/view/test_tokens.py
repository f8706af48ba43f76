"""Text shaded by activation, and tokens made visible."""

import io

import pytest
from rich.console import Console

from service.cli.view.tokens import shaded, visible


def test_text_is_shaded_by_activation():
    text = shaded([b"The", b" cat", b" sat"], [0.0, 2.0, 4.0])
    assert text.plain == "The cat sat"
    assert [(text.plain[span.start : span.end], str(span.style)) for span in text.spans] == [
        (" cat", "black on rgb(255,191,127)"),
        (" sat", "black on rgb(255,138,30)"),
    ]
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor", width=80).print(text)
    assert "48;2;255;138;30m sat" in stream.getvalue()


def test_a_character_that_is_cut_is_drawn_whole():
    snowman = "☃".encode()
    text = shaded([b"a", snowman[:1], snowman[1:] + b"b", b"\xff"], [1.0, 0.0, 4.0, 0.0])
    assert text.plain == "a☃b\ufffd"
    assert text.plain[text.spans[-1].start : text.spans[-1].end] == "☃b"


def test_one_line():
    text = shaded([b"a\n", b"\x1b[2J b"], [1.0, 0.0], one_line=True)
    assert text.plain == "a⏎\\x1b[2J b"


@pytest.mark.parametrize(
    ("piece", "text"),
    [(b" a b", "·a·b"), (b"\n\n\t", "⏎⏎⇥"), (b"\xe2\x98", "\\xe2\\x98"), (b"\x1b[2J", "\\x1b[2J"), ("é".encode(), "é")],
)
def test_visible(piece: bytes, text: str):
    assert visible(piece) == text
