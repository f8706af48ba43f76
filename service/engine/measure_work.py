"""Inputs and results of causal measurements: plain data, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sae_runtime.causal.report import (
    Ablation,
    AblationReport,
    AttributionReport,
    FeatureContrast,
    FeatureId,
    RankBy,
    SuggestionTrial,
    TextScore,
)
from sae_runtime.dictionary.ranking import Ranking
from sae_runtime.edits.edit import Edit
from service.engine.work import WorkTiming

Rows = tuple[tuple[int, ...], ...]
"""Token ids, one row a text."""


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """Teacher-forced scores of rows."""

    rows: Rows
    """At least two tokens each."""
    edits: tuple[tuple[Edit, ...], ...] = ()
    """Edits by row, references resolved (see Engine.resolve_references). Empty: no row has edits."""
    logit_tokens: tuple[int, ...] = ()
    max_relative_change: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResult:
    rows: list[TextScore]
    timing: WorkTiming


@dataclass(frozen=True, slots=True)
class AblateWork:
    """An ablation study of rows. See sae_runtime.causal.ablation."""

    rows: Rows
    """At least two tokens each."""
    features: tuple[FeatureId, ...] = ()
    """Empty: the `strongest` features of `dictionaries`."""
    strongest: int = 0
    """How many of the strongest features of `dictionaries`, if no features are given."""
    strongest_by: Ranking = "activation"
    dictionaries: tuple[str, ...] = ()
    ablations: tuple[Ablation, ...] = ("zero",)
    logit_tokens: tuple[int, ...] = ()
    single_tokens: int = 0
    rank_by: RankBy = "kl"


@dataclass(frozen=True, slots=True, eq=False)
class AblateResult:
    report: AblationReport
    n_variants: int
    timing: WorkTiming


@dataclass(frozen=True, slots=True)
class AttributeWork:
    """The features behind a logit. See sae_runtime.causal.attribution."""

    row: tuple[int, ...]
    """Token ids. The logits are those after the last one."""
    dictionaries: tuple[str, ...]
    target: int | None = None
    """None: the likeliest token."""
    foil: int | None = None
    count: int = 20
    rank_by: Ranking = "activation"


@dataclass(frozen=True, slots=True, eq=False)
class AttributeResult:
    report: AttributionReport
    target: int
    timing: WorkTiming


@dataclass(frozen=True, slots=True)
class ContrastWork:
    """The features that tell two sets of rows apart. See sae_runtime.causal.contrast."""

    a: Rows
    """At least two rows."""
    b: Rows
    dictionaries: tuple[str, ...]
    aggregation: Literal["max", "mean"] = "max"
    suggest: int = 0
    """How many features a suggested edit uses; those without a recorded maximum are passed over. 0: no suggestion."""
    validate: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ContrastResult:
    features: list[FeatureContrast]
    """All features that were tested, the surest first."""
    suggestion: tuple[Edit, ...]
    trials: list[SuggestionTrial]
    timing: WorkTiming
