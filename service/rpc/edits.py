"""Edits of requests, as the library's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from sae_runtime.errors import EditConflict
from sae_runtime.interventions import Condition, Edit, Positions, check_edits
from service.pb.saeserve.v1 import intervention_service_pb2 as pb
from service.rpc.checks import Violations, first_repeated
from service.rpc.errors import Violation, failed_precondition, shown
from service.rpc.limits import Limits

if TYPE_CHECKING:
    from sae_runtime import Dictionary

LACKS_STATISTICS = "STATISTICS"
"""Type of the PreconditionFailure violations here."""


class EditReader:
    """Reads the edits of one request, collecting what is wrong with them."""

    def __init__(
        self, dictionaries: Mapping[str, Dictionary], limits: Limits, context_length: int, violations: Violations
    ) -> None:
        self._dictionaries = dictionaries
        self._limits = limits
        self._context_length = context_length
        self._violations = violations
        self._lacking: list[Violation] = []

    def read(self, messages: Sequence[pb.Edit]) -> list[Edit]:
        """The edits; can be used if there were no violations, all dictionaries exist and `raise_if_lacking` passed."""
        if len(messages) > self._limits.max_edits:
            self._violations.add(
                "edits", f"has {len(messages)} entries, more than max_edits = {self._limits.max_edits}"
            )
            return []
        return [self._read_edit(message, f"edits[{place}]") for place, message in enumerate(messages)]

    def raise_if_lacking(self) -> None:
        """RpcError FAILED_PRECONDITION for edits that need statistics that are not there."""
        if self._lacking:
            raise failed_precondition(self._lacking, LACKS_STATISTICS)

    def check_conflicts(self, edits: Sequence[Edit], prompt_length: int) -> None:
        """That no two edits write a feature at the same position. Only for edits that are right by themselves."""
        try:
            check_edits(edits, self._dictionaries, prompt_length)
        except EditConflict as error:
            self._violations.add("edits", str(error))

    def _read_edit(self, message: pb.Edit, field: str) -> Edit:
        add = self._violations.add
        if not message.dictionary:
            add(f"{field}.dictionary", "is empty, expected a dictionary's name")
        dictionary = self._dictionaries.get(message.dictionary)
        self._check_feature(message.feature, dictionary, f"{field}.feature")
        positions: Positions = "all"
        if message.HasField("positions"):
            positions = self._read_positions(message.positions, f"{field}.positions")
        condition = None
        if message.HasField("condition"):
            condition = Condition(message.condition.feature, message.condition.threshold)
            self._check_feature(condition.feature, dictionary, f"{field}.condition.feature")
            if not (math.isfinite(condition.threshold) and condition.threshold >= 0):
                add(f"{field}.condition.threshold", f"is {condition.threshold}, expected a finite number, at least 0")

        def edit(
            operation: Literal["set", "add", "scale", "clamp", "ablate_zero", "ablate_mean"],
            value: float = 0.0,
            minimum: float | None = None,
            maximum: float | None = None,
            unit: Literal["raw", "max"] = "raw",
        ) -> Edit:
            return Edit(
                message.dictionary, message.feature, operation, value, minimum, maximum, unit, positions, condition
            )

        kind = message.WhichOneof("operation")
        if kind in ("set", "add"):
            amount = message.set if kind == "set" else message.add
            unit = self._read_unit(amount.unit, message.feature, dictionary, f"{field}.{kind}.unit")
            self._check_strength(amount.value, unit, message.feature, dictionary, f"{field}.{kind}.value")
            return edit("set" if kind == "set" else "add", amount.value, unit=unit)
        if kind == "scale":
            self._check_strength(message.scale, "max", message.feature, dictionary, f"{field}.scale")
            return edit("scale", message.scale)
        if kind == "clamp":
            clamp = message.clamp
            minimum = clamp.minimum if clamp.HasField("minimum") else None
            maximum = clamp.maximum if clamp.HasField("maximum") else None
            unit = self._read_unit(clamp.unit, message.feature, dictionary, f"{field}.clamp.unit")
            for name, bound in (("minimum", minimum), ("maximum", maximum)):
                if bound is not None:
                    self._check_strength(bound, unit, message.feature, dictionary, f"{field}.clamp.{name}")
            if minimum is None and maximum is None:
                add(f"{field}.clamp", "has no bound; set minimum, maximum or both")
            elif minimum is not None and maximum is not None and minimum > maximum:
                add(f"{field}.clamp.minimum", f"is {minimum}, above the maximum {maximum}")
            return edit("clamp", minimum=minimum, maximum=maximum, unit=unit)
        if kind == "ablate":
            self._violations.check_enum(f"{field}.ablate", message.ablate, pb.Ablation.values())
            if message.ablate != pb.ABLATION_MEAN:
                return edit("ablate_zero")
            self._need_statistics(dictionary, f"{field}.ablate", "ABLATION_MEAN")
            return edit("ablate_mean")
        add(field, "has no operation; set one of set, add, scale, clamp, ablate")
        return edit("ablate_zero")

    def _check_feature(self, feature: int, dictionary: Dictionary | None, field: str) -> None:
        if dictionary is not None and feature >= dictionary.n_latents:
            name = shown(dictionary.name)
            self._violations.add(field, f"feature {feature} is outside 0..{dictionary.n_latents - 1} of {name}")

    def _read_unit(self, unit: int, feature: int, dictionary: Dictionary | None, field: str) -> Literal["raw", "max"]:
        self._violations.check_enum(field, unit, pb.Unit.values())
        if unit != pb.UNIT_RECORDED_MAXIMUM:
            return "raw"
        self._need_statistics(dictionary, field, "UNIT_RECORDED_MAXIMUM")
        if _recorded_maximum(dictionary, feature) == 0:
            self._lacking.append(
                Violation(
                    field, f"feature {feature} has no recorded maximum: it never fired when statistics were taken"
                )
            )
        return "max"

    def _need_statistics(self, dictionary: Dictionary | None, field: str, what: str) -> None:
        if dictionary is not None and dictionary.statistics is None:
            name = shown(dictionary.name)
            self._lacking.append(Violation(field, f"{what} needs statistics, which dictionary {name} lacks"))

    def _check_strength(
        self, value: float, unit: Literal["raw", "max"], feature: int, dictionary: Dictionary | None, field: str
    ) -> None:
        limit = self._limits.max_edit_strength
        if not math.isfinite(value):
            self._violations.add(field, f"is {value}, expected a finite number")
            return
        # A scale multiplies activations that are about the recorded maximum at most, so it is a multiple of it as well.
        maximum = 1.0 if unit == "max" else _recorded_maximum(dictionary, feature)
        if maximum and abs(value) / maximum > limit:
            self._violations.add(
                field, f"is {abs(value) / maximum:.6g} x the recorded maximum, more than max_edit_strength = {limit:g}"
            )

    def _read_positions(self, message: pb.Positions, field: str) -> Positions:
        kind = message.WhichOneof("positions")
        if kind == "range":
            self._violations.check_enum(f"{field}.range", message.range, pb.PositionRange.values())
            return _RANGES.get(message.range, "all")
        if kind is None:
            self._violations.add(field, "has no rule; set range or explicit, or leave positions unset")
            return "all"
        field += ".explicit.positions"
        count = len(message.explicit.positions)
        if not self._violations.check_count(field, count, self._context_length, "the context length"):
            return "all"
        positions = tuple(message.explicit.positions)
        if max(positions) >= self._context_length:
            at = next(place for place, position in enumerate(positions) if position >= self._context_length)
            self._violations.add(
                f"{field}[{at}]", f"{positions[at]} is outside the context length of {self._context_length}"
            )
        repeated = first_repeated(positions)
        if repeated is not None:
            self._violations.add(f"{field}[{repeated}]", f"position {positions[repeated]} is named twice")
        return positions


_RANGES: dict[int, Literal["all", "prompt", "generated"]] = {
    pb.POSITION_RANGE_PROMPT: "prompt",
    pb.POSITION_RANGE_GENERATED: "generated",
}


def _recorded_maximum(dictionary: Dictionary | None, feature: int) -> float | None:
    """The feature's largest activation on the text that statistics were taken on; None if it is not known."""
    if dictionary is None or dictionary.statistics is None or feature >= dictionary.n_latents:
        return None
    return float(dictionary.statistics.max[feature])
