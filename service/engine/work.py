"""Inputs and results of the engine: plain data, numpy arrays, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sae_runtime.dictionary.ranking import Ranking
    from sae_runtime.edits import Edit

Aggregation = Literal["none", "max", "mean", "sum", "last"]
"""How the tokens of an input become rows: one row a token, or one row an input. A silent feature counts as 0."""

EndReason = Literal["length", "stop", "end_of_text"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of a token's features to return; applied before aggregation."""

    kind: Literal["all", "top_k", "features", "threshold"] = "all"
    k: int = 0
    """top_k: the first k in the order of `rank_by`, at least 1."""
    features: tuple[int, ...] = ()
    """features: these latents, each in [0, n_latents)."""
    threshold: float = 0.0
    """threshold: latents with a larger activation than this."""
    rank_by: Ranking = "activation"
    """The order of each row, and what `top_k` takes the first k of; all but "activation" need statistics."""


@dataclass(frozen=True, slots=True)
class WorkTiming:
    """Where the time of one work went."""

    queue_s: float
    """Seconds from arrival to the start of the computation; the longest of its pieces."""
    compute_s: float
    """Seconds of its batches, summed over its pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class Csr:
    """Sparse rows: row r holds entries row_splits[r] up to, not including, row_splits[r + 1], in their rank's order."""

    row_splits: NDArray[np.uint32]
    """[n + 1], starts with 0."""
    indices: NDArray[np.uint32]
    """[nnz] latent numbers."""
    values: NDArray[np.float32]
    """[nnz] activations in the dictionary's units."""

    def __len__(self) -> int:
        return len(self.row_splits) - 1

    def __getitem__(self, rows: slice) -> Csr:
        """The given rows: views of the entries. The slice must have a start and a stop within the rows, and no step."""
        splits = self.row_splits[rows.start : rows.stop + 1]
        first, last = splits[0], splits[-1]
        return Csr(splits - first, self.indices[first:last], self.values[first:last])


@dataclass(frozen=True, slots=True)
class ExtractWork:
    """Features of token rows."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids, one row an input; every row has at least one token."""
    dictionaries: tuple[str, ...]
    """Names, without repeats."""
    selection: Selection = Selection()
    aggregation: Aggregation = "none"
    reconstruction_error: bool = False
    """Also |x - x'|^2 / |x|^2 of every token, x' being the reconstruction from all features that fire."""


@dataclass(frozen=True, slots=True, eq=False)
class DictionaryRows:
    """The features of one input in one dictionary."""

    dictionary: str
    features: Csr
    """One row a token, or a single row with aggregation."""
    reconstruction_error: NDArray[np.float32] | None
    """[n_tokens] if asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class ExtractResult:
    inputs: list[list[DictionaryRows]]
    """inputs[row][dictionary], in the order of the work."""
    timing: WorkTiming


@dataclass(frozen=True, slots=True)
class ActivationsWork:
    """Activations of the backbone on token rows."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids, one row an input; every row has at least one token."""
    sites: tuple[str, ...]
    """Without repeats, at least one."""


@dataclass(frozen=True, slots=True, eq=False)
class ActivationsResult:
    inputs: list[list[NDArray[np.float32]]]
    """inputs[row][site], [n_tokens, width of the site], in the order of the work."""
    timing: WorkTiming


@dataclass(frozen=True, slots=True, eq=False)
class EncodeWork:
    """Features of given activations."""

    dictionary: str
    x: NDArray[np.float32]
    """[n, d_in], n at least 1."""
    selection: Selection = Selection()


@dataclass(frozen=True, slots=True, eq=False)
class EncodeResult:
    features: Csr
    """n rows."""
    mean: NDArray[np.float32] | None
    """[n] input statistics, None where the dictionary does not normalise."""
    std: NDArray[np.float32] | None
    """[n]."""
    timing: WorkTiming


@dataclass(frozen=True, slots=True, eq=False)
class DecodeWork:
    """Reconstructions from features."""

    dictionary: str
    features: Csr
    """n rows, n at least 1; the entries of a row in any order, without repeats."""
    mean: NDArray[np.float32] | None = None
    """[n] as in EncodeResult; without it the reconstruction stays in the dictionary's normalised space."""
    std: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecodeResult:
    x: NDArray[np.float32]
    """[n, d_in]."""
    timing: WorkTiming


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen from the logits."""

    temperature: float = 1.0
    """0 takes the likeliest token; else logits are divided by it."""
    top_k: int = 0
    """Only the k likeliest tokens can be chosen; 0 is no limit."""
    top_p: float = 0.0
    """Only the smallest set of tokens with at least this probability can be chosen; 0 or 1 is no limit."""
    seed: int = 0
    """In [0, 2^64): seed of the sequence's random numbers."""
    repetition_penalty: float = 1.0
    """Positive. Before all else, logits of tokens that the sequence has already (prompt included) are divided by it
    where they are positive and multiplied where they are negative (Keskar et al. 2019, section 4.1)."""


@dataclass(frozen=True, slots=True)
class WatchedFeatures:
    """Which features to return with each token."""

    dictionaries: tuple[str, ...]
    """Names, without repeats."""
    top_k: int
    """The first k of each dictionary in the order of `rank_by`, at least 1."""
    prompt: bool = False
    """Whether to return those of the prompt's tokens as well."""
    rank_by: Ranking = "activation"


@dataclass(frozen=True, slots=True)
class GenerateWork:
    """Continuations of a prompt with features edited."""

    prompt: tuple[int, ...]
    """At least one token id."""
    max_new_tokens: int
    sampling: SamplingOptions = SamplingOptions()
    stop: tuple[str, ...] = ()
    """A sequence ends before the first of these to be completed; none is empty."""
    edits: tuple[Edit, ...] = ()
    """References resolved, see Engine.resolve_references."""
    ignore_end_of_text: bool = False
    samples: int = 1
    """How many sequences. They run the prompt once. Sample i is the same however many there are."""
    compare: bool = False
    """Also run every sample without the edits, with the same random numbers."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to return at each place."""
    features: WatchedFeatures | None = None
    max_relative_change: float = math.inf
    """Edits that add more than this times the size of a token's activation (Euclidean norms) fail the request."""

    @property
    def n_sequences(self) -> int:
        return self.samples * (2 if self.compare else 1)


@dataclass(frozen=True, slots=True, eq=False)
class TokenFeatures:
    """The features that fire on consecutive tokens of a sequence, as the edited model has them."""

    first_position: int
    """Of the first of the tokens, from the prompt's start."""
    ids: tuple[int, ...]
    """The tokens."""
    features: dict[str, Csr]
    """By dictionary: one row a token."""


@dataclass(slots=True)
class GeneratedTokens:
    """New tokens of a sequence and the text that they complete."""

    text: str = ""
    """Whole characters only. Text that may yet become a stop string is held back."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each token, under the edited model, before penalty, temperature and cuts."""
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """If asked for: the likeliest tokens at each token's place with their log-probabilities, likeliest first."""
    features: list[TokenFeatures] = field(default_factory=list)
    """If asked for, of the tokens that have been run since: every token but the last one of the sequence, which is
    sampled and never run. Those of the prompt come with sample 0 alone."""
    sample: int = 0
    unedited: bool = False
    """True for what `compare` runs beside the edited sequences."""

    def extend(self, later: GeneratedTokens) -> None:
        """Takes in what follows in the same sequence."""
        self.text += later.text
        self.ids += later.ids
        self.logprobs += later.logprobs
        self.top += later.top
        self.features += later.features


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The last event of a sequence."""

    reason: EndReason
    prompt_tokens: int
    generated_tokens: int
    """Tokens that were sampled, an end-of-text token included."""
    stop: str
    """The stop string that was met, with reason "stop"; else empty."""
    timing: WorkTiming
    sample: int = 0
    unedited: bool = False


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What waits and runs in the engine."""

    queued_items: int
    queued_tokens: int
    active_generations: int
    """Sequences that hold a slot."""
    cache_tokens: int
    """Tokens of the key-value cache that they reserve, of max_cache_tokens."""
