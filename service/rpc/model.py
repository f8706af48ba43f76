"""The model that a replica serves, and checks of the dictionaries and features that a request names."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.presets import Presets
from service.rpc.errors import Violation, dictionary_not_found, failed_precondition, features_not_found, shown

if TYPE_CHECKING:
    from sae_runtime import Backbone, Dictionary
    from sae_runtime.catalogue.annotations import Annotations
    from sae_runtime.causal.report import FeatureId
    from sae_runtime.dictionary.ranking import Ranking
    from service.engine.engine import Engine
    from service.rpc.limits import Limits
    from service.rpc.text_inputs import TextInputReader

LACKS_STATISTICS = "STATISTICS"
"""Type of the PreconditionFailure violations of dictionaries without statistics."""
LACKS_CATALOGUE = "CATALOGUE"
"""Type of the PreconditionFailure violations of dictionaries without a catalogue that can be used."""
IS_TRANSCODER = "TRANSCODER"
"""Type of the PreconditionFailure violations of dictionaries that decode to another site than they read."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """The backbone and the dictionaries of its sites."""

    backbone: Backbone
    dictionaries: Mapping[str, Dictionary]
    """By name, sorted. Every one has a site."""
    presets: Presets = field(default_factory=Presets)
    """Edits that requests can name."""
    notes: Sequence[str] = ()
    """What was noted of the files while they were loaded."""
    annotations: Mapping[str, Annotations] = field(default_factory=dict)
    """What is known of the features of each dictionary, by its name."""

    def require(self, names: Iterable[str]) -> None:
        """Raises RpcError NOT_FOUND, with all missing names, unless every name is a loaded dictionary."""
        unknown = list(dict.fromkeys(name for name in names if name not in self.dictionaries))
        if unknown:
            raise dictionary_not_found(unknown, list(self.dictionaries))

    def require_features(self, features: Sequence[FeatureId]) -> None:
        """Raises RpcError NOT_FOUND for features outside their dictionaries, which must be loaded."""
        sized = [(name, feature, self.dictionaries[name].n_latents) for name, feature in features]
        if unknown := [(name, feature, size) for name, feature, size in sized if feature >= size]:
            raise features_not_found(unknown)

    def require_catalogue(self, name: str) -> Annotations:
        """Raises RpcError NOT_FOUND for a dictionary not loaded, FAILED_PRECONDITION for one without a catalogue."""
        self.require([name])
        annotations = self.annotations[name]
        if annotations.catalogue is None:
            raise failed_precondition([lacks_catalogue(name, annotations.problem)], LACKS_CATALOGUE)
        return annotations

    def require_ablatable(self, names: Sequence[str], where: str) -> None:
        """Raises RpcError NOT_FOUND for dictionaries not loaded, FAILED_PRECONDITION at `where` for transcoders."""
        self.require(names)
        reason = "is a transcoder: it decodes to another site than it reads, so its features cannot be taken away"
        transcoders = [name for name in names if self.dictionaries[name].transcoder]
        if transcoders:
            violations = [Violation(where, f"dictionary {shown(name)} {reason}") for name in transcoders]
            raise failed_precondition(violations, IS_TRANSCODER)

    def require_statistics(self, names: Iterable[str], what: str, where: str) -> None:
        """Raises RpcError FAILED_PRECONDITION at `where` for dictionaries without the statistics `what` needs."""
        checked = (lacks_statistics(self.dictionaries[name], what, where) for name in dict.fromkeys(names))
        if violations := [violation for violation in checked if violation is not None]:
            raise failed_precondition(violations, LACKS_STATISTICS)

    def require_rankable(self, names: Iterable[str], ranking: Ranking, where: str) -> None:
        """Raises RpcError FAILED_PRECONDITION at `where` if the order needs statistics that a dictionary lacks."""
        if ranking != "activation":
            self.require_statistics(names, f"FEATURE_RANKING_{ranking.upper()}", where)


def lacks_catalogue(name: str, problem: str = "") -> Violation:
    """The violation of a dictionary without a catalogue, or with one that cannot be used."""
    lack = "has a catalogue that cannot be used (the server's log says why)" if problem else "has no catalogue"
    build = f"saeserve catalogue build {shlex.quote(name)} --data TEXT"
    return Violation("dictionary", f"dictionary {shown(name)} {lack}; build one with `{build}`, and restart the server")


def lacks_statistics(dictionary: Dictionary, what: str, where: str) -> Violation | None:
    """The violation of a dictionary without the statistics that `what` needs; None if it has them."""
    if dictionary.statistics is not None:
        return None
    return Violation(where, f"{what} needs statistics, which dictionary {shown(dictionary.name)} lacks")


@dataclass(frozen=True, eq=False)
class ModelRpc:
    """Base of the handlers of RPCs that run the model."""

    engine: Engine
    model: ServedModel
    limits: Limits
    reader: TextInputReader
