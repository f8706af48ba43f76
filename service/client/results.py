"""What extractions and generations return, in numpy arrays. Sizes: n rows, nnz entries, t tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
UintArray = NDArray[np.uint32]
FinishReason = Literal["length", "stop", "end_of_text", "unknown"]
"""unknown: a reason of a server newer than this client."""


@dataclass(frozen=True)
class Timing:
    """Where a call spent its time in the server, in milliseconds."""

    queue_ms: float
    """From arrival to the start of the computation."""
    compute_ms: float
    """Of the batches on the device that carried the request."""
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
    """[t] bytes of each token; one alone need not be valid UTF-8."""
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
    """One row a token, or a single row with aggregation."""
    reconstruction_error: FloatArray | None
    """[t] |x - x'|^2 / |x|^2 of each token, if asked for."""


@dataclass(frozen=True, eq=False)
class InputFeatures:
    """What one input gave."""

    dictionaries: Mapping[str, DictionaryFeatures]
    """By name, in the order asked for."""
    n_tokens: int
    """Tokens that were run."""
    truncated_tokens: int
    """Tokens that were dropped because the input was too long (overflow="truncate")."""
    tokens: Tokens | None
    """The tokens, if asked for."""

    def __getitem__(self, dictionary: str) -> SparseRows:
        """The features in one dictionary."""
        return self.dictionaries[dictionary].features


@dataclass(frozen=True, eq=False)
class Extraction:
    """Reply of extract_features."""

    inputs: tuple[InputFeatures, ...]
    """One entry an input, in the order of the request."""
    request_id: str
    timing: Timing

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> InputFeatures:
        return self.inputs[i]


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Mean and standard deviation that normalised each input row: what decode_features needs for the input's units."""

    mean: FloatArray
    """[n]"""
    std: FloatArray
    """[n]"""


@dataclass(frozen=True, eq=False)
class Encoding:
    """Reply of encode_activations."""

    features: SparseRows
    """One row an activation."""
    input_statistics: InputStatistics | None
    """None where the dictionary does not normalise its input."""
    request_id: str
    timing: Timing


@dataclass(frozen=True, eq=False)
class Decoding:
    """Reply of decode_features."""

    activations: FloatArray
    """[n, d_in]"""
    request_id: str
    timing: Timing


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The likeliest tokens at one place, likeliest first; k of them."""

    token_ids: UintArray
    """[k]"""
    logprobs: FloatArray
    """[k] under the edited model, before penalty, temperature and cuts."""
    pieces: tuple[bytes, ...]
    """[k] bytes of each; empty if the server has no tokenizer."""


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """The features that fire on t consecutive tokens of a generated sequence, as the edited model has them."""

    first_position: int
    """Of the first of the tokens, 0-based from the prompt's first token."""
    token_ids: UintArray
    """[t]"""
    pieces: tuple[bytes, ...]
    """[t] bytes of each; empty if the server has no tokenizer."""
    dictionaries: Mapping[str, SparseRows]
    """By name, in the order asked for: one row a token."""


@dataclass(frozen=True, eq=False)
class GeneratedChunk:
    """New tokens of a generated sequence and the text that they complete."""

    text: str
    """Whole characters only; may be empty while one is incomplete or a stop string may be under way."""
    token_ids: UintArray
    """Tokens since the last chunk."""
    logprobs: FloatArray
    """Log-probability of each under the edited model, before penalty, temperature and cuts."""
    top: tuple[TopTokens, ...] = ()
    """If asked for: one entry a token."""
    features: tuple[TokenFeatures, ...] = ()
    """If asked for, of tokens that were run since the last chunk: each comes one chunk after it was sampled."""
    sample: int = 0
    """Which of the samples it belongs to."""
    unedited: bool = False
    """Whether it belongs to the sequence without edits that `compare` asked for."""


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """All of a generated sequence that came to its end."""

    text: str
    token_ids: UintArray
    """[generated_tokens]"""
    logprobs: FloatArray
    """[generated_tokens]"""
    finish_reason: FinishReason
    stop: str
    """The stop string that was met; empty with other reasons."""
    prompt_tokens: int
    generated_tokens: int
    truncated_tokens: int
    """Tokens dropped from the prompt's start (overflow="truncate")."""
    seed: int
    """The seed that was used, for all samples."""
    request_id: str
    timing: Timing
    top: tuple[TopTokens, ...] = ()
    """[generated_tokens] if asked for."""
    features: tuple[TokenFeatures, ...] = ()
    """If asked for: of consecutive tokens, together all but the last. Those of the prompt are with sample 0 alone."""
    sample: int = 0
    unedited: bool = False
