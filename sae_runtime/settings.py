"""Settings: one typed object that a YAML file, the environment and flags fill under the same names.

A nested setting has a dotted name, such as engine.max_batch_tokens. An unknown name is an error, and every error names
the setting and where its value came from.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Settings = TypeVar("Settings", bound=BaseModel)


class SettingsError(ValueError):
    """Settings that cannot be used; the message names the setting and where it came from."""


@dataclass
class SettingValues:
    """Values before they are checked. What is set later wins."""

    values: dict[str, Any] = field(default_factory=dict)
    """By name, nested ones as mappings."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where a value came from, by dotted name."""

    @classmethod
    def of_file(cls, file: str | Path | None) -> SettingValues:
        """Those of a YAML file; none without a file.

        Raises:
            SettingsError: the file cannot be read, or holds something else than a mapping.
        """
        if file is None:
            return cls()
        values = read_mapping(Path(file))
        return cls(values, {name: str(file) for name in _dotted_names(values)})

    def set(self, name: str, value: Any, origin: str) -> None:
        """Sets a dotted name. SettingsError: what it is nested in has been set to something else than a mapping."""
        *parents, leaf = name.split(".")
        values = self.values
        for parent in parents:
            values = values.setdefault(parent, {})
            if not isinstance(values, dict):
                raise SettingsError(f"{parent}: found {values!r}, expected a mapping of settings")
        values[leaf] = value
        self.origins[name] = origin

    def set_flags(self, flags: Mapping[str, Any]) -> None:
        """Sets what flags gave, by dotted name."""
        for name, value in flags.items():
            self.set(name, value, flag_of(name))

    def build(self, model: type[Settings]) -> Settings:
        """The settings object.

        Raises:
            SettingsError: a name is unknown, or a value missing or wrong; tells of all of them.
        """
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            raise SettingsError("; ".join(map(self._explain, error.errors()))) from None

    def _explain(self, problem: Any) -> str:
        steps = [str(step) for step in problem["loc"]]
        name = ".".join(steps)
        # An item of a list came from where the list did.
        outer = (".".join(steps[:n]) for n in range(len(steps), 0, -1))
        origin = next((f" (from {self.origins[it]})" for it in outer if it in self.origins), "")
        match problem["type"]:
            case "missing":
                return f"{name} is not given (in the file, or as {flag_of(name)})"
            case "extra_forbidden":
                message = "no such setting"
            case "value_error":
                message = str(problem["ctx"]["error"])
            case _:
                message = f"{problem['msg']}, found {problem['input']!r}"
        return (f"{name}: {message}" if name else message) + origin


def read_settings(
    model: type[Settings], file: str | Path | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """Settings of a file, and of flags, which win over it. Errors as `SettingValues` raises them."""
    given = SettingValues.of_file(file)
    given.set_flags(flags or {})
    return given.build(model)


def read_yaml(file: Path, what: str) -> Any:
    """What a YAML file holds. SettingsError: it cannot be read; `what` it should hold is named."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"cannot read {what} from {file}: {error}") from None


def read_mapping(file: Path) -> dict[str, Any]:
    """The settings in a YAML file, none if it is empty. SettingsError: it cannot be read, or holds something else."""
    values = read_yaml(file, "settings")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: found {type(values).__name__}, expected a mapping of settings")
    return values


def setting_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted name; those of nested objects stand for the object."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from setting_fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def alternatives(info: FieldInfo) -> tuple[Any, ...]:
    """The types of which a setting takes one."""
    is_union = typing.get_origin(info.annotation) in (typing.Union, types.UnionType)
    return typing.get_args(info.annotation) if is_union else (info.annotation,)


def from_text(info: FieldInfo, text: Any) -> Any:
    """A value that was written on a command line or in the environment: "none" is None where a setting can be that."""
    return None if text == "none" and type(None) in alternatives(info) else text


def flag_of(name: str) -> str:
    """The flag of a setting's dotted name."""
    return "--" + name.replace("_", "-")


def _dotted_names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted_names(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"
