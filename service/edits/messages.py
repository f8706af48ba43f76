"""Edits to messages and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from sae_runtime.edits.edit import (
    AfterText,
    AllOf,
    AnyOf,
    Comparison,
    Condition,
    Edit,
    Occurrence,
    Operation,
    Positions,
    Reference,
    ReferenceTokens,
    Unit,
    Where,
)
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import edits_pb2 as pb

Value = TypeVar("Value")

_UNITS: dict[Unit, pb.Unit.ValueType] = {"raw": pb.UNIT_RAW, "max": pb.UNIT_RECORDED_MAXIMUM}
_RANGES: dict[Literal["all", "prompt", "generated", "last"], pb.PositionRange.ValueType] = {
    "all": pb.POSITION_RANGE_ALL,
    "prompt": pb.POSITION_RANGE_PROMPT,
    "generated": pb.POSITION_RANGE_GENERATED,
    "last": pb.POSITION_RANGE_LAST,
}
_REFERENCE_TOKENS: dict[ReferenceTokens, pb.ReferenceTokens.ValueType] = {
    "last": pb.REFERENCE_TOKENS_LAST,
    "aligned": pb.REFERENCE_TOKENS_ALIGNED,
    "mean": pb.REFERENCE_TOKENS_MEAN,
    "max": pb.REFERENCE_TOKENS_MAX,
}
_OCCURRENCES: dict[Occurrence, pb.Occurrence.ValueType] = {"first": pb.OCCURRENCE_FIRST, "each": pb.OCCURRENCE_EACH}
_COMPARISONS: dict[Comparison, pb.Comparison.ValueType] = {
    "above": pb.COMPARISON_ABOVE,
    "at_most": pb.COMPARISON_AT_MOST,
}


def edit_message(edit: Edit) -> pb.Edit:
    """The message of an edit.

    Raises:
        ValueError: an operation or a name is unknown, or a message cannot express the edit.
    """
    message = pb.Edit(dictionary=edit.dictionary, feature=edit.feature)
    unit = _named("unit", edit.unit, _UNITS)
    if edit.values is not None:
        raise ValueError("an edit with a value for each position has no message")
    match edit.operation:
        case "set":
            message.set.CopyFrom(pb.Amount(value=edit.value, unit=unit))
        case "add":
            message.add.CopyFrom(pb.Amount(value=edit.value, unit=unit))
        case "scale":
            message.scale = edit.value
        case "clamp":
            message.clamp.CopyFrom(pb.Clamp(minimum=edit.minimum, maximum=edit.maximum, unit=unit))
        case "ablate_zero":
            message.ablate = pb.ABLATION_ZERO
        case "ablate_mean":
            message.ablate = pb.ABLATION_MEAN
        case "resample":
            if edit.reference is None:
                raise ValueError("a resample edit needs a reference")
            message.resample.CopyFrom(_resample_message(edit.reference))
        case "replace":
            message.replace.SetInParent()
        case _:
            raise ValueError(
                f"operation is {edit.operation!r}, expected set, add, scale, clamp, ablate_zero, ablate_mean, "
                "resample or replace"
            )
    positions = edit.positions
    if isinstance(positions, AfterText):
        occurrence = _named("occurrence", positions.occurrence, _OCCURRENCES)
        after = pb.AfterText(text=positions.text, occurrence=occurrence, max_tokens=positions.max_tokens or 0)
        message.positions.after.CopyFrom(after)
    elif isinstance(positions, str):
        message.positions.range = _named("positions", positions, _RANGES)
    else:
        message.positions.explicit.positions.extend(positions)
    if edit.condition is not None:
        message.condition.CopyFrom(_condition_message(edit.condition))
    return message


def _resample_message(reference: Reference) -> pb.Resample:
    tokens = _named("tokens", reference.tokens, _REFERENCE_TOKENS)
    if isinstance(reference.text, str):
        return pb.Resample(reference=common_pb2.TextInput(text=reference.text), tokens=tokens)
    ids = common_pb2.TokenIds(ids=reference.text)
    return pb.Resample(reference=common_pb2.TextInput(token_ids=ids), tokens=tokens)


def _condition_message(where: Where) -> pb.Condition:
    if isinstance(where, Condition):
        message = pb.Condition(feature=where.feature, threshold=where.threshold, dictionary=where.dictionary or "")
        if where.comparison != "above":
            message.comparison = _named("comparison", where.comparison, _COMPARISONS)
        if where.unit != "raw":
            message.unit = _named("unit", where.unit, _UNITS)
        return message
    inner = pb.Conditions(conditions=[_condition_message(inner) for inner in where.conditions])
    return pb.Condition(any_of=inner) if isinstance(where, AnyOf) else pb.Condition(all_of=inner)


def read_edit(message: pb.Edit) -> Edit:
    """The edit of a valid message. Unknown values of enums become their defaults."""
    operation: Operation = "ablate_zero"
    value, minimum, maximum, unit, reference = 0.0, None, None, pb.UNIT_RAW, None
    match message.WhichOneof("operation"):
        case "set":
            operation, value, unit = "set", message.set.value, message.set.unit
        case "add":
            operation, value, unit = "add", message.add.value, message.add.unit
        case "scale":
            operation, value = "scale", message.scale
        case "clamp":
            clamp = message.clamp
            operation, unit = "clamp", clamp.unit
            minimum = clamp.minimum if clamp.HasField("minimum") else None
            maximum = clamp.maximum if clamp.HasField("maximum") else None
        case "ablate" if message.ablate == pb.ABLATION_MEAN:
            operation = "ablate_mean"
        case "resample":
            operation, reference = "resample", _read_reference(message.resample)
        case "replace":
            operation = "replace"
    return Edit(
        message.dictionary,
        message.feature,
        operation,
        value,
        minimum,
        maximum,
        _name(unit, _UNITS, "raw"),
        _read_positions(message.positions),
        read_condition(message.condition) if message.HasField("condition") else None,
        reference,
    )


def _read_reference(message: pb.Resample) -> Reference:
    source = message.reference
    text = source.text if source.WhichOneof("input") == "text" else tuple(source.token_ids.ids)
    return Reference(text, _name(message.tokens, _REFERENCE_TOKENS, "last"))


def _read_positions(message: pb.Positions) -> Positions:
    match message.WhichOneof("positions"):
        case "explicit":
            return tuple(message.explicit.positions)
        case "after":
            after = message.after
            return AfterText(after.text, _name(after.occurrence, _OCCURRENCES, "first"), after.max_tokens or None)
        case _:
            return _name(message.range, _RANGES, "all")


def read_condition(message: pb.Condition) -> Where:
    """The condition of a message."""
    match message.WhichOneof("combination"):
        case "all_of":
            return AllOf(tuple(read_condition(inner) for inner in message.all_of.conditions))
        case "any_of":
            return AnyOf(tuple(read_condition(inner) for inner in message.any_of.conditions))
        case _:
            comparison = _name(message.comparison, _COMPARISONS, "above")
            unit = _name(message.unit, _UNITS, "raw")
            return Condition(message.feature, message.threshold, message.dictionary or None, comparison, unit)


def _named(option: str, name: str, values: Mapping[Any, Value]) -> Value:
    if name not in values:
        raise ValueError(f"{option} is {name!r}, expected one of {', '.join(values)}")
    return values[name]


def _name(number: int, names: Mapping[Value, int], default: Value) -> Value:
    return next((name for name, value in names.items() if value == number), default)
