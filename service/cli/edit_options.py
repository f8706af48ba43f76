"""Edits on the command line: --set 123=2 --scale resid-mid:7=0 --clamp 9=:3 ..., in the order they are given."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_runtime.edits.edit import POSITION_NAMES
from service.cli.command_error import CommandError
from service.cli.feature_names import FeatureName, dictionary_of, feature_name
from service.client import AfterText, Edit, EditPreset, Reference
from service.client.edits import Operation, Positions, ReferenceTokens, Where
from service.edits.conditions import format_condition, parse_condition
from service.edits.files import EditFileError, read_edits, read_presets


@dataclass(frozen=True)
class EditOption:
    """An edit whose dictionary, unit and positions are not known yet."""

    operation: Operation
    target: FeatureName
    value: float = 0.0
    minimum: float | None = None
    maximum: float | None = None
    reference: str | None = None


@dataclass(frozen=True)
class EditSet:
    """Edits of a file: they are complete as they are."""

    edits: tuple[Edit, ...]


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "edits", "each can be repeated; FEATURE is a number, or NAME:NUMBER with the dictionary's name"
    )

    def add(flag: str, metavar: str, parse: Callable[[str], EditOption | EditSet], text: str) -> None:
        group.add_argument(flag, dest="edits", action="append", default=[], type=parse, metavar=metavar, help=text)

    add("--set", "FEATURE=VALUE", _with_value("set"), "make the activation VALUE")
    add("--add", "FEATURE=VALUE", _with_value("add"), "add VALUE to the activation")
    add("--scale", "FEATURE=FACTOR", _with_value("scale"), "multiply the activation by FACTOR")
    add("--clamp", "FEATURE=MIN:MAX", _clamp, "keep the activation between MIN and MAX; one of them can be left out")
    add("--ablate", "FEATURE", _ablation("ablate_zero"), "make the activation 0")
    add("--ablate-mean", "FEATURE", _ablation("ablate_mean"), "make the activation the feature's recorded mean")
    add("--resample", "FEATURE=TEXT", _resample, "make the activation what it is on a reference text")
    add("--replace", "NAME", _replacement, "put the dictionary's reconstruction in place of what it reads")
    add("--edits", "FILE", _file, "edits of a YAML file; FILE:NAME takes the set of this name from a file of presets")
    group.add_argument(
        "--preset", dest="presets", action="append", default=[], metavar="NAME", help="a preset of the server"
    )
    group.add_argument(
        "--unit",
        choices=("raw", "max"),
        default="raw",
        help="unit of VALUE, MIN and MAX: activation units, or multiples of the feature's recorded maximum",
    )
    group.add_argument(
        "--reference-tokens",
        choices=("last", "aligned", "mean", "max"),
        default="last",
        help="tokens of the text of --resample whose activation is taken",
    )
    group.add_argument("--dictionary", metavar="NAME", help="dictionary of features that are bare numbers")
    group.add_argument(
        "--positions",
        type=_positions,
        default="all",
        metavar="WHERE",
        help="tokens on which the edits act: all, prompt, generated, last (of the prompt), positions such as 0,4,5, "
        "or after:TEXT, those that follow the first occurrence of TEXT",
    )
    group.add_argument(
        "--where",
        type=_condition,
        metavar="CONDITION",
        help="edit only tokens on which this holds, such as '12 > 0.5 and (7 <= 0 or resid-mid:9 > 1)'; "
        "features are of the edit's dictionary unless they name theirs",
    )


def resolve_edits(arguments: argparse.Namespace, loaded: Callable[[], Iterable[str]]) -> list[Edit]:
    """The edits in full, but for presets. `loaded` is asked for dictionaries if a bare number needs one.

    CommandError: it does, and several are loaded.
    """
    edits: list[Edit] = []
    for option in arguments.edits:
        if isinstance(option, EditSet):
            edits += option.edits
        else:
            edits.append(_resolve(option, arguments, loaded))
    return edits


def _resolve(option: EditOption, arguments: argparse.Namespace, loaded: Callable[[], Iterable[str]]) -> Edit:
    tokens: ReferenceTokens = arguments.reference_tokens
    return Edit(
        dictionary=dictionary_of(option.target, arguments.dictionary, loaded),
        feature=option.target.feature,
        operation=option.operation,
        value=option.value,
        minimum=option.minimum,
        maximum=option.maximum,
        unit=arguments.unit if option.operation in ("set", "add", "clamp") else "raw",
        positions=arguments.positions,
        condition=arguments.where,
        reference=None if option.reference is None else Reference(option.reference, tokens),
    )


def preset_edits(names: Sequence[str], presets: Sequence[EditPreset]) -> list[Edit]:
    """The edits of the server's presets of these names, to be shown; CommandError for a name that is not there."""
    by_name = {preset.name: preset for preset in presets}
    for name in names:
        if name not in by_name:
            raise CommandError(f"no preset {name!r}; the server has: {', '.join(by_name) or 'none'}", exit_code=2)
    return [edit for name in names for edit in by_name[name].edits]


def describe(edits: Sequence[Edit]) -> str:
    """One line a person can read; where edits act is said once for all if it is the same."""
    if not edits:
        return "no edits"
    places = [_describe_place(edit) for edit in edits]
    if len(set(places)) == 1:
        return ", ".join(_describe(edit) for edit in edits) + places[0]
    return ", ".join(_describe(edit) + place for edit, place in zip(edits, places, strict=True))


def _describe_place(edit: Edit) -> str:
    text, positions = "", edit.positions
    if isinstance(positions, AfterText):
        some = "" if positions.max_tokens is None else f"{positions.max_tokens} "
        each = "each " if positions.occurrence == "each" else ""
        text += f" on {some}tokens after {each}{positions.text!r}"
    elif positions == "last":
        text += " on the prompt's last token"
    elif positions != "all":
        text += f" on {positions if isinstance(positions, str) else ', '.join(map(str, positions))} tokens"
    if edit.condition is not None:
        text += f" where {format_condition(edit.condition)}"
    return text


def _describe(edit: Edit) -> str:
    name, unit = f"{edit.dictionary}:{edit.feature}", " × max" if edit.unit == "max" else ""
    match edit.operation:
        case "set":
            return f"{name} = {edit.value:g}{unit}"
        case "add":
            return f"{name} {'+' if edit.value >= 0 else '-'} {abs(edit.value):g}{unit}"
        case "scale":
            return f"{name} × {edit.value:g}"
        case "clamp":
            low, high = ("" if bound is None else f"{bound:g}" for bound in (edit.minimum, edit.maximum))
            return f"{name} in [{low or '-∞'}, {high or '∞'}]{unit}"
        case "ablate_mean":
            return f"{name} = its mean"
        case "resample":
            assert edit.reference is not None, "resample edits have a reference"
            return f"{name} as on {edit.reference.text!r} ({edit.reference.tokens})"
        case "replace":
            return f"{edit.dictionary}'s reconstruction"
        case _:
            return f"{name} ablated"


def _with_value(operation: Operation) -> Callable[[str], EditOption]:
    def parse(text: str) -> EditOption:
        target, value = _split(text, "=", "FEATURE=VALUE, such as 123=2.5")
        return EditOption(operation, feature_name(target), value=_number(value))

    return parse


def _clamp(text: str) -> EditOption:
    form = "FEATURE=MIN:MAX, such as 123=0:2.5 or 123=:2.5"
    target, bounds = _split(text, "=", form)
    low, high = _split(bounds, ":", form)
    if not low and not high:
        raise argparse.ArgumentTypeError(f"{text!r} has no bound, expected {form}")
    minimum, maximum = (_number(bound) if bound else None for bound in (low, high))
    return EditOption("clamp", feature_name(target), minimum=minimum, maximum=maximum)


def _ablation(operation: Operation) -> Callable[[str], EditOption]:
    return lambda text: EditOption(operation, feature_name(text))


def _resample(text: str) -> EditOption:
    target, reference = _split(text, "=", "FEATURE=TEXT, such as '123=A reference text'")
    if not reference:
        raise argparse.ArgumentTypeError(f"{text!r} has no text, expected FEATURE=TEXT")
    return EditOption("resample", feature_name(target), reference=reference)


def _replacement(text: str) -> EditOption:
    return EditOption("replace", FeatureName(text, 0))


def _file(text: str) -> EditSet:
    """FILE or FILE:NAME; a file whose own name has a colon wins."""
    try:
        path, _, name = text.rpartition(":")
        if path and not Path(text).exists():
            presets = {preset.name: preset for preset in read_presets(Path(path))}
            if name not in presets:
                raise argparse.ArgumentTypeError(f"{path} has no set {name!r}, but {', '.join(presets) or 'none'}")
            return EditSet(presets[name].edits)
        return EditSet(read_edits(Path(text)))
    except EditFileError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _condition(text: str) -> Where:
    try:
        return parse_condition(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positions(text: str) -> Positions:
    if text in POSITION_NAMES:
        return text  # type: ignore[return-value]
    if text.startswith("after:") and len(text) > len("after:"):
        return AfterText(text.removeprefix("after:"))
    try:
        return tuple(int(position) for position in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not all, prompt, generated, last, after:TEXT or a list of positions such as 0,4,5"
        ) from None


def _split(text: str, separator: str, form: str) -> tuple[str, Any]:
    left, found, right = text.partition(separator)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return left, right


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
