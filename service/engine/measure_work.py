"""What causal measurements take and give: plain data, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from service.engine.work import WorkTiming

if TYPE_CHECKING:
    from sae_runtime.causal.ablation import FeatureId, Replacement
    from sae_runtime.causal.ablation_report import AblationReport, RankBy
    from sae_runtime.causal.attribution import AttributionReport
    from sae_runtime.causal.contrast import FeatureContrast
    from sae_runtime.causal.suggestion import Trial
    from sae_runtime.edits import Edit

Rows = tuple[tuple[int, ...], ...]
"""Token ids, one row a text."""


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """Teacher-forced scores of rows."""

    rows: Rows
    """At least two tokens each."""
    edits: tuple[tuple[Edit, ...], ...] = ()
    """The edits of each row, references resolved; empty: no row has edits."""
    logit_tokens: tuple[int, ...] = ()
    max_relative_change: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class ScoreArrays:
    """The predictions on one row of T tokens; entry i is made after token i."""

    loss: NDArray[np.float32]
    """[T - 1] nats."""
    correct: NDArray[np.bool_]
    """[T - 1]."""
    target_logits: NDArray[np.float32]
    """[T - 1]."""
    token_logits: NDArray[np.float32]
    """[T, m]."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRow:
    unedited: ScoreArrays
    edited: ScoreArrays | None
    kl: NDArray[np.float32] | None
    """[T], with edits."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResult:
    rows: list[ScoredRow]
    timing: WorkTiming


@dataclass(frozen=True, slots=True)
class AblateWork:
    """An ablation study of rows. See sae_runtime.causal.ablation."""

    rows: Rows
    """At least two tokens each."""
    features: tuple[FeatureId, ...] = ()
    """Empty: the strongest."""
    strongest: int = 0
    """How many of the strongest features of `dictionaries`, if no features are given."""
    dictionaries: tuple[str, ...] = ()
    replacements: tuple[Replacement, ...] = ("zero",)
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
    """Up to the token after which the logits are meant."""
    dictionaries: tuple[str, ...]
    target: int | None = None
    """None: the likeliest token."""
    foil: int | None = None
    count: int = 20


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
    """All that were tested, the surest first."""
    suggestion: tuple[Edit, ...]
    trials: list[Trial]
    timing: WorkTiming
