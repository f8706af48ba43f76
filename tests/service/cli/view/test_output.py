"""Sentences, and JSON of what the client returns."""

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from service.cli.view.output import print_json, print_sentence

SENTENCE = "A sentence [with brackets] that is longer than the line"


def printed(*, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=30, markup=False)
    print_sentence(console, SENTENCE)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_sentence_breaks_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert printed(terminal=True) == ["A sentence [with brackets]", "that is longer than the line"]
    assert printed(terminal=False) == [SENTENCE]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Reply:
        values: Any
        count: Any
        piece: bytes
        at: datetime

    print_json(Reply(np.array([0.5, 2]), np.int64(3), b"\xc3", datetime(2026, 11, 22, tzinfo=UTC)))
    (line,) = capsys.readouterr().out.splitlines()
    expected = {"values": [0.5, 2.0], "count": 3, "piece": "\\xc3", "at": "2026-11-22T00:00:00+00:00"}
    assert json.loads(line) == expected
    with pytest.raises(TypeError, match="object has no JSON form"):
        print_json(object())
