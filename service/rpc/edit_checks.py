"""Checks of the edit messages of a request, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sae_runtime.edits.edit import MAX_AFTER_TEXT_BYTES, MAX_CONDITION_DEPTH, MAX_CONDITION_TERMS, Unit
from service.pb.saeserve.v1 import edits_pb2 as pb
from service.rpc.checks import Violations
from service.rpc.errors import Violation
from service.rpc.model import ModelRpc, lacks_statistics

if TYPE_CHECKING:
    from sae_runtime import Dictionary


class EditChecks:
    """Checks the edits of one request. Does not check that dictionaries are loaded."""

    def __init__(self, rpc: ModelRpc, violations: Violations) -> None:
        self._dictionaries = rpc.model.dictionaries
        self._limits = rpc.limits
        self._context = rpc.engine.max_sequence_tokens
        self._has_tokenizer = rpc.reader.has_tokenizer
        self._violations = violations
        self.lacking: list[Violation] = []
        """Missing statistics that edits need: a precondition, as the request itself is valid."""

    def check(self, message: pb.Edit, field: str) -> None:
        self._violations.check_dictionary_name(message.dictionary, f"{field}.dictionary")
        dictionary = self._dictionaries.get(message.dictionary)
        self._violations.check_feature(message.feature, dictionary, f"{field}.feature")
        self._check_operation(message, dictionary, field)
        if message.HasField("positions"):
            self._check_positions(message.positions, f"{field}.positions")
        if message.HasField("condition"):
            n_terms = self._check_condition(message.condition, dictionary, f"{field}.condition", 0)
            if n_terms > MAX_CONDITION_TERMS:
                self._violations.add(f"{field}.condition", f"has {n_terms} thresholds, more than {MAX_CONDITION_TERMS}")

    def _check_operation(self, message: pb.Edit, dictionary: Dictionary | None, field: str) -> None:
        add, feature = self._violations.add, message.feature
        kind = message.WhichOneof("operation")
        match kind:
            case "set" | "add":
                amount = message.set if kind == "set" else message.add
                unit = self._check_unit(amount.unit, feature, dictionary, f"{field}.{kind}.unit")
                self.check_strength(amount.value, unit, feature, dictionary, f"{field}.{kind}.value")
            case "scale":
                self.check_strength(message.scale, "max", feature, dictionary, f"{field}.scale")
            case "clamp":
                clamp = message.clamp
                unit = self._check_unit(clamp.unit, feature, dictionary, f"{field}.clamp.unit")
                bounds = [name for name in ("minimum", "maximum") if clamp.HasField(name)]
                for name in bounds:
                    self.check_strength(getattr(clamp, name), unit, feature, dictionary, f"{field}.clamp.{name}")
                if not bounds:
                    add(f"{field}.clamp", "has no bound; set minimum, maximum or both")
                elif len(bounds) == 2 and clamp.minimum > clamp.maximum:
                    add(f"{field}.clamp.minimum", f"is {clamp.minimum}, above the maximum {clamp.maximum}")
            case "ablate":
                self._violations.check_enum(f"{field}.ablate", message.ablate, pb.Ablation.values())
                if message.ablate == pb.ABLATION_MEAN:
                    self._need_statistics(dictionary, f"{field}.ablate", "ABLATION_MEAN")
            case "resample":
                tokens = message.resample.tokens
                self._violations.check_enum(f"{field}.resample.tokens", tokens, pb.ReferenceTokens.values())
                if message.resample.reference.WhichOneof("input") is None:
                    add(f"{field}.resample.reference", "is empty; set text or token_ids")
            case "replace":
                if feature:
                    add(f"{field}.feature", f"is {feature}, but replace is of the whole dictionary; leave it unset")
            case _:
                add(field, "has no operation; set one of set, add, scale, clamp, ablate, resample, replace")

    def _check_unit(self, unit: int, feature: int, dictionary: Dictionary | None, field: str) -> Unit:
        self._violations.check_enum(field, unit, pb.Unit.values())
        if unit != pb.UNIT_RECORDED_MAXIMUM:
            return "raw"
        self._need_statistics(dictionary, field, "UNIT_RECORDED_MAXIMUM")
        if _recorded_maximum(dictionary, feature) == 0:
            reason = "has no recorded maximum: it never fired when statistics were taken"
            self.lacking.append(Violation(field, f"feature {feature} {reason}"))
        return "max"

    def _need_statistics(self, dictionary: Dictionary | None, field: str, what: str) -> None:
        if dictionary is not None and (lack := lacks_statistics(dictionary, what, field)) is not None:
            self.lacking.append(lack)

    def check_strength(self, value: float, unit: Unit, feature: int, dictionary: Dictionary | None, field: str) -> None:
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

    def _check_positions(self, message: pb.Positions, field: str) -> None:
        match message.WhichOneof("positions"):
            case "range":
                self._violations.check_enum(f"{field}.range", message.range, pb.PositionRange.values())
            case "explicit":
                self._check_explicit(message.explicit.positions, f"{field}.explicit.positions")
            case "after":
                self._check_after(message.after, f"{field}.after")
            case _:
                self._violations.add(field, "has no rule; set range, explicit or after, or leave positions unset")

    def _check_explicit(self, positions: Sequence[int], field: str) -> None:
        if not positions:
            self._violations.add(field, "is empty; at least one is needed")
        elif len(positions) > self._context:
            self._violations.add(field, f"has {len(positions)} entries, more than the context length = {self._context}")
        else:
            at = next((place for place, position in enumerate(positions) if position >= self._context), None)
            if at is not None:
                outside = f"{positions[at]} is outside the context length of {self._context}"
                self._violations.add(f"{field}[{at}]", outside)
            self._violations.check_distinct(field, positions, lambda position: f"position {position}")

    def _check_after(self, after: pb.AfterText, field: str) -> None:
        if not after.text:
            self._violations.add(f"{field}.text", "is empty, expected at least one character")
        elif len(after.text) > MAX_AFTER_TEXT_BYTES or len(after.text.encode()) > MAX_AFTER_TEXT_BYTES:
            self._violations.add(f"{field}.text", f"has more than {MAX_AFTER_TEXT_BYTES} bytes")
        elif not self._has_tokenizer:
            self._violations.add(f"{field}.text", "the backbone has no tokenizer")
        self._violations.check_enum(f"{field}.occurrence", after.occurrence, pb.Occurrence.values())
        if after.occurrence == pb.OCCURRENCE_EACH and not after.max_tokens:
            self._violations.add(
                f"{field}.max_tokens", "is 0, but after each occurrence without a bound is after the first"
            )

    def _check_condition(self, message: pb.Condition, edited: Dictionary | None, field: str, depth: int) -> int:
        """Returns the number of thresholds; those without a dictionary read the edited one."""
        kind = message.WhichOneof("combination")
        if kind is None:
            self._check_term(message, edited, field)
            return 1
        for name in ("feature", "threshold", "dictionary", "comparison", "unit"):
            if getattr(message, name):
                self._violations.add(f"{field}.{name}", f"must not be set beside {kind}")
        inner = (message.all_of if kind == "all_of" else message.any_of).conditions
        field = f"{field}.{kind}.conditions"
        if not inner:
            self._violations.add(field, "is empty; at least one is needed")
        if depth == MAX_CONDITION_DEPTH:
            self._violations.add(field, f"is more than {MAX_CONDITION_DEPTH} combinations inside one another")
            return 0
        if len(inner) > MAX_CONDITION_TERMS:
            return len(inner)
        return sum(
            self._check_condition(condition, edited, f"{field}[{i}]", depth + 1) for i, condition in enumerate(inner)
        )

    def _check_term(self, message: pb.Condition, edited: Dictionary | None, field: str) -> None:
        dictionary = self._dictionaries.get(message.dictionary) if message.dictionary else edited
        self._violations.check_feature(message.feature, dictionary, f"{field}.feature")
        self._violations.check_enum(f"{field}.comparison", message.comparison, pb.Comparison.values())
        self._check_unit(message.unit, message.feature, dictionary, f"{field}.unit")
        self._violations.check_threshold(f"{field}.threshold", message.threshold)


def _recorded_maximum(dictionary: Dictionary | None, feature: int) -> float | None:
    """The feature's largest activation on the text that statistics were taken on; None if it is not known."""
    if dictionary is None or dictionary.statistics is None or feature >= dictionary.n_latents:
        return None
    return float(dictionary.statistics.max[feature])
