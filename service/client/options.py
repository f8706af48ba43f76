"""Arguments of calls: inputs, and the options of each call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from sae_runtime.catalogue.records import Flag, Sort
from sae_runtime.causal.report import Ablation, RankBy
from sae_runtime.dictionary.ranking import Ranking

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
Input = str | TokenIds
Inputs = Input | Sequence[Input]
Token = int | str
"""A token id, or a text that is exactly one token, such as " Paris"."""
AggregationName = Literal["none", "max", "mean", "sum", "last"]
OverflowName = Literal["error", "truncate"]
DtypeName = Literal["float32", "float16", "bfloat16"]


class SelectionOptions(TypedDict, total=False):
    """Which features of each token or row to return: at most one of the first three, or all features that fire."""

    top_k: int | None
    """The first k in the order of rank_by."""
    features: Iterable[int] | None
    """These features, on tokens where they fire."""
    threshold: float | None
    """Features with a larger activation."""
    rank_by: Ranking
    """The order of features, of which top_k takes the first: "activation" (the default), "surprise" or "z_score"."""
    request_id: str | None
    """Returned in the reply and in errors; the server makes one up if it is not given."""


class ExtractOptions(SelectionOptions, total=False):
    """Options of extract_features."""

    aggregation: AggregationName
    """How the tokens of an input are combined; "none" (the default) gives one row a token."""
    tokens: bool
    """Also return the tokens with their offsets."""
    reconstruction_error: bool
    """Also return each token's reconstruction error."""
    labels: bool
    """Also return the labels of the features."""
    overflow: OverflowName
    """What happens to inputs that are too long: "error" (the default) or "truncate"."""


class ActivationOptions(TypedDict, total=False):
    """Options of get_activations."""

    dtype: DtypeName
    """What the activations are sent as; "float32" if not given. The results are float32 in any case."""
    tokens: bool
    """Also return the tokens with their offsets."""
    overflow: OverflowName
    """What happens to inputs that are too long: "error" (the default) or "truncate"."""
    request_id: str | None
    """Returned in the reply and in errors; the server makes one up if it is not given."""


class GenerateOptions(TypedDict, total=False):
    """Options of generate."""

    max_new_tokens: int | None
    """None: the server's default."""
    temperature: float
    """0 (the default) takes the likeliest token."""
    top_k: int | None
    """Only the k likeliest tokens can be chosen."""
    top_p: float | None
    """Only the smallest set of tokens with at least this probability can be chosen."""
    seed: int | None
    """None: the server draws one; the result has it."""
    stop: str | Sequence[str]
    """Generation ends before the first of these strings."""
    ignore_end_of_text: bool
    """Go on after an end-of-text token."""
    repetition_penalty: float | None
    """Makes tokens that the sequence already contains less likely; 1 (the default) does nothing."""
    samples: int | None
    """How many sequences to generate (1 if not given); see Generation.all_results."""
    compare: bool
    """Also generate every sample without edits and presets, from the same seed."""
    top_logprobs: int | None
    """How many of the likeliest tokens to return at each position."""
    features: str | Sequence[str] | None
    """Names of dictionaries whose features to return with the tokens."""
    features_top_k: int | None
    """How many features of each token to return; the server's default if not given."""
    features_rank_by: Ranking
    """Their order: "activation" (the default), "surprise" or "z_score"."""
    prompt_features: bool
    """Also return features of the prompt's tokens."""
    labels: bool
    """Also return the labels of these features."""
    presets: Sequence[str]
    """Names of edit presets of the server, whose edits come before the others."""
    overflow: OverflowName
    """What happens to a prompt that is too long: "error" (the default) or "truncate", which drops its start."""
    request_id: str | None
    """Returned in the result and in errors; the server makes one up if it is not given."""


class ListOptions(TypedDict, total=False):
    """Options of list_features."""

    sort: Sort
    """"feature" (its number, the default), "firing_rate", "label_f1", "max_activation", "token_r2", "ablation_kl" or
    "output_score". Features without the figure come last."""
    descending: bool
    """The largest first."""
    with_flags: Sequence[Flag]
    """Only features with all of these flags."""
    without_flags: Sequence[Flag]
    """Only features with none of these flags."""
    min_rate: float
    """Only features that fire on at least this share of tokens."""
    max_rate: float
    min_label_f1: float
    """Only features whose best label in the catalogue scores at least so much."""
    page_size: int | None
    """None: the server's default."""
    page_token: str
    """next_page_token of the page before."""
    request_id: str | None


class SearchOptions(TypedDict, total=False):
    """Options of search_features."""

    fires_on: Inputs
    """Instead of words: texts on all of which the features fire."""
    silent_on: Inputs
    """And texts on none of which they do."""
    limit: int | None
    """Features to return; None: the server's default."""
    overflow: OverflowName
    request_id: str | None


class ScoreOptions(TypedDict, total=False):
    """Options of score."""

    presets: Sequence[str]
    """Names of edit presets of the server, whose edits come before the others."""
    logit_tokens: Sequence[Token]
    """Tokens whose logits are returned after every token."""
    tokens: bool
    """Also return the tokens with their offsets."""
    overflow: OverflowName
    """What happens to inputs that are too long: "error" (the default) or "truncate"."""
    request_id: str | None
    """Returned in the reply and in errors; the server makes one up if it is not given."""


class AblateOptions(TypedDict, total=False):
    """Options of ablate_features."""

    ablations: Sequence[Ablation]
    """What features are set to: "zero" (the default), their recorded "mean", or both."""
    logit_tokens: Sequence[Token]
    """Tokens whose change of logit is returned."""
    single_tokens: int
    """Also ablate each feature on single tokens, this many of the strongest of each text (see by_distance)."""
    rank_by: RankBy
    """The figure that features are sorted by; "kl" if not given."""
    strongest_by: Ranking
    """How the strongest features are chosen: "activation" (the default), "surprise" or "z_score"."""
    labels: bool
    """Also return the labels of the features."""
    overflow: OverflowName
    request_id: str | None


class AttributeOptions(TypedDict, total=False):
    """Options of attribute_features."""

    target: Token | None
    """The token whose logit is explained; None: the likeliest."""
    foil: Token | None
    """A token whose logit is subtracted."""
    position: int | None
    """Explain the logits after this token; None: the last."""
    count: int | None
    """How many pairs of a feature and a token to return; None: the server's default."""
    rank_by: Ranking
    """What their size is weighed by: "activation" (the default), "surprise" or "z_score"."""
    labels: bool
    """Also return the labels of the features."""
    tokens: bool
    overflow: OverflowName
    request_id: str | None


class ContrastOptions(TypedDict, total=False):
    """Options of contrast_features."""

    aggregation: Literal["max", "mean"]
    """How the tokens of a text are combined; "max" if not given."""
    count: int | None
    """Return at most this many features; None: the server's default."""
    false_discovery_rate: float
    """Return only features with at most this q-value; 0: all."""
    suggest: int
    """Suggest edits of this many features towards set a."""
    validate: bool
    """Score the suggestion at several strengths on both sets."""
    labels: bool
    """Also return the labels of the features."""
    overflow: OverflowName
    request_id: str | None
