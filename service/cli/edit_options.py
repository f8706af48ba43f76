"""Edits on the command line, in their order: --set 123=2 --scale resid-mid:7=0 --clamp 9=:3 ..."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_runtime.edits.edit import POSITION_NAMES
from service.cli.feature_names import FeatureName, dictionary_of, feature_name
from service.cli.parser import WRONG_USAGE, CommandError
from service.client import AfterText, Client, Edit, Reference
from service.client.edits import Operation, Positions, ReferenceTokens, Where
from service.edits.conditions import format_condition, parse_condition
from service.edits.files import EditFileError, read_edits, read_presets


@dataclass(frozen=True)
class EditOption:
    """An edit before its dictionary, unit, positions and condition are known."""

    operation: Operation
    target: FeatureName
    value: float = 0.0
    minimum: float | None = None
    maximum: float | None = None
    reference: str | None = None


@dataclass(frozen=True)
class EditSet:
    """The edits of a file, which are complete."""

    edits: tuple[Edit, ...]


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "edits",
        "FEATURE is a number, or NAME:NUMBER with the dictionary's name; --set to --preset can be repeated",
    )

    def add(flag: str, metavar: str, parse: Callable[[str], EditOption | EditSet], text: str) -> None:
        group.add_argument(flag, dest="edits", action="append", default=[], type=parse, metavar=metavar, help=text)

    add("--set", "FEATURE=VALUE", _with_value("set"), "set the activation to VALUE")
    add("--add", "FEATURE=VALUE", _with_value("add"), "add VALUE to the activation")
    add("--scale", "FEATURE=FACTOR", _with_value("scale"), "multiply the activation by FACTOR")
    add("--clamp", "FEATURE=MIN:MAX", _clamp, "keep the activation between MIN and MAX; either can be left out")
    add("--ablate", "FEATURE", _ablation("ablate_zero"), "set the activation to 0")
    add("--ablate-mean", "FEATURE", _ablation("ablate_mean"), "set the activation to the feature's recorded mean")
    add("--resample", "FEATURE=TEXT", _resample, "set the activation to its value on a reference text")
    add("--replace", "NAME", _replacement, "replace what the dictionary reads by its reconstruction")
    add("--edits", "FILE", _file, "take edits from a YAML file, or with FILE:NAME the preset NAME of a file")
    group.add_argument(
        "--preset", dest="presets", action="append", default=[], metavar="NAME", help="use a preset of the server"
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
        help="which tokens of the reference text --resample reads",
    )
    group.add_argument("--dictionary", metavar="NAME", help="the dictionary of features that are given by number only")
    group.add_argument(
        "--positions",
        type=_positions,
        default="all",
        metavar="WHERE",
        help="edit these tokens: all, prompt, generated, last (the prompt's last one), positions such as 0,4,5, or "
        "after:TEXT, the tokens after the first occurrence of TEXT",
    )
    group.add_argument(
        "--where",
        type=_condition,
        metavar="CONDITION",
        help="edit only tokens on which this holds, such as '12 > 0.5 and (7 <= 0 or resid-mid:9 > 1)'; features "
        "without a name belong to the edit's dictionary",
    )


def resolve_edits(arguments: argparse.Namespace, client: Client) -> tuple[list[Edit], list[Edit]]:
    """The command line's edits, and the edits of the presets that it names, which the server applies before them.

    Asks the server only for what the command line leaves open.

    Raises:
        CommandError: a feature names no dictionary and the server has several, or a preset does not exist.
    """
    edits: list[Edit] = []
    for option in arguments.edits:
        if isinstance(option, EditSet):
            edits += option.edits
        else:
            edits.append(_resolve(option, arguments, client))
    return edits, _preset_edits(arguments.presets, client) if arguments.presets else []


def _resolve(option: EditOption, arguments: argparse.Namespace, client: Client) -> Edit:
    tokens: ReferenceTokens = arguments.reference_tokens
    return Edit(
        dictionary=dictionary_of(option.target, arguments.dictionary, client),
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


def _preset_edits(names: Sequence[str], client: Client) -> list[Edit]:
    presets = {preset.name: preset for preset in client.server_info().edit_presets}
    for name in names:
        if name not in presets:
            raise CommandError(f"no preset {name!r}; the server has: {', '.join(presets) or 'none'}", WRONG_USAGE)
    return [edit for name in names for edit in presets[name].edits]


def describe(edits: Sequence[Edit]) -> str:
    """The edits in one line. Where they act is said once if it is the same for all."""
    if not edits:
        return "no edits"
    places = [_describe_place(edit) for edit in edits]
    if len(set(places)) == 1:
        return ", ".join(_describe(edit) for edit in edits) + places[0]
    return ", ".join(_describe(edit) + place for edit, place in zip(edits, places, strict=True))


def _describe_place(edit: Edit) -> str:
    """Positions and condition, such as " on prompt tokens where 4 > 0.5"; empty for all tokens."""
    place, positions = "", edit.positions
    if isinstance(positions, AfterText):
        number = "" if positions.max_tokens is None else f"{positions.max_tokens} "
        every = "each " if positions.occurrence == "each" else ""
        place = f" on {number}tokens after {every}{positions.text!r}"
    elif positions == "last":
        place = " on the prompt's last token"
    elif isinstance(positions, tuple):
        place = f" on token{'s' if len(positions) > 1 else ''} {', '.join(map(str, positions))}"
    elif positions != "all":
        place = f" on {positions} tokens"
    if edit.condition is not None:
        place += f" where {format_condition(edit.condition)}"
    return place


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
    """The type of FILE or FILE:NAME. A file whose name contains the colon takes precedence."""
    try:
        path, _, name = text.rpartition(":")
        if path and not Path(text).exists():
            presets = {preset.name: preset for preset in read_presets(Path(path))}
            if name not in presets:
                names = ", ".join(presets) or "none"
                raise argparse.ArgumentTypeError(f"{path} has no set {name!r}; its sets: {names}")
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


def _split(text: str, separator: str, form: str) -> tuple[str, str]:
    if separator not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    left, _, right = text.partition(separator)
    return left, right


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
