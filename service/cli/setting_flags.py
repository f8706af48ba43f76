"""Flags for every field of a settings object, and the values that a command line gave."""

from __future__ import annotations

import argparse
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from service.cli.parser import YesOrNo


def add_setting_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """One flag for each field, named and described as the field."""
    group = parser.add_argument_group("settings")
    for name, field in model.model_fields.items():
        # SUPPRESS: what is not given must not hide the file's value.
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=_help(field), **_form(field))


def given_settings(arguments: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """The settings that stood on the command line, as text; "none" is None."""
    given = {name: value for name, value in vars(arguments).items() if name in model.model_fields}
    return {name: None if value == "none" else value for name, value in given.items()}


def problem(error: Any) -> str:
    """One of pydantic's errors as a line for the person at the terminal."""
    name = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "missing":
            return f"{name} is not given (in the file, or as {flag(name)})"
        case "extra_forbidden":
            return f"{name}: no such setting"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{name}: {message}" if name else message
        case _:
            return f"{name}: {error['msg']}, found {error['input']!r}"


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if field.is_required() or field.default is None or field.default == ():
        return text
    return f"{text} [{field.default}]"


def _form(field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a field. Values stay text: the settings object converts and checks them, as for a file."""
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    if kinds == [bool]:
        return {"action": YesOrNo}
    if any(typing.get_origin(kind) is Literal for kind in kinds):
        return {"choices": [value for kind in kinds for value in typing.get_args(kind)]}
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return {"nargs": "+", "metavar": "FILE" if item is Path else "N" if item in (int, float) else "TEXT"}
    return {"metavar": "PATH" if Path in kinds else "N" if {int, float} & set(kinds) else "TEXT"}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)
