"""Settings as flags: their form, their help, and the values that they give."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from sae_runtime.settings import read_settings
from service.cli.parser import CommandParser
from service.cli.setting_flags import add_setting_flags, given_settings


class Inner(BaseModel):
    rate: float = Field(0.5, description="Share, 50 % by default.")


class Example(BaseModel):
    data: tuple[Path, ...] = Field((), description="Files.")
    sizes: tuple[int, ...] = Field((1, 2), description="Sizes.")
    names: Literal["all"] | tuple[str, ...] = Field("all", description="Names.")
    kind: Literal["one", "two"] | None = Field(None, description="Kind.")
    fast: bool = Field(False, description="Hurry.")
    limit: float | None = Field(1.0, description="Limit.")
    name: str = Field("", description="A name.")
    inner: Inner = Inner()


def parser() -> CommandParser:
    parser = CommandParser(prog="example")
    add_setting_flags(parser, Example)
    return parser


def settings_of(*line: str) -> dict[str, Any]:
    return given_settings(parser().parse_args(line), Example)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], {}),
        (["--data", "a,b", "c"], {"data": ["a,b", "c"]}),  # a file's name may have a comma
        (["--sizes", "1", "2"], {"sizes": ["1", "2"]}),
        (["--names", "a,b", "--names", "c"], {"names": "a,b,c"}),
        (["--names", "all"], {"names": "all"}),
        (["--kind", "two"], {"kind": "two"}),
        (["--fast"], {"fast": True}),
        (["--no-fast"], {"fast": False}),
        (["--limit", "none"], {"limit": None}),
        (["--name", "none"], {"name": "none"}),  # a setting that cannot be None
        (["--inner.rate", "0.25"], {"inner.rate": "0.25"}),
    ],
)
def test_the_values_that_flags_give(line: list[str], expected: dict[str, Any]) -> None:
    assert settings_of(*line) == expected


def test_the_settings_object_converts_them() -> None:
    settings = read_settings(Example, flags=settings_of("--sizes", "3", "4", "--limit", "2", "--inner.rate", "1"))
    assert (settings.sizes, settings.limit, settings.inner.rate) == ((3, 4), 2.0, 1.0)


def test_a_word_that_is_none_of_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings_of("--kind", "three")
    assert "argument --kind: invalid choice: 'three'" in capsys.readouterr().err


def test_help_shows_forms_and_defaults() -> None:
    text = " ".join(parser().format_help().split())
    for line in (
        "--data FILE [FILE ...] Files. --sizes N [N ...] Sizes. [1 2]",
        "--names TEXT [TEXT ...] Names. [all]",
        "--fast, --no-fast Hurry. [False]",
        "--limit N Limit. [1.0]",
        "--name TEXT A name. [empty]",
        "--inner.rate N Share, 50 % by default. [0.5]",
    ):
        assert line in text
