"""What a replica serves, as the handlers see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.presets import Presets
from service.rpc.errors import dictionary_not_found

if TYPE_CHECKING:
    from sae_runtime import Backbone, Dictionary


@dataclass(frozen=True, eq=False)
class ServedModel:
    """The backbone and the dictionaries of its sites."""

    backbone: Backbone
    dictionaries: Mapping[str, Dictionary]
    """By name, sorted. Every one has a site."""
    presets: Presets = field(default_factory=Presets)
    """Edits that requests can name."""

    def require(self, names: Sequence[str]) -> None:
        """RpcError NOT_FOUND unless there is a dictionary of every name; names all that are missing."""
        unknown = list(dict.fromkeys(name for name in names if name not in self.dictionaries))
        if unknown:
            raise dictionary_not_found(unknown, list(self.dictionaries))
