"""Edits on the command line: --set 123=2 --scale resid-mid:7=0 --clamp 9=:3 ..., in the order they are given."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service.cli.feature_names import FeatureName, dictionary_of, feature_name
from service.client import Condition, Edit
from service.client.edits import Operation, Positions


@dataclass(frozen=True)
class EditOption:
    """An edit whose dictionary, unit and positions are not known yet."""

    operation: Operation
    target: FeatureName
    value: float = 0.0
    minimum: float | None = None
    maximum: float | None = None


def add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "edits", "each can be repeated; FEATURE is a number, or NAME:NUMBER with the dictionary's name"
    )

    def add(flag: str, metavar: str, parse: Callable[[str], EditOption], text: str) -> None:
        group.add_argument(flag, dest="edits", action="append", default=[], type=parse, metavar=metavar, help=text)

    add("--set", "FEATURE=VALUE", _with_value("set"), "make the activation VALUE")
    add("--add", "FEATURE=VALUE", _with_value("add"), "add VALUE to the activation")
    add("--scale", "FEATURE=FACTOR", _with_value("scale"), "multiply the activation by FACTOR")
    add("--clamp", "FEATURE=MIN:MAX", _clamp, "keep the activation between MIN and MAX; one of them can be left out")
    add("--ablate", "FEATURE", _ablation("ablate_zero"), "make the activation 0")
    add("--ablate-mean", "FEATURE", _ablation("ablate_mean"), "make the activation the feature's recorded mean")
    group.add_argument(
        "--unit",
        choices=("raw", "max"),
        default="raw",
        help="unit of VALUE, MIN and MAX: activation units, or multiples of the feature's recorded maximum",
    )
    group.add_argument("--dictionary", metavar="NAME", help="dictionary of features that are bare numbers")
    group.add_argument(
        "--positions",
        type=_positions,
        default="all",
        metavar="WHERE",
        help="tokens on which the edits act: all, prompt, generated, or positions such as 0,4,5",
    )
    group.add_argument(
        "--where",
        type=_condition,
        metavar="FEATURE>A",
        help="edit only tokens on which this feature (of the same dictionary) has an activation above A",
    )


def resolve_edits(arguments: argparse.Namespace, loaded: Callable[[], Iterable[str]]) -> list[Edit]:
    """The edits in full. `loaded` is asked for dictionaries if a bare number needs one; may raise CommandError."""
    return [
        Edit(
            dictionary=dictionary_of(option.target, arguments.dictionary, loaded),
            feature=option.target.feature,
            operation=option.operation,
            value=option.value,
            minimum=option.minimum,
            maximum=option.maximum,
            unit=arguments.unit,
            positions=arguments.positions,
            condition=arguments.where,
        )
        for option in arguments.edits
    ]


def describe(edits: Sequence[Edit]) -> str:
    """One line a person can read."""
    if not edits:
        return "no edits"
    text = ", ".join(_describe(edit) for edit in edits)
    positions = edits[0].positions
    if positions != "all":
        text += f" on {positions if isinstance(positions, str) else ', '.join(map(str, positions))} tokens"
    if condition := edits[0].condition:
        text += f" where {condition.feature} > {condition.threshold:g}"
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


def _condition(text: str) -> Condition:
    feature, threshold = _split(text, ">", "FEATURE>A, such as '12>0.5' (in quotes)")
    return Condition(feature_name(feature).feature, _number(threshold))


def _positions(text: str) -> Positions:
    if text in ("all", "prompt", "generated"):
        return text  # type: ignore[return-value]
    try:
        return tuple(int(position) for position in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not all, prompt, generated or a list of positions such as 0,4,5"
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
