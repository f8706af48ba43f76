"""Results of measurements: the figures of sae_runtime.causal.report, with the details of the call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sae_runtime.causal.report import AblationReport, AttributionReport, FeatureContrast, SuggestionTrial, TextScore
from sae_runtime.edits.edit import Edit
from service.client.results import Labels, Timing, Tokens


@dataclass(frozen=True, eq=False)
class InputScore(TextScore):
    """The scores of one input."""

    n_tokens: int
    truncated_tokens: int
    tokens: Tokens | None
    """The tokens, if requested."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Reply of score."""

    inputs: tuple[InputScore, ...]
    logit_token_ids: tuple[int, ...]
    request_id: str
    timing: Timing

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> InputScore:
        return self.inputs[i]


@dataclass(frozen=True)
class AblationStudy(AblationReport):
    """Reply of ablate_features."""

    logit_token_ids: tuple[int, ...]
    truncated_tokens: tuple[int, ...]
    n_variants: int
    request_id: str
    timing: Timing
    labels: Labels = field(default_factory=dict)
    """If requested."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """By dictionary."""


@dataclass(frozen=True, eq=False)
class Attributions(AttributionReport):
    """Reply of attribute_features."""

    target_id: int
    foil_id: int | None
    position: int
    tokens: Tokens | None
    truncated_tokens: int
    request_id: str
    timing: Timing
    labels: Labels = field(default_factory=dict)
    """If requested."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """By dictionary."""


@dataclass(frozen=True)
class Contrast:
    """Reply of contrast_features."""

    features: tuple[FeatureContrast, ...]
    """Smallest p-value first."""
    n_tested: int
    n_found: int
    """Features with a q-value of at most 0.05."""
    suggestion: tuple[Edit, ...]
    """Edits towards set a, if requested."""
    trials: tuple[SuggestionTrial, ...]
    truncated_tokens: tuple[int, ...]
    request_id: str
    timing: Timing
    labels: Labels = field(default_factory=dict)
    """If requested."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """By dictionary."""
