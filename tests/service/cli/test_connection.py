"""Text that no message can hold ends every command with one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from service.cli.main import main

Call = Callable[..., tuple[int, str, str]]

# What Python makes of the Latin-1 byte of "café" in an argument.
NOT_UTF_8 = "caf\udce9"
ARGUMENTS = {
    "a text of features": ["features", NOT_UTF_8],
    "a text of score": ["score", NOT_UTF_8],
    "a text of ablate": ["ablate", NOT_UTF_8, "--feature", "resid-mid:3"],
    "a text of attribute": ["attribute", NOT_UTF_8],
    "a prompt": ["generate", NOT_UTF_8],
    "a stop string": ["generate", "a", "--stop", NOT_UTF_8],
    "a feature that is set": ["generate", "a", "--set", f"{NOT_UTF_8}:3=2"],
    "a text of a set": ["contrast", "--a-text", NOT_UTF_8, "--a-text", "b", "--b-text", "c", "--b-text", "d"],
    "a dictionary's name": ["features", "a", "--dictionary", NOT_UTF_8],
    "a dictionary that is shown": ["dictionaries", NOT_UTF_8],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_is_not_utf_8_is_shown(call: Call, name: str):
    code, _, error = call(*ARGUMENTS[name])
    assert code == 2
    assert error.startswith("saeserve: 'caf\\udce9")
    assert error.endswith("is not Unicode text: it holds a byte that is not UTF-8, or half of a surrogate pair\n")
    assert error.count("\n") == 1


def test_half_of_a_surrogate_pair_in_a_file_of_edits(call: Call, tmp_path: Path):
    edits = tmp_path / "edits.yaml"
    edits.write_text('- {feature: "resid-mid:3", set: 1, positions: {after: "half \\ud83d"}}\n')
    code, _, error = call("generate", "a", "--edits", str(edits))
    assert (code, "half of a surrogate pair" in error, error.count("\n")) == (2, True, 1)


def test_an_address_where_no_server_is(capsys: pytest.CaptureFixture[str]):
    assert main(["info", "--address", "127.0.0.1:1"]) == 1
    assert "no server answers at 127.0.0.1:1; start one" in capsys.readouterr().err
