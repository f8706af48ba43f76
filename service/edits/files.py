"""Edits in YAML: a list of edits, or a list of presets, which are named sets of edits. An unknown key is an error.

    - name: more-french
      description: What it is for.
      edits:
        - {feature: "resid-mid:123", set: 2, unit: max, positions: generated, where: "resid-mid:7 > 0.5"}
        - {dictionary: resid-mid, feature: 9, clamp: {maximum: 0.5}}

protos/README.md has the table of all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from sae_runtime.edits.edit import (
    AfterText,
    Edit,
    InvalidEdit,
    Occurrence,
    Operation,
    Positions,
    Reference,
    ReferenceTokens,
    Unit,
)
from sae_runtime.settings import SettingsError, read_yaml
from service.edits.conditions import parse_condition


class EditFileError(ValueError):
    """A file of edits is wrong; the message names the file, the place and the problem."""


@dataclass(frozen=True)
class Preset:
    """A named set of edits."""

    name: str
    description: str
    edits: tuple[Edit, ...]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=_Model)


class _Bounds(_Model):
    minimum: float | None = None
    maximum: float | None = None


class _ResampleText(_Model):
    text: StrictStr | None = None
    token_ids: tuple[StrictInt, ...] | None = None
    tokens: ReferenceTokens = "last"

    @model_validator(mode="after")
    def _one_source(self) -> _ResampleText:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("expected either text or token_ids")
        return self


class _After(_Model):
    after: StrictStr
    occurrence: Occurrence = "first"
    max_tokens: StrictInt | None = None


class _Edit(_Model):
    """One edit as a YAML mapping: a feature, one operation, and where it acts."""

    dictionary: StrictStr | None = None
    feature: StrictInt | StrictStr | None = None
    set: float | None = None
    add: float | None = None
    scale: float | None = None
    clamp: _Bounds | None = None
    ablate: Literal["zero", "mean"] | None = None
    resample: _ResampleText | None = None
    replace: StrictBool | None = None
    unit: Unit = "raw"
    positions: Literal["all", "prompt", "generated", "last"] | tuple[StrictInt, ...] | _After = "all"
    where: StrictStr | None = None

    def to_edit(self) -> Edit:
        """The library's edit.

        Raises:
            ValueError: there is not exactly one operation, or the feature is not named properly.
            InvalidEdit: the values of the edit are wrong.
        """
        values = {name: getattr(self, name) for name in _OPERATIONS}
        names = [name for name, value in values.items() if value is not None and value is not False]
        if len(names) != 1:
            present = " and ".join(names) or "none"
            raise ValueError(f"expected one operation of {', '.join(_OPERATIONS)}, found {present}")
        name = names[0]
        dictionary, feature = self._target(name)
        operation: Operation = name if name != "ablate" else f"ablate_{self.ablate}"  # type: ignore[assignment]
        reference = None
        if self.resample is not None:
            ids = self.resample.token_ids
            text = self.resample.text if self.resample.text is not None else ids
            assert text is not None, "the model has one of them"
            reference = Reference(text, self.resample.tokens)
        positions: Positions
        if isinstance(self.positions, _After):
            positions = AfterText(self.positions.after, self.positions.occurrence, self.positions.max_tokens)
        else:
            positions = self.positions
        edit = Edit(
            dictionary,
            feature,
            operation,
            value=values[name] if name in ("set", "add", "scale") else 0.0,
            minimum=None if self.clamp is None else self.clamp.minimum,
            maximum=None if self.clamp is None else self.clamp.maximum,
            unit=self.unit,
            positions=positions,
            condition=None if self.where is None else parse_condition(self.where),
            reference=reference,
        )
        edit.validate()
        return edit

    def _target(self, operation: str) -> tuple[str, int]:
        feature, dictionary = self.feature, self.dictionary
        if operation == "replace":
            if feature is not None:
                raise ValueError("feature does not belong to replace, which replaces the whole dictionary's input")
            feature = 0
        if isinstance(feature, str):
            prefix, _, number = feature.rpartition(":")
            if not (number.isascii() and number.isdigit()):
                raise ValueError(f"feature is {feature!r}, expected a number or DICTIONARY:NUMBER")
            if prefix and dictionary is not None:
                raise ValueError(f"dictionary is {dictionary!r}, but the feature names one, too: {feature!r}")
            dictionary, feature = prefix or dictionary, int(number)
        if feature is None:
            raise ValueError("feature is missing")
        if dictionary is None:
            raise ValueError("dictionary is missing; give it, or write the feature as DICTIONARY:NUMBER")
        return dictionary, feature


_OPERATIONS = ("set", "add", "scale", "clamp", "ablate", "resample", "replace")


class _Preset(_Model):
    name: StrictStr = Field(min_length=1, max_length=128)
    description: StrictStr = ""
    edits: tuple[_Edit, ...] = Field(min_length=1)


def read_presets(file: Path) -> tuple[Preset, ...]:
    """The presets of a file, in its order.

    Raises:
        EditFileError: the file cannot be read, is no list of presets, or has an unknown key, a wrong edit or a name
            twice.
    """
    presets = tuple(_preset(item, f"{file}: [{i}]") for i, item in enumerate(_items(file)))
    names = [preset.name for preset in presets]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise EditFileError(f"{file}: [{i}].name: {name!r} is the name of two presets")
    return presets


def read_edits(file: Path) -> tuple[Edit, ...]:
    """The edits of a file: a list of edits, or a list of one preset. Raises EditFileError as `read_presets` does."""
    items = _items(file)
    if items and isinstance(items[0], Mapping) and "edits" in items[0]:
        presets = read_presets(file)
        if len(presets) > 1:
            names = ", ".join(preset.name for preset in presets)
            raise EditFileError(f"{file} has several sets of edits ({names}); write FILE:NAME for one of them")
        return presets[0].edits
    return tuple(_edit(item, f"{file}: [{i}]") for i, item in enumerate(items))


def _items(file: Path) -> Sequence[Any]:
    try:
        items = read_yaml(file, "edits")
    except SettingsError as error:
        raise EditFileError(str(error)) from None
    if not isinstance(items, list):
        raise EditFileError(f"{file} must hold a list, not {'nothing' if items is None else type(items).__name__}")
    return items


def _preset(item: Any, where: str) -> Preset:
    model = _validated(_Preset, item, where)
    edits = tuple(_to_edit(edit, f"{where}.edits[{i}]") for i, edit in enumerate(model.edits))
    return Preset(model.name, model.description, edits)


def _edit(item: Any, where: str) -> Edit:
    return _to_edit(_validated(_Edit, item, where), where)


def _to_edit(model: _Edit, where: str) -> Edit:
    try:
        return model.to_edit()
    except InvalidEdit as error:
        raise EditFileError(f"{where}.{error.field}: {error.reason}") from None
    except ValueError as error:
        raise EditFileError(f"{where}: {error}") from None


def _validated(model: type[Model], item: Any, where: str) -> Model:
    try:
        return model.model_validate(item)
    except ValidationError as error:
        # An unknown key first: it is often the misspelt form of a key that is then missing.
        problem = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
        loc = problem["loc"]
        if "positions" in loc:
            # A union: pydantic reports every alternative, and names it in the place.
            loc = loc[: loc.index("positions") + 1]
            problem["msg"] = "Expected all, prompt, generated, last, a list of positions, or a mapping with after"
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc)
        if problem["type"] == "extra_forbidden":
            raise EditFileError(f"{where}{place}: no such key") from None
        raise EditFileError(f"{where}{place}: {problem['msg']}, found {problem['input']!r}"[:500]) from None
