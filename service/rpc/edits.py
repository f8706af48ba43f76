"""Edits of requests, as the engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sae_runtime.edits import Edit, InvalidEdit, check_edits
from sae_runtime.edits.edit import terms
from sae_runtime.errors import EditConflict
from service.edits.messages import read_edit
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import edits_pb2 as pb
from service.rpc.checks import Violations
from service.rpc.edit_checks import EditChecks
from service.rpc.errors import failed_precondition, preset_not_found, shown
from service.rpc.model import LACKS_STATISTICS, ModelRpc


class EditReader:
    """Reads the edits of one request, collecting what is wrong with them.

    `read` looks at the messages. `finish`, to be awaited when the rest of the request has been read, looks at the edits
    together and returns them as the engine takes them for one prompt. With several prompts, await it once a prompt.
    """

    def __init__(self, rpc: ModelRpc, violations: Violations) -> None:
        self._rpc = rpc
        self._violations = violations
        self._checks = EditChecks(rpc, violations)
        self._edits: list[Edit] = []
        self._fields: list[str] = []
        """The field of each edit in the request, such as "edits[2]"."""
        self._references: dict[int, common_pb2.TextInput] = {}
        """The reference texts, by edit."""
        self._resolved: tuple[Edit, ...] | None = None

    def read(self, messages: Sequence[pb.Edit], presets: Sequence[str] = ()) -> bool:
        """Whether there are edits, in the named presets or in the request; presets come first.

        RpcError NOT_FOUND for unknown presets.
        """
        named = self._named(presets)
        count = len(messages) + sum(len(preset.edits) for preset in named)
        with_presets = ", those of presets included" if named else ""
        if not self._violations.check_limit("edits", count, "max_edits", f"has {{}} entries{with_presets}"):
            return True
        placed = [
            (message, f"presets[{at}].edits[{place}]")
            for at, preset in enumerate(named)
            for place, message in enumerate(preset.edits)
        ]
        placed += [(message, f"edits[{place}]") for place, message in enumerate(messages)]
        for message, field in placed:
            self._checks.check(message, field)
            if message.WhichOneof("operation") == "resample":
                self._references[len(self._edits)] = message.resample.reference
            self._edits.append(read_edit(message))
            self._fields.append(field)
        return count > 0

    def _named(self, names: Sequence[str]) -> list[pb.EditPreset]:
        if not self._violations.check_at_most("presets", len(names), "max_edits"):  # every preset has one at least
            return []
        presets = self._rpc.model.presets
        by_name = {name: presets.get(name) for name in names}
        if unknown := [name for name, preset in by_name.items() if preset is None]:
            raise preset_not_found(unknown, presets.names)
        self._violations.check_distinct("presets", names, shown)
        return [preset for preset in by_name.values() if preset is not None]

    async def finish(self, prompt_length: int) -> tuple[Edit, ...]:
        """The edits for a prompt of that many tokens, their references resolved.

        RpcError: NOT_FOUND for dictionaries that are not loaded, FAILED_PRECONDITION for edits that need statistics
        that are not there, INVALID_ARGUMENT for conflicts and for whatever else is wrong with the request.
        """
        if not self._violations:
            self._check_together(prompt_length)
        if not self._violations and self._resolved is None:
            self._resolved = await self._resolve()
        self._violations.raise_if_any()
        assert self._resolved is not None, "without violations it was set"
        return self._resolved

    def _check_together(self, prompt_length: int) -> None:
        model = self._rpc.model
        read = [term.dictionary for edit in self._edits for term in terms(edit.condition) if term.dictionary]
        model.require([edit.dictionary for edit in self._edits] + read)
        if self._checks.lacking:
            raise failed_precondition(self._checks.lacking, LACKS_STATISTICS)
        try:
            check_edits(self._edits, model.dictionaries, prompt_length, model.backbone)
        except EditConflict as error:
            self._violations.add("edits", str(error))
        except InvalidEdit as error:
            where = "edits" if error.index is None else f"{self._fields[error.index]}.{error.field}"
            self._violations.add(where, error.reason)

    # Reference texts

    async def _resolve(self) -> tuple[Edit, ...]:
        """The edits with every resample replaced by the set it amounts to; valid only without violations."""
        rows = await self._read_references()
        if self._violations:
            return ()
        edits = list(self._edits)
        for index, ids in rows.items():
            reference = edits[index].reference
            assert reference is not None, "the message has one"
            edits[index] = replace(edits[index], reference=replace(reference, text=ids))
        resolved = await self._rpc.engine.resolve_references(edits)
        for index in rows:
            edit = resolved[index]
            strongest = max(edit.values or (edit.value,), key=abs)
            dictionary = self._rpc.model.dictionaries[edit.dictionary]
            self._checks.check_strength(strongest, "raw", edit.feature, dictionary, f"{self._fields[index]}.resample")
        return resolved

    async def _read_references(self) -> dict[int, tuple[int, ...]]:
        """Token ids of the reference texts, by edit."""
        most, rows = self._rpc.model.backbone.context_length, {}
        for index, text in self._references.items():
            field = f"{self._fields[index]}.resample.reference"
            row = await self._rpc.reader.read_one(
                text, field, common_pb2.OVERFLOW_ERROR, most, "the context length", "end", self._violations
            )
            rows[index] = row.ids if row is not None else ()
        if rows:
            total, described = sum(map(len, rows.values())), "reference texts have {} tokens together"
            self._violations.check_limit(self._fields[max(rows)], total, "max_tokens_per_request", described)
        return rows
