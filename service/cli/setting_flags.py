"""A flag for every field of a settings object, and the values of these flags."""

from __future__ import annotations

import argparse
import contextlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sae_runtime.settings import SettingsError, alternatives, flag_of, from_text, setting_fields
from service.cli.parser import WRONG_USAGE, CommandError, YesOrNo


def add_setting_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """One flag for each field, named and described as the field: --engine.max-batch-tokens for a nested one."""
    group = parser.add_argument_group("settings")
    for name, info in setting_fields(model):
        # SUPPRESS: a flag that is not given must not hide the file's value.
        group.add_argument(flag_of(name), dest=name, default=argparse.SUPPRESS, help=_help(info), **_form(info))


def given_settings(arguments: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """The settings that the command line gives, as text, by dotted name."""
    values = vars(arguments)
    return {name: _value(info, values[name]) for name, info in setting_fields(model) if name in values}


@contextlib.contextmanager
def settings_errors() -> Iterator[None]:
    """Turns a SettingsError into wrong usage of the command."""
    try:
        yield
    except SettingsError as error:
        raise CommandError(str(error), exit_code=WRONG_USAGE) from error


def _value(info: FieldInfo, value: Any) -> Any:
    # A list that can also be a word is written with commas, as in the environment.
    return ",".join(value) if isinstance(value, list) and _words(alternatives(info)) else from_text(info, value)


def _help(info: FieldInfo) -> str:
    text = (info.description or "").replace("%", "%%")
    default = info.get_default(call_default_factory=True)
    if info.is_required() or default is None or default == ():
        return text
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"{text} [{'empty' if default == '' else default}]"


def _form(info: FieldInfo) -> dict[str, Any]:
    """The arguments of add_argument. Values stay text: the settings object converts and checks them, as for a file."""
    kinds = [kind for kind in alternatives(info) if kind is not type(None)]
    if kinds == [bool]:
        return {"action": YesOrNo}
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return {"nargs": "+", "metavar": "FILE" if item is Path else "N" if item in (int, float) else "TEXT"}
    if words := _words(kinds):
        return {"choices": words}
    return {"metavar": "PATH" if Path in kinds else "N" if {int, float} & set(kinds) else "TEXT"}


def _words(kinds: typing.Iterable[Any]) -> list[str]:
    return [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
