"""What a catalogue knows of a latent. Plain data, no torch: the client and the command line read it as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["strongest", "quantile", "random", "silent"]
"""How a context was chosen: the strongest ones (at most one a document), some from each quantile of the activations,
random activations, and random tokens on which the latent is silent."""

Flag = Literal["dead", "dense", "positional", "single_token"]
FLAGS: tuple[Flag, ...] = ("dead", "dense", "positional", "single_token")
"""dead: never active on the catalogue's text. dense: active on more than DENSE_RATE of its tokens. positional: its
activation follows the token's position in the row. single_token: the current token alone explains most of it."""

DENSE_RATE = 0.1
POSITIONAL_CORRELATION = 0.3
"""Least size of the correlation of a positional latent's activation with log2(1 + position)."""
SINGLE_TOKEN_R2 = 0.8
"""Least share of the variance of a single-token latent's activation that the current token explains."""


@dataclass(frozen=True)
class Place:
    """Where a context comes from, so that it can be found again in the text."""

    source: str
    """Name of the file or data set."""
    record: int
    """Number of the document in the source, from 0; a line of a JSONL file."""
    position: int
    """Token of the document at the context's peak, from 0."""
    character: int
    """Character of the document at which that token begins, from 0."""
    text_kind: str
    """The kind of text (Document.kind)."""
    language: str = ""
    """The document's `lang`, if its record says it."""


@dataclass(frozen=True)
class Context:
    """A stretch of text around one token, with a latent's activation on every token of it."""

    kind: Kind
    quantile: int
    """Of kind "quantile": which quantile, 0 the lowest; else -1."""
    tokens: tuple[bytes, ...]
    activations: tuple[float, ...]
    """One a token; 0 where the latent is silent. Stored in 255 steps of the largest of them."""
    peak: int
    """Index of the token that the context was chosen for."""
    place: Place

    @property
    def activation(self) -> float:
        return self.activations[self.peak]


@dataclass(frozen=True)
class TokenFigure:
    """A token in one of a latent's lists."""

    token: int
    piece: bytes
    value: float
    """Of active tokens the mean activation. Of promoted and suppressed ones the change of the logit by an activation of
    1, up to a factor that all tokens of the latent share: the final layer norm's division is left out."""
    count: int = 0
    """Of active tokens how often the latent fired on it."""


@dataclass(frozen=True)
class Neighbor:
    """Another latent that lies near, or fires on the same tokens."""

    dictionary: str
    feature: int
    score: float
    """Cosine of the decoder rows, or for "together" the correlation (phi) of firing."""
    how: Literal["decoder", "together"]
    label: str = ""
    """Its best label, in replies of the service; catalogues do not hold it."""


@dataclass(frozen=True)
class Label:
    """What somebody or something says a latent means."""

    text: str
    source: str
    """"rule" (found by the catalogue), "person", or the name of a model that explains."""
    f1: float | None = None
    """Of predicting on which held-out contexts the latent fires; None: not tested."""
    precision: float | None = None
    recall: float | None = None
    n_positive: int = 0
    n_negative: int = 0
    """Held-out contexts that it was tested on."""
    predicate: Mapping[str, Any] = field(default_factory=dict)
    """Of a rule: what it says, as `predicates.from_json` reads it."""
    author: str = ""
    """Who wrote it; of a model also the prompt's name."""
    created: str = ""
    """ISO 8601, UTC."""


def best_first(labels: Iterable[Label]) -> tuple[Label, ...]:
    """A person's label, then models' and rules' by F1, then those that were not tested."""
    return tuple(sorted(labels, key=lambda label: (label.source != "person", 1.0 if label.f1 is None else -label.f1)))


@dataclass(frozen=True)
class FeatureSummary:
    """One line of a list of features."""

    feature: int
    label: str
    """The best label; empty if there is none: "no simple label"."""
    label_source: str
    label_f1: float | None
    firing_rate: float
    max_activation: float
    """The largest in the dictionary's statistics, which is the unit of edits; of a latent without one, of the first of
    the catalogue's text on which it fires."""
    flags: tuple[Flag, ...]
    top_tokens: tuple[bytes, ...]


Sort = Literal["feature", "firing_rate", "label_f1", "max_activation", "token_r2", "ablation_kl", "output_score"]
SORTS: tuple[Sort, ...] = get_args(Sort)


@dataclass(frozen=True)
class FeatureFilter:
    """Which features to list. All conditions must hold."""

    with_flags: tuple[Flag, ...] = ()
    without_flags: tuple[Flag, ...] = ()
    min_rate: float = 0.0
    max_rate: float = 1.0
    min_f1: float = 0.0
    """Of the best label of the catalogue; above 0 leaves out features without a tested label."""


@dataclass(frozen=True)
class SearchHit:
    """A feature that a search came upon."""

    summary: FeatureSummary
    score: float
    """The larger, the better. BM25 of the words, plus the shares of the firings that are on the symbols."""


@dataclass(frozen=True)
class FeaturePage:
    """All that the catalogue knows of one latent."""

    summary: FeatureSummary
    labels: tuple[Label, ...]
    """The best first: a person's, then models' and rules' by F1."""
    document_rate: float
    """Share of documents in which it fires."""
    n_firings: int
    mean_active: float
    """Mean activation where it fires."""
    token_r2: float | None
    """Share of the activation's variance, over all tokens, that the current token explains; None of a dead latent."""
    position_correlation: float
    """Of the activation with log2(1 + position in the row)."""
    histogram: tuple[int, ...]
    """Firings by activation, in equal bins from 0 to `max_activation`; the last also holds what is above."""
    rate_by_position: tuple[float, ...]
    """Firing rate at positions 0, 1, 2 to 3, 4 to 7, 8 to 15, ... of the row."""
    rate_by_kind: Mapping[str, float]
    """Firing rate by kind of text."""
    rate_by_language: Mapping[str, float]
    active_tokens: tuple[TokenFigure, ...]
    promoted: tuple[TokenFigure, ...]
    suppressed: tuple[TokenFigure, ...]
    neighbors: tuple[Neighbor, ...]
    ablation_kl: float | None
    """Mean KL divergence (nats) of the next token's distribution where it is active, when it is ablated to zero."""
    output_score: float | None
    """How much more likely the promoted tokens get when it is set to its maximum; in nats, mean over contexts."""
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class CatalogueInfo:
    """What a catalogue says of itself."""

    schema_version: int
    dictionary: str
    fingerprint: str
    """Of the dictionary that it was made for."""
    backbone: str
    backbone_fingerprint: str
    n_latents: int
    n_tokens: int
    """Tokens of text that were read."""
    n_documents: int
    sources: tuple[str, ...]
    seed: int
    created: str
    code_version: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    """Shares of live latents: labelled with F1 of 0.7 or more, single-token, positional, dense; median token_r2."""
