"""Results of extractions and generations, as numpy arrays. Sizes: n rows, nnz entries, t tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
UintArray = NDArray[np.uint32]
Labels = Mapping[str, Mapping[int, str]]
"""By dictionary: the best label of each feature in a reply that has one."""
FinishReason = Literal["length", "stop", "end_of_text", "unknown"]
"""unknown: a reason that only a newer server knows."""


@dataclass(frozen=True)
class Timing:
    """Where a call spent its time in the server, in milliseconds."""

    queue_ms: float
    """From arrival to the start of the computation."""
    compute_ms: float
    """Of the batches that contained the request, on the device."""
    total_ms: float
    """From arrival in the replica to the reply."""


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Sparse features in CSR form; entries of a row are sorted by value, largest first."""

    row_splits: UintArray
    """[n + 1] row r holds the entries row_splits[r] : row_splits[r + 1]."""
    indices: UintArray
    """[nnz] feature numbers."""
    values: FloatArray
    """[nnz] activations."""

    def __len__(self) -> int:
        return len(self.row_splits) - 1

    def row(self, r: int) -> tuple[UintArray, FloatArray]:
        """Feature numbers and activations of one row."""
        if not 0 <= r < len(self):
            raise IndexError(f"row {r} of {len(self)}")
        entries = slice(int(self.row_splits[r]), int(self.row_splits[r + 1]))
        return self.indices[entries], self.values[entries]

    def __iter__(self) -> Iterator[tuple[UintArray, FloatArray]]:
        return (self.row(r) for r in range(len(self)))

    def to_dense(self, n_latents: int) -> FloatArray:
        """[n, n_latents] with zeros for features that are not listed."""
        dense = np.zeros((len(self), n_latents), np.float32)
        dense[np.repeat(np.arange(len(self)), np.diff(self.row_splits)), self.indices] = self.values
        return dense


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one input."""

    ids: UintArray
    """[t]"""
    pieces: tuple[bytes, ...]
    """[t] bytes of each token, which alone need not be valid UTF-8."""
    byte_starts: UintArray
    """[t] offset in the UTF-8 text."""
    byte_ends: UintArray
    """[t] offset after the token in the UTF-8 text."""
    char_starts: UintArray
    """[t] offset, in code points, of the character that holds the token's first byte."""
    char_ends: UintArray
    """[t] offset, in code points, after the character that holds the token's last byte."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class DictionaryFeatures:
    """The features of one input in one dictionary."""

    dictionary: str
    features: SparseRows
    """One row per token, or a single row with aggregation."""
    reconstruction_error: FloatArray | None
    """[t] |x - x'|^2 / |x|^2 of each token, if requested."""
    fingerprint: str = ""
    """Of the dictionary."""


@dataclass(frozen=True, eq=False)
class InputFeatures:
    """The features of one input."""

    dictionaries: Mapping[str, DictionaryFeatures]
    """By name, in the order of the request."""
    n_tokens: int
    """Tokens that were run."""
    truncated_tokens: int
    """Tokens dropped because the input was too long (overflow="truncate")."""
    tokens: Tokens | None
    """The tokens, if requested."""

    def __getitem__(self, dictionary: str) -> SparseRows:
        """The features in one dictionary."""
        return self.dictionaries[dictionary].features


@dataclass(frozen=True, eq=False)
class Extraction:
    """Reply of extract_features."""

    inputs: tuple[InputFeatures, ...]
    """One entry per input, in the order of the request."""
    request_id: str
    timing: Timing
    labels: Labels = field(default_factory=dict)
    """If requested."""

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> InputFeatures:
        return self.inputs[i]


@dataclass(frozen=True, eq=False)
class InputActivations:
    """The activations of one input."""

    sites: dict[str, FloatArray]
    """[n_tokens, width of the site] by site."""
    n_tokens: int
    """Tokens that were run."""
    truncated_tokens: int
    """Tokens dropped because the input was too long (overflow="truncate")."""
    tokens: Tokens | None
    """The tokens, if requested."""

    def __getitem__(self, site: str) -> FloatArray:
        return self.sites[site]


@dataclass(frozen=True, eq=False)
class Activations:
    """Reply of get_activations."""

    inputs: tuple[InputActivations, ...]
    """One entry per input, in the order of the request."""
    request_id: str
    timing: Timing

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> InputActivations:
        return self.inputs[i]


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Mean and standard deviation of each input row, with which decode_features returns to the input's units."""

    mean: FloatArray
    """[n]"""
    std: FloatArray
    """[n]"""


@dataclass(frozen=True, eq=False)
class Encoding:
    """Reply of encode_activations."""

    features: SparseRows
    """One row per activation."""
    input_statistics: InputStatistics | None
    """None where the dictionary does not normalise its input."""
    request_id: str
    timing: Timing
    fingerprint: str = ""
    """Of the dictionary."""


@dataclass(frozen=True, eq=False)
class Decoding:
    """Reply of decode_features."""

    activations: FloatArray
    """[n, d_in]"""
    request_id: str
    timing: Timing


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The k likeliest tokens at one position, likeliest first."""

    token_ids: UintArray
    """[k]"""
    logprobs: FloatArray
    """[k] under the edited model, before penalty, temperature and cuts."""
    pieces: tuple[bytes, ...]
    """[k] bytes of each; empty if the server has no tokenizer."""


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """The features that fire on t consecutive tokens of a generated sequence, in the edited model."""

    first_position: int
    """Position of the first of the tokens, counted from 0 at the prompt's first token."""
    token_ids: UintArray
    """[t]"""
    pieces: tuple[bytes, ...]
    """[t] bytes of each; empty if the server has no tokenizer."""
    dictionaries: Mapping[str, SparseRows]
    """By name, in the order of the request: one row per token."""


@dataclass(frozen=True, eq=False)
class GeneratedChunk:
    """New tokens of a generated sequence and the text that they complete."""

    text: str
    """Whole characters only; empty while a character is incomplete or a stop string may follow."""
    token_ids: UintArray
    """Tokens since the last chunk."""
    logprobs: FloatArray
    """Log-probability of each under the edited model, before penalty, temperature and cuts."""
    top: tuple[TopTokens, ...] = ()
    """If requested: one entry per token."""
    features: tuple[TokenFeatures, ...] = ()
    """If requested, of tokens run since the last chunk: a token's features come one chunk after the token."""
    sample: int = 0
    """Number of the sample."""
    unedited: bool = False
    """Whether it belongs to a sequence without edits, as `compare` requests."""
    labels: Labels = field(default_factory=dict)
    """If requested: of those features that no earlier chunk of the call had."""


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """A generated sequence that has ended."""

    text: str
    token_ids: UintArray
    """[generated_tokens]"""
    logprobs: FloatArray
    """[generated_tokens]"""
    finish_reason: FinishReason
    stop: str
    """The stop string that ended it; empty for other reasons."""
    prompt_tokens: int
    generated_tokens: int
    truncated_tokens: int
    """Tokens dropped from the prompt's start (overflow="truncate")."""
    seed: int
    """The seed of the call, for all samples."""
    request_id: str
    timing: Timing
    top: tuple[TopTokens, ...] = ()
    """[generated_tokens] if requested."""
    features: tuple[TokenFeatures, ...] = ()
    """If requested: of consecutive tokens, together all but the last. Only sample 0 has the prompt's."""
    sample: int = 0
    unedited: bool = False
