"""The edit presets of a server: named sets of edits from its file `edit_presets`, as messages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sae_runtime.edits.checks import check_edits
from sae_runtime.edits.edit import terms
from service.edits.files import EditFileError, Preset, read_presets
from service.edits.messages import edit_message
from service.pb.saeserve.v1 import edits_pb2 as pb

if TYPE_CHECKING:
    from sae_runtime import Backbone, Dictionary

logger = logging.getLogger(__name__)


class Presets:
    """Presets by name, sorted."""

    def __init__(self, presets: Mapping[str, Preset] | None = None) -> None:
        self._messages = {
            name: pb.EditPreset(
                name=name, description=preset.description, edits=[edit_message(edit) for edit in preset.edits]
            )
            for name, preset in sorted((presets or {}).items())
        }

    @classmethod
    def load(cls, file: str, dictionaries: Mapping[str, Dictionary], backbone: Backbone) -> Presets:
        """The presets of a file; none if its name is empty.

        A preset is checked against its dictionaries if they are loaded, otherwise only when a request uses it.

        Raises:
            EditFileError: the file or a preset is wrong; the message names both.
        """
        if not file:
            return cls()
        presets = {preset.name: preset for preset in read_presets(Path(file))}
        for preset in presets.values():
            names = {edit.dictionary for edit in preset.edits}
            names |= {term.dictionary for edit in preset.edits for term in terms(edit.condition) if term.dictionary}
            if missing := sorted(names - set(dictionaries)):
                logger.warning("preset %r needs %s, which are not loaded", preset.name, ", ".join(missing))
                continue
            try:
                check_edits(preset.edits, dictionaries, backbone=backbone)
                for edit in preset.edits:
                    if edit.reference is not None and isinstance(edit.reference.text, str):
                        backbone.check_tokens(backbone.encode_text(edit.reference.text))
            except ValueError as error:
                raise EditFileError(f"{file}: preset {preset.name!r}: {error}") from None
        return cls(presets)

    def __iter__(self) -> Iterator[pb.EditPreset]:
        return iter(self._messages.values())

    def get(self, name: str) -> pb.EditPreset | None:
        """The preset of a name, or None."""
        return self._messages.get(name)

    @property
    def names(self) -> list[str]:
        return list(self._messages)
