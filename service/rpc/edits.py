"""Edits of requests, as the library's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sae_runtime.edits import Edit, InvalidEdit, check_edits
from sae_runtime.edits.edit import MAX_AFTER_TEXT_BYTES, MAX_CONDITION_DEPTH, MAX_CONDITION_TERMS, Unit, terms
from sae_runtime.errors import EditConflict
from service.edits.messages import read_edit
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import edits_pb2 as pb
from service.rpc.checks import Violations, first_repeated
from service.rpc.errors import Violation, failed_precondition, preset_not_found, shown
from service.rpc.limits import Limits

if TYPE_CHECKING:
    from sae_runtime import Dictionary
    from service.engine.engine import Engine
    from service.rpc.served import ServedModel
    from service.rpc.text_inputs import TextInputReader

LACKS_STATISTICS = "STATISTICS"
"""Type of the PreconditionFailure violations here."""


class EditReader:
    """Reads the edits of one request, collecting what is wrong with them.

    `read` looks at the messages; `finish`, to be awaited when the rest of the request has been read, looks at them
    together and gives the edits as the engine takes them, for one prompt; a request with several prompts awaits it for
    each.
    """

    def __init__(
        self,
        served: ServedModel,
        limits: Limits,
        engine: Engine,
        text_reader: TextInputReader,
        violations: Violations,
    ) -> None:
        self._served = served
        self._limits = limits
        self._engine = engine
        self._text_reader = text_reader
        self._violations = violations
        self._lacking: list[Violation] = []
        self._edits: list[Edit] = []
        self._fields: list[str] = []  # of each edit, its name in the request
        self._references: dict[int, common_pb2.TextInput] = {}  # by edit
        self._resolved: tuple[Edit, ...] | None = None

    def read(self, messages: Sequence[pb.Edit], presets: Sequence[str] = (), field: str = "edits") -> Sequence[Edit]:
        """The edits of the named presets and of the request, in this order; to be used through `finish` only.

        RpcError NOT_FOUND for presets that there are not.
        """
        named = self._named(presets)
        count = len(messages) + sum(len(preset.edits) for preset in named)
        if count > self._limits.max_edits:
            with_presets = ", those of presets included" if named else ""
            self._violations.add(
                field, f"has {count} entries{with_presets}, more than max_edits = {self._limits.max_edits}"
            )
            return []
        own = [(message, f"{field}[{place}]") for place, message in enumerate(messages)]
        of_presets = [
            (message, f"presets[{at}].edits[{place}]")
            for at, preset in enumerate(named)
            for place, message in enumerate(preset.edits)
        ]
        for message, where in of_presets + own:
            self._check_edit(message, where)
            self._fields.append(where)
            self._edits.append(read_edit(message))
            if message.WhichOneof("operation") == "resample":
                self._references[len(self._edits) - 1] = message.resample.reference
        return self._edits

    def _named(self, names: Sequence[str]) -> list[pb.EditPreset]:
        limit = self._limits.max_edits  # every preset has at least one
        if len(names) > limit:
            self._violations.add("presets", f"has {len(names)} entries, more than max_edits = {limit}")
            return []
        found = {name: self._served.presets.get(name) for name in names}
        if unknown := [name for name, preset in found.items() if preset is None]:
            raise preset_not_found(unknown, self._served.presets.names)
        repeated = first_repeated(names)
        if repeated is not None:
            self._violations.add(f"presets[{repeated}]", f"{shown(names[repeated])} is named twice")
        return [preset for preset in found.values() if preset is not None]

    async def finish(self, prompt_length: int, field: str = "edits") -> tuple[Edit, ...]:
        """The edits for a prompt of that many tokens, reference texts having been run: each resample is a set.

        RpcError: NOT_FOUND for dictionaries that are not loaded, FAILED_PRECONDITION for edits that need statistics
        that are not there, INVALID_ARGUMENT for conflicts and for whatever else is wrong with the request.
        """
        dictionaries = self._served.dictionaries
        if not self._violations:
            named = [term.dictionary for edit in self._edits for term in terms(edit.condition) if term.dictionary]
            self._served.require([edit.dictionary for edit in self._edits] + named)
            if self._lacking:
                raise failed_precondition(self._lacking, LACKS_STATISTICS)
            try:
                check_edits(self._edits, dictionaries, prompt_length, self._served.backbone)
            except EditConflict as error:
                self._violations.add(field, str(error))
            except InvalidEdit as error:
                where = field if error.index is None else f"{self._fields[error.index]}.{error.field}"
                self._violations.add(where, error.reason)
        if not self._violations and self._resolved is None:
            self._resolved = await self._resolve()
        self._violations.raise_if_any()
        assert self._resolved is not None, "without violations it was set"
        return self._resolved

    # Reference texts

    async def _resolve(self) -> tuple[Edit, ...]:
        """The edits with every resample as the set that it comes to; can be used if there are no violations."""
        rows = await self._read_references()
        if self._violations:
            return ()
        unresolved = list(self._edits)
        for index, ids in rows.items():
            edit = self._edits[index]
            assert edit.reference is not None
            unresolved[index] = replace(edit, reference=replace(edit.reference, text=ids))
        resolved = await self._engine.resolve_references(unresolved)
        for index in rows:
            edit, where = resolved[index], f"{self._fields[index]}.resample"
            largest = max(edit.values or (edit.value,), key=abs)
            self._check_strength(largest, "raw", edit.feature, self._served.dictionaries[edit.dictionary], where)
        return resolved

    async def _read_references(self) -> dict[int, tuple[int, ...]]:
        """Token ids of the reference texts, by edit."""
        context, rows = self._engine.backbone.context_length, {}
        for index, source in self._references.items():
            where = f"{self._fields[index]}.resample.reference"
            read = await self._text_reader.read(
                [source],
                [where],
                common_pb2.OVERFLOW_ERROR,
                context,
                "the context length",
                "end",
                self._violations,
            )
            rows[index] = read[0].ids if read else ()
        limit = self._limits.max_tokens_per_request
        if (total := sum(map(len, rows.values()))) > limit:
            self._violations.add(
                self._fields[max(rows)],
                f"reference texts have {total} tokens together, more than max_tokens_per_request = {limit}",
            )
        return rows

    # One message

    def _check_edit(self, message: pb.Edit, field: str) -> None:
        if not message.dictionary:
            self._violations.add(f"{field}.dictionary", "is empty, expected a dictionary's name")
        dictionary = self._served.dictionaries.get(message.dictionary)
        self._check_feature(message.feature, dictionary, f"{field}.feature")
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
                self._check_strength(amount.value, unit, feature, dictionary, f"{field}.{kind}.value")
            case "scale":
                self._check_strength(message.scale, "max", feature, dictionary, f"{field}.scale")
            case "clamp":
                clamp = message.clamp
                unit = self._check_unit(clamp.unit, feature, dictionary, f"{field}.clamp.unit")
                bounds = [name for name in ("minimum", "maximum") if clamp.HasField(name)]
                for name in bounds:
                    self._check_strength(getattr(clamp, name), unit, feature, dictionary, f"{field}.clamp.{name}")
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

    def _check_feature(self, feature: int, dictionary: Dictionary | None, field: str) -> None:
        if dictionary is not None and feature >= dictionary.n_latents:
            name = shown(dictionary.name)
            self._violations.add(field, f"feature {feature} is outside 0..{dictionary.n_latents - 1} of {name}")

    def _check_unit(self, unit: int, feature: int, dictionary: Dictionary | None, field: str) -> Unit:
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
        self, value: float, unit: Unit, feature: int, dictionary: Dictionary | None, field: str
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
        context = self._engine.max_sequence_tokens
        if not self._violations.check_count(field, len(positions), context, "the context length"):
            return
        if max(positions) >= context:
            at = next(place for place, position in enumerate(positions) if position >= context)
            self._violations.add(f"{field}[{at}]", f"{positions[at]} is outside the context length of {context}")
        repeated = first_repeated(positions)
        if repeated is not None:
            self._violations.add(f"{field}[{repeated}]", f"position {positions[repeated]} is named twice")

    def _check_after(self, after: pb.AfterText, field: str) -> None:
        if not after.text:
            self._violations.add(f"{field}.text", "is empty, expected at least one character")
        elif len(after.text) > MAX_AFTER_TEXT_BYTES or len(after.text.encode()) > MAX_AFTER_TEXT_BYTES:
            self._violations.add(f"{field}.text", f"has more than {MAX_AFTER_TEXT_BYTES} bytes")
        elif not self._text_reader.has_tokenizer:
            self._violations.add(f"{field}.text", "the backbone has no tokenizer")
        self._violations.check_enum(f"{field}.occurrence", after.occurrence, pb.Occurrence.values())
        if after.occurrence == pb.OCCURRENCE_EACH and not after.max_tokens:
            self._violations.add(
                f"{field}.max_tokens", "is 0, but after each occurrence without a bound is after the first"
            )

    def _check_condition(self, message: pb.Condition, own: Dictionary | None, field: str, depth: int) -> int:
        """Returns the number of thresholds."""
        kind = message.WhichOneof("combination")
        if kind is None:
            self._check_term(message, own, field)
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
        return sum(self._check_condition(each, own, f"{field}[{i}]", depth + 1) for i, each in enumerate(inner))

    def _check_term(self, message: pb.Condition, own: Dictionary | None, field: str) -> None:
        dictionary = self._served.dictionaries.get(message.dictionary) if message.dictionary else own
        self._check_feature(message.feature, dictionary, f"{field}.feature")
        self._violations.check_enum(f"{field}.comparison", message.comparison, pb.Comparison.values())
        self._check_unit(message.unit, message.feature, dictionary, f"{field}.unit")
        if not (math.isfinite(message.threshold) and message.threshold >= 0):
            self._violations.add(f"{field}.threshold", f"is {message.threshold}, expected a finite number, at least 0")


def _recorded_maximum(dictionary: Dictionary | None, feature: int) -> float | None:
    """The feature's largest activation on the text that statistics were taken on; None if it is not known."""
    if dictionary is None or dictionary.statistics is None or feature >= dictionary.n_latents:
        return None
    return float(dictionary.statistics.max[feature])
