"""Runs batches of one kind of work on the backbone and the dictionaries (model thread only).

Each kind has a class that holds the rows of a work; a slice of it is a piece. A runner takes the pieces of a batch and
returns one result a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.causal.predictions import Predictions
from sae_runtime.causal.report import TextScore, TokenScores
from sae_runtime.causal.score import RowScore, ScoredRow, score_rows
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import InputStatistics, SparseFeatures
from sae_runtime.dictionary.readings import Places, Readings
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site
from service.engine.errors import NonFiniteActivations
from service.engine.selection import RowRange, select
from service.engine.work import Aggregation, Csr, DictionaryRows, Selection

MAX_PADDED_ENTRIES = 1 << 22
"""Most entries of padded features in one call of decode."""

_RowFeatures = tuple[Csr, NDArray[np.float32] | None]
"""Features and reconstruction error of one row in one dictionary."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """Rows of tokens to extract features from."""

    rows: Sequence[tuple[int, ...]]
    dictionaries: Sequence[tuple[str, Dictionary, Site]]
    selection: Selection
    aggregation: Aggregation
    reconstruction_error: bool

    def __getitem__(self, rows: slice) -> Extraction:
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True, slots=True)
class Capture:
    """Rows of tokens whose activations are wanted."""

    rows: Sequence[tuple[int, ...]]
    sites: Sequence[Site]

    def __getitem__(self, rows: slice) -> Capture:
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """Rows of activations to encode."""

    dictionary: Dictionary
    x: NDArray[np.float32]
    selection: Selection

    def __getitem__(self, rows: slice) -> Encoding:
        return replace(self, x=self.x[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Result of an Encoding. The fields are those of EncodeResult."""

    features: Csr
    mean: NDArray[np.float32] | None
    std: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False)
class Decoding:
    """Rows of features to decode."""

    dictionary: Dictionary
    features: Csr
    mean: NDArray[np.float32] | None
    std: NDArray[np.float32] | None

    def __getitem__(self, rows: slice) -> Decoding:
        mean, std = (None if values is None else values[rows] for values in (self.mean, self.std))
        return replace(self, features=self.features[rows], mean=mean, std=std)


@dataclass(frozen=True, slots=True)
class Scoring:
    """Rows to score, and the dictionaries that their edits name."""

    rows: Sequence[ScoredRow]
    dictionaries: Mapping[str, Dictionary]

    def __getitem__(self, rows: slice) -> Scoring:
        return replace(self, rows=self.rows[rows])

    @property
    def edited_lengths(self) -> list[int]:
        """Tokens of each edited row. Dictionaries read these rows alone."""
        return [len(row.tokens) for row in self.rows if row.edits]


Computations = tuple[Callable[[], Any], ...]
"""Steps of a measurement. A step begins a study, or runs some of its variants."""


def run_batch(backbone: Backbone, kind: str, pieces: Sequence[Any], readings: Readings) -> list[Any]:
    """Runs pieces of one kind, other than "extract", and returns one result a piece.

    Adds every encoding that it makes to `readings`.

    Raises:
        NonFiniteActivations: the activations of a piece cannot be encoded. The error does not say which piece.
    """
    match kind:
        case "activations":
            return run_capture(backbone, pieces)
        case "encode":
            return run_encode(pieces, readings)
        case "decode":
            return [_decode(piece) for piece in pieces]
        case "score":
            return run_scores(backbone, pieces, readings)
        case _:
            return run_computations(pieces)


def run_extract(
    backbone: Backbone, pieces: Sequence[Extraction], readings: Readings
) -> list[list[list[DictionaryRows]]]:
    """Runs one forward pass over all rows, up to the last site, then reads each dictionary on the rows that ask for it.

    The rows are packed: those of all pieces follow one another in one tensor, without padding.

        pieces   |    piece 0    |   piece 1    |
        rows     |  0  |    1    | 0 |    1     |
        tokens   |a b c|d e f g h|i j|k l m n o |    spans: [[(0, 3), (3, 8)], [(8, 10), (10, 15)]]

    Returns results[piece][row], a list with one entry a dictionary.
    """
    rows = list(chain.from_iterable(piece.rows for piece in pieces))
    # The key is the dictionary, not its name: a name may be loaded anew while older requests still wait.
    site_of = {dictionary: site for piece in pieces for _, dictionary, site in piece.dictionaries}
    activations = backbone.forward(PackedTokens.from_rows(rows), capture=set(site_of.values())).activations

    ends = list(accumulate(map(len, rows)))
    spans: list[list[tuple[int, int]]] = []
    row = 0
    for piece in pieces:
        spans.append(
            [
                (end - len(tokens), end)
                for tokens, end in zip(piece.rows, ends[row : row + len(piece.rows)], strict=True)
            ]
        )
        row += len(piece.rows)

    features: list[dict[Dictionary, list[_RowFeatures]]] = [{} for _ in pieces]
    for dictionary, site in site_of.items():
        asking = [i for i, piece in enumerate(pieces) if any(d is dictionary for _, d, _ in piece.dictionaries)]
        features_of_asking = _read_dictionary(
            dictionary, activations[site], readings, [pieces[i] for i in asking], [spans[i] for i in asking]
        )
        for i, row_features in zip(asking, features_of_asking, strict=True):
            features[i][dictionary] = row_features
    return [
        [
            [DictionaryRows(name, *piece_features[dictionary][row]) for name, dictionary, _ in piece.dictionaries]
            for row in range(len(piece.rows))
        ]
        for piece, piece_features in zip(pieces, features, strict=True)
    ]


def run_capture(backbone: Backbone, pieces: Sequence[Capture]) -> list[list[list[NDArray[np.float32]]]]:
    """The activations of all rows from one forward pass; results[piece][row][site], float32 [n_tokens, width]."""
    rows = list(chain.from_iterable(piece.rows for piece in pieces))
    sites = {site for piece in pieces for site in piece.sites}
    captured = backbone.forward(PackedTokens.from_rows(rows), capture=sites).activations
    activations = {site: x.float().cpu().numpy() for site, x in captured.items()}
    ends = iter(accumulate(map(len, rows)))
    return [
        [
            [activations[site][end - len(tokens) : end] for site in piece.sites]
            for tokens, end in zip(piece.rows, islice(ends, len(piece.rows)), strict=True)
        ]
        for piece in pieces
    ]


def _read_dictionary(
    dictionary: Dictionary,
    x: Tensor,
    readings: Readings,
    pieces: Sequence[Extraction],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> list[list[_RowFeatures]]:
    """Reads one dictionary on the packed activations x [N, width]. `spans`: where the pieces' rows lie in x.

    Returns features[piece][row].
    """
    # Encodes only the tokens that the result needs: all tokens of a row, or the last one alone. The encoded tokens are
    # packed again. So a row has a span in x and one in the encoded tokens:
    #     x         a b c|d e f g h     encoded spans (2, 3), (3, 8)
    #     encoded   c|d e f g h         row ranges (0, 1), (1, 6): the first row has aggregation "last"
    encoded_spans: list[tuple[int, int]] = []  # in x, one a row
    ranges: list[RowRange] = []  # in the encoded tokens, one a row
    error_spans: list[tuple[int, int] | None] = []  # in the encoded tokens; None: no reconstruction error asked for
    n = 0
    for piece, row_spans in zip(pieces, spans, strict=True):
        last = piece.aggregation == "last"
        combine = "none" if piece.aggregation == "none" or piece.aggregation == "last" else piece.aggregation
        for start, end in row_spans:
            if last and not piece.reconstruction_error:
                start = end - 1
            encoded_spans.append((start, end))
            stop = n + end - start
            ranges.append(RowRange(stop - 1 if last else n, stop, piece.selection, combine))
            error_spans.append((n, stop) if piece.reconstruction_error else None)
            n = stop
    tokens = _tokens(encoded_spans)
    features = _encode(dictionary, x, tokens, readings)
    if n < len(x):
        x = x[torch.from_numpy(tokens).to(x.device)]
    rows = zip(
        select(features, ranges, dictionary.statistics),
        _reconstruction_errors(dictionary, x, features, error_spans),
        strict=True,
    )
    return [list(islice(rows, len(piece.rows))) for piece in pieces]


def _encode(dictionary: Dictionary, x: Tensor, tokens: Places, readings: Readings) -> SparseFeatures:
    """The features of x at `tokens`."""
    readings.want(dictionary, tokens)
    try:
        return readings.read(dictionary, x).rows(tokens)
    except ValueError as error:
        # Shapes were checked before the work was queued, so this error is about values out of range.
        raise NonFiniteActivations(str(error)) from error


def _reconstruction_errors(
    dictionary: Dictionary, x: Tensor, features: SparseFeatures, spans: Sequence[tuple[int, int] | None]
) -> list[NDArray[np.float32] | None]:
    """|x - x'|^2 / |x|^2 of every token, one array a span; None where the span is None.

    Where x = 0 the error is 0 if x' = 0 too, else infinite.
    """
    present = [span for span in spans if span is not None]
    if not present:
        return [None] * len(spans)
    n = sum(end - start for start, end in present)
    if n < len(x):
        index = torch.from_numpy(_tokens(present)).to(x.device)
        x, features = x[index], features[index]
    x = x.float()
    squared_norm = x.square().sum(dim=1)
    squared_error = (x - dictionary.decode(features).float()).square_().sum(dim=1)
    relative_error = torch.where(squared_error == 0, 0.0, squared_error / squared_norm).cpu().numpy()
    errors: list[NDArray[np.float32] | None] = []
    start = 0
    for span in spans:
        if span is None:
            errors.append(None)
        else:
            end = start + span[1] - span[0]
            errors.append(relative_error[start:end])
            start = end
    return errors


def _tokens(spans: Sequence[tuple[int, int]]) -> Places:
    """The places in the spans, one span after the other."""
    return np.concatenate([np.arange(start, end) for start, end in spans])


def run_encode(pieces: Sequence[Encoding], readings: Readings) -> list[Encoded]:
    """Encodes the rows of all pieces at once. The pieces are of one dictionary."""
    dictionary = pieces[0].dictionary
    x = torch.from_numpy(np.concatenate([piece.x for piece in pieces]))
    features = _encode(dictionary, x.to(dictionary.device), np.arange(len(x)), readings)
    ends = list(accumulate(len(piece.x) for piece in pieces))
    spans = list(zip([0, *ends], ends, strict=False))
    ranges = [RowRange(start, end, piece.selection) for (start, end), piece in zip(spans, pieces, strict=True)]
    rows = select(features, ranges, dictionary.statistics)
    statistics = features.input_statistics
    if statistics is None:
        return [Encoded(csr, None, None) for csr in rows]
    mean = statistics.mean.float().squeeze(1).cpu().numpy()
    std = statistics.std.float().squeeze(1).cpu().numpy()
    return [Encoded(csr, mean[start:end], std[start:end]) for csr, (start, end) in zip(rows, spans, strict=True)]


def _decode(piece: Decoding) -> NDArray[np.float32]:
    """The reconstructions of one piece: float32 [n, d_in]."""
    dictionary, csr = piece.dictionary, piece.features
    splits = csr.row_splits.astype(np.int64)
    counts = np.diff(splits)
    n = len(counts)
    mean = np.zeros(n, np.float32) if piece.mean is None else piece.mean
    std = np.ones(n, np.float32) if piece.std is None else piece.std
    x = np.empty((n, dictionary.d_in), np.float32)
    # Rows of similar size are decoded together, so that one long row does not pad thousands of short ones:
    #     row_splits 0 2 3, indices 4 9 7   ->   padded indices [[4, 9], [7, -1]], used [[1, 1], [1, 0]]
    order = np.argsort(-counts, kind="stable")
    start = 0
    while start < n:
        width = max(int(counts[order[start]]), 1)
        rows = order[start : start + max(MAX_PADDED_ENTRIES // width, 1)]
        place = np.arange(width)
        used = place < counts[rows, None]
        source = (splits[rows, None] + place)[used]
        indices = np.full((len(rows), width), -1, np.int64)
        values = np.zeros((len(rows), width), np.float32)
        indices[used], values[used] = csr.indices[source], csr.values[source]
        features = SparseFeatures(
            torch.from_numpy(indices).to(dictionary.device),
            torch.from_numpy(values).to(dictionary.device),
            dictionary.n_latents,
            InputStatistics(
                torch.from_numpy(mean[rows, None]).to(dictionary.device),
                torch.from_numpy(std[rows, None]).to(dictionary.device),
            )
            if dictionary.normalizes_input
            else None,
        )
        x[rows] = dictionary.decode(features).float().cpu().numpy()
        start += len(rows)
    return x


def run_scores(backbone: Backbone, pieces: Sequence[Scoring], readings: Readings) -> list[list[TextScore]]:
    """Scores the rows of all pieces at once. Returns scores[piece][row]."""
    dictionaries: dict[str, Dictionary] = {}
    for piece in pieces:
        dictionaries |= piece.dictionaries
    # A name that was loaded anew stands for two dictionaries. Then the pieces run one by one.
    if any(dictionaries[name] is not named for piece in pieces for name, named in piece.dictionaries.items()):
        return [run_scores(backbone, [piece], Readings())[0] for piece in pieces]
    try:
        scores = iter(score_rows(backbone, [row for piece in pieces for row in piece.rows], dictionaries, readings))
    except ValueError as error:
        # Shapes and names were checked before the work was queued, so this error is about values out of range.
        raise NonFiniteActivations(str(error)) from error
    return [[_text_score(next(scores)) for _ in piece.rows] for piece in pieces]


def run_computations(pieces: Sequence[Computations]) -> list[list[Any]]:
    """Runs the computations of all pieces one after the other."""
    try:
        return [[run() for run in piece] for piece in pieces]
    except ValueError as error:
        raise NonFiniteActivations(str(error)) from error  # as for scores


def _text_score(score: RowScore) -> TextScore:
    return TextScore(
        _token_scores(score.unedited),
        None if score.edited is None else _token_scores(score.edited),
        None if score.kl is None else score.kl.float().cpu().numpy(),
    )


def _token_scores(predictions: Predictions) -> TokenScores:
    """Drops the last entry: no token follows the last one."""
    loss, correct = predictions.loss[:-1].float().cpu().numpy(), predictions.correct[:-1].cpu().numpy()
    return TokenScores(
        loss=loss,
        correct=correct,
        target_logits=predictions.target_logit[:-1].float().cpu().numpy(),
        token_logits=predictions.token_logits.float().cpu().numpy(),
        mean_loss=float(loss.mean(dtype=float)),
        accuracy=float(correct.mean()),
    )
