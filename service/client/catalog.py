"""Facts about a server: its dictionaries, model, limits and edit presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sae_runtime.catalogue.records import FeaturePage, FeatureSummary
from sae_runtime.edits.edit import Edit


@dataclass(frozen=True)
class DictionaryInfo:
    """A served dictionary."""

    name: str
    site: str
    architecture: str
    d_in: int
    n_latents: int
    k: int | None
    """Most features kept per token; None where the architecture has no such number."""
    normalizes_input: bool
    """Whether decode_features needs the input statistics of encode_activations."""
    has_statistics: bool
    """Whether unit="max" and ablation to the mean are possible."""
    context_length: int | None
    """Tokens in a training context, if known."""
    normalization: str = "none"
    """Of each input row: "none", "centred", "layer_norm" or "constant_norm"."""
    has_skip_connection: bool = False
    """Whether decoding also needs the raw input; decode_features refuses such a dictionary."""
    transcoder: bool = False
    """Whether it decodes to another activation than it reads; its features cannot be edited."""
    fingerprint: str = ""
    """Tells its features from those of another version of it."""
    has_catalogue: bool = False
    """Whether list_features, get_feature and neighbor_features can be asked of it."""


@dataclass(frozen=True)
class Provenance:
    """How a dictionary was made."""

    code_version: str
    seed: int
    tokens: int
    data: str
    created: datetime | None
    config: Mapping[str, Any]


@dataclass(frozen=True)
class CatalogueSummary:
    """What the catalogue of a dictionary says of itself."""

    n_tokens: int
    """Tokens of text that were read."""
    n_documents: int
    sources: tuple[str, ...]
    seed: int
    created: str
    """ISO 8601."""
    code_version: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class DictionaryDetails:
    """A dictionary in full."""

    dictionary: DictionaryInfo
    provenance: Provenance | None
    """None if the dictionary's files do not say."""
    evaluation: Mapping[str, float]
    """Figures measured on held-out text when it was published."""
    catalogue: CatalogueSummary | None = None
    hidden_labels: int = 0
    """Labels that were written for another version of the dictionary: kept, but not shown."""


@dataclass(frozen=True)
class FeatureList:
    """A page of a list of features."""

    features: tuple[FeatureSummary, ...]
    next_page_token: str
    """Empty on the last page."""
    total: int
    """Features on all pages."""
    fingerprint: str
    """Of the dictionary."""
    request_id: str


@dataclass(frozen=True)
class FeatureDetails:
    """All that is known of a feature."""

    page: FeaturePage
    fingerprint: str
    """Of the dictionary."""
    request_id: str


@dataclass(frozen=True)
class FeatureHit:
    """A feature that a search came upon."""

    dictionary: str
    fingerprint: str
    summary: FeatureSummary
    score: float
    """The larger, the better."""
    activation: float
    """Of texts: the mean over them of its largest activation."""


@dataclass(frozen=True)
class FeatureSearch:
    """Reply of search_features."""

    hits: tuple[FeatureHit, ...]
    """The best first."""
    without_catalogue: tuple[str, ...]
    """Dictionaries of which only labels that people and models wrote were searched."""
    request_id: str


@dataclass(frozen=True)
class BackboneInfo:
    """The served language model."""

    name: str
    fingerprint: str
    n_layers: int
    d_model: int
    vocab_size: int
    context_length: int
    dtype: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """Limits of requests; server_service.proto describes the fields of its Limits message."""

    max_inputs: int
    max_tokens_per_input: int
    max_tokens_per_request: int
    max_text_bytes: int
    max_activation_rows: int
    max_dictionaries: int
    max_selected_features: int
    max_new_tokens: int
    max_edits: int
    max_edit_strength: float
    max_stop_strings: int
    max_stop_bytes: int
    max_concurrent_generations: int
    max_queued_tokens: int
    max_relative_change: float
    max_cache_tokens: int
    max_samples: int
    max_top_logprobs: int
    max_ablated_features: int
    max_variant_tokens: int
    max_logit_tokens: int
    max_attributions: int
    max_contrast_texts: int
    max_contrast_tokens: int


@dataclass(frozen=True)
class EditPreset:
    """A named set of edits on the server."""

    name: str
    description: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class ServerInfo:
    """The server: versions, model, dictionaries, limits."""

    version: str
    library_versions: Mapping[str, str]
    backbone: BackboneInfo
    dictionaries: tuple[str, ...]
    limits: Limits
    device: str
    cache_bytes: int
    """Memory that the key-value cache of a replica takes."""
    edit_presets: tuple[EditPreset, ...]
    """By name, sorted."""
    notes: tuple[str, ...] = ()
    """What was noted of the files while they were loaded, such as weights that are not used."""
