"""Settings from several places: which value wins, and errors that name the setting and its origin."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_runtime.settings import SettingsError, SettingValues, flag_of, read_settings, read_yaml, setting_fields


class Limits(BaseModel):
    model_config = ConfigDict(extra="forbid")
    most_tokens: int = Field(8, ge=1, description="Most tokens.")


class Example(BaseModel):
    model_config = ConfigDict(extra="forbid")
    data: tuple[Path, ...]
    size: int | None = 3
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check(self) -> Example:
        if self.size == self.limits.most_tokens:
            raise ValueError(f"size and limits.most_tokens are both {self.size}")
        return self


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_flags_win_over_the_file(file: Path) -> None:
    file.write_text("data: [a, b]\nsize: 4\nlimits: {most_tokens: 5}\n")
    settings = read_settings(Example, file, {"size": None, "limits.most_tokens": "6"})
    assert settings == Example(data=(Path("a"), Path("b")), size=None, limits=Limits(most_tokens=6))


def test_no_file_and_an_empty_one(file: Path) -> None:
    file.touch()
    for given in (None, file):
        assert read_settings(Example, given, {"data": ["a"]}).data == (Path("a"),)


def test_what_is_set_later_wins_and_is_blamed() -> None:
    given = SettingValues()
    given.set("limits.most_tokens", 5, "first")
    given.set("limits.most_tokens", 0, "second")
    with pytest.raises(SettingsError, match=r"limits\.most_tokens: .* found 0 \(from second\)"):
        given.build(Example)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("size: 1", "data is not given (in the file, or as --data)"),
        ("data: [a]\nsise: 1", "sise: no such setting (from {file})"),
        ("data: [a]\nlimits: {tokens: 1}", "limits.tokens: no such setting (from {file})"),
        (
            "data: [a]\nsize: x",
            "size: Input should be a valid integer, unable to parse string as an integer, found 'x' (from {file})",
        ),
        ("data: [a, 3]", "data.1: Input is not a valid path for <class 'pathlib.Path'>, found 3 (from {file})"),
        ("data: [a]\nsize: 8", "size and limits.most_tokens are both 8"),
        ("data: [a]\nlimits: 3", "limits: found 3, expected a mapping of settings"),
        ("- a", "{file}: found list, expected a mapping of settings"),
        ("a: b: c", "cannot read settings from {file}: mapping values are not allowed here"),
    ],
)
def test_errors_name_the_setting_and_its_origin(file: Path, yaml: str, message: str) -> None:
    file.write_text(yaml)
    flags = {"limits.most_tokens": "8"} if "limits: 3" in yaml else {}
    with pytest.raises(SettingsError) as raised:
        read_settings(Example, file, flags)
    assert str(raised.value).startswith(message.replace("{file}", str(file)))


def test_all_errors_are_told(file: Path) -> None:
    file.write_text("size: x\nother: 1\n")
    with pytest.raises(SettingsError, match=r"data is not given.*; size: .*; other: no such setting"):
        read_settings(Example, file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read edits from .*none\.yaml: .*No such file"):
        read_yaml(tmp_path / "none.yaml", "edits")


UNCLEAN = {
    "Latin-1": (b"data: caf\xe9", "can't decode byte 0xe9"),
    "UTF-16": ("data: a".encode("utf-16"), "can't decode byte 0xff"),
    "NUL": (b"data: a\0", "special characters are not allowed"),
    "a date that is none": (b"size: 2001-99-99", "month must be in 1..12"),
    "a number of too many digits": (b"size: " + b"9" * 5000, "Exceeds the limit"),
    "too deep": (b"data: " + b"[" * 20_000, "recursion"),
}


@pytest.mark.parametrize("name", UNCLEAN)
def test_a_file_that_is_no_yaml_is_named(file: Path, name: str) -> None:
    content, message = UNCLEAN[name]
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=f"cannot read settings from {file}: .*{message}"):
        read_settings(Example, file)


def test_a_byte_order_mark_is_no_setting(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfdata: [a]")
    assert read_settings(Example, file).data == (Path("a"),)


def test_nested_settings_have_dotted_names() -> None:
    assert [name for name, _ in setting_fields(Example)] == ["data", "size", "limits.most_tokens"]
    assert flag_of("limits.most_tokens") == "--limits.most-tokens"
