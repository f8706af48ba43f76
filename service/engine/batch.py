"""Runs batches of one kind of work on the backbone and the dictionaries (model thread only).

Each kind has a class that holds what its rows need; slices of it are pieces of a work. A runner takes the pieces of a
batch and returns a result for each.
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
"""Entries of the padded features that decoding makes at once."""

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
    """Result of an Encoding: as EncodeResult."""

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


Computations = tuple[Callable[[], Any], ...]
"""Steps of a measurement: to begin a study, or to run variants of one."""


def run_batch(backbone: Backbone, kind: str, pieces: Sequence[Any], readings: Readings) -> list[Any]:
    """A result for each of the pieces, which are of one kind. What is encoded on the way is in `readings`.

    Raises:
        NonFiniteActivations: some piece's activations cannot be encoded. Which one is not told.
    """
    match kind:
        case "extract":
            return run_extract(backbone, pieces, readings)
        case "encode":
            return run_encode(pieces, readings)
        case "decode":
            return [_decode(piece) for piece in pieces]
        case "score":
            return run_scores(backbone, pieces)
        case _:
            return run_computations(pieces)


def run_extract(
    backbone: Backbone, parts: Sequence[Extraction], readings: Readings
) -> list[list[list[DictionaryRows]]]:
    """One forward pass over all rows, up to the last site; then each dictionary on the tokens that asked for it.

    Returns, for each part, one list a row, of one entry a dictionary.
    """
    rows = list(chain.from_iterable(part.rows for part in parts))
    # Dictionaries are told apart by identity: a name may be loaded anew while older requests still wait.
    site_of = {dictionary: site for part in parts for _, dictionary, site in part.dictionaries}
    activations = backbone.forward(PackedTokens.from_rows(rows), capture=set(site_of.values())).activations

    ends = list(accumulate(map(len, rows)))
    spans: list[list[tuple[int, int]]] = []  # of each part's rows in the packed batch
    row = 0
    for part in parts:
        spans.append(
            [(end - len(tokens), end) for tokens, end in zip(part.rows, ends[row : row + len(part.rows)], strict=True)]
        )
        row += len(part.rows)

    found: list[dict[Dictionary, list[_RowFeatures]]] = [{} for _ in parts]
    for dictionary, site in site_of.items():
        asking = [i for i, part in enumerate(parts) if any(asked is dictionary for _, asked, _ in part.dictionaries)]
        outcome = _read_dictionary(
            dictionary, activations[site], readings, [parts[i] for i in asking], [spans[i] for i in asking]
        )
        for i, per_row in zip(asking, outcome, strict=True):
            found[i][dictionary] = per_row
    return [
        [
            [DictionaryRows(name, *own[dictionary][row]) for name, dictionary, _ in part.dictionaries]
            for row in range(len(part.rows))
        ]
        for part, own in zip(parts, found, strict=True)
    ]


def _read_dictionary(
    dictionary: Dictionary,
    x: Tensor,
    readings: Readings,
    parts: Sequence[Extraction],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> list[list[_RowFeatures]]:
    """One dictionary on the packed activations x [N, width]: for each part, one entry a row."""
    # Only the tokens that count are encoded: all of a row's, or its last.
    wanted: list[tuple[int, int]] = []  # token ranges of x, one a row
    ranges: list[RowRange] = []  # the same in the encoded tokens, as the selection sees them
    errors: list[tuple[int, int] | None] = []  # the same, where the reconstruction error was asked for
    n = 0
    for part, part_spans in zip(parts, spans, strict=True):
        last = part.aggregation == "last"
        combine = "none" if part.aggregation == "none" or part.aggregation == "last" else part.aggregation
        for start, end in part_spans:
            if last and not part.reconstruction_error:
                start = end - 1
            wanted.append((start, end))
            stop = n + end - start
            ranges.append(RowRange(stop - 1 if last else n, stop, part.selection, combine))
            errors.append((n, stop) if part.reconstruction_error else None)
            n = stop
    tokens = _tokens(wanted)
    features = _encode(dictionary, x, tokens, readings)
    if n < len(x):
        x = x[torch.from_numpy(tokens).to(x.device)]
    rows = zip(select(features, ranges), _reconstruction_errors(dictionary, x, features, errors), strict=True)
    return [list(islice(rows, len(part.rows))) for part in parts]


def _encode(dictionary: Dictionary, x: Tensor, tokens: Places, readings: Readings) -> SparseFeatures:
    """The features of some tokens of x."""
    readings.want(dictionary, tokens)
    try:
        return readings.read(dictionary, x).rows(tokens)
    except ValueError as error:
        # Shapes were checked before the work was queued; what is left is values out of range.
        raise NonFiniteActivations(str(error)) from error


def _reconstruction_errors(
    dictionary: Dictionary, x: Tensor, features: SparseFeatures, spans: Sequence[tuple[int, int] | None]
) -> list[NDArray[np.float32] | None]:
    """|x - x'|^2 / |x|^2 of every token in the spans. A token whose activation is 0 has error 0 or infinity."""
    asked = [span for span in spans if span is not None]
    if not asked:
        return [None] * len(spans)
    n = sum(end - start for start, end in asked)
    if n < len(x):
        index = torch.from_numpy(_tokens(asked)).to(x.device)
        x, features = x[index], features[index]
    x = x.float()
    size = x.square().sum(dim=1)
    missed = (x - dictionary.decode(features).float()).square_().sum(dim=1)
    error = torch.where(missed == 0, 0.0, missed / size).cpu().numpy()
    found: list[NDArray[np.float32] | None] = []
    start = 0
    for span in spans:
        if span is None:
            found.append(None)
        else:
            end = start + span[1] - span[0]
            found.append(error[start:end])
            start = end
    return found


def _tokens(spans: Sequence[tuple[int, int]]) -> Places:
    return np.concatenate([np.arange(start, end) for start, end in spans])


def run_encode(parts: Sequence[Encoding], readings: Readings) -> list[Encoded]:
    """Encodes the rows of all parts, which are of one dictionary, at once."""
    dictionary = parts[0].dictionary
    x = torch.from_numpy(np.concatenate([part.x for part in parts]))
    features = _encode(dictionary, x.to(dictionary.device), np.arange(len(x)), readings)
    ends = list(accumulate(len(part.x) for part in parts))
    spans = list(zip([0, *ends], ends, strict=False))
    rows = select(
        features, [RowRange(start, end, part.selection) for (start, end), part in zip(spans, parts, strict=True)]
    )
    statistics = features.input_statistics
    if statistics is None:
        return [Encoded(own, None, None) for own in rows]
    mean = statistics.mean.float().squeeze(1).cpu().numpy()
    std = statistics.std.float().squeeze(1).cpu().numpy()
    return [Encoded(own, mean[start:end], std[start:end]) for own, (start, end) in zip(rows, spans, strict=True)]


def _decode(part: Decoding) -> NDArray[np.float32]:
    """The reconstructions of one piece: float32 [n, d_in]."""
    dictionary, csr = part.dictionary, part.features
    splits = csr.row_splits.astype(np.int64)
    counts = np.diff(splits)
    n = len(counts)
    mean = np.zeros(n, np.float32) if part.mean is None else part.mean
    std = np.ones(n, np.float32) if part.std is None else part.std
    x = np.empty((n, dictionary.d_in), np.float32)
    # Rows of similar size together: one long row must not pad thousands of short ones.
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


def run_scores(backbone: Backbone, pieces: Sequence[Scoring]) -> list[list[TextScore]]:
    """Scores the rows of all pieces at once: for each piece, an entry a row."""
    dictionaries: dict[str, Dictionary] = {}
    for piece in pieces:
        dictionaries |= piece.dictionaries
    # The same name stands for different dictionaries where one was loaded anew meanwhile.
    if any(dictionaries[name] is not named for piece in pieces for name, named in piece.dictionaries.items()):
        return [run_scores(backbone, [piece])[0] for piece in pieces]
    try:
        scores = iter(score_rows(backbone, [row for piece in pieces for row in piece.rows], dictionaries))
    except ValueError as error:
        # Shapes and names were checked before the work was queued; what is left is values out of range.
        raise NonFiniteActivations(str(error)) from error
    return [[_text_score(next(scores)) for _ in piece.rows] for piece in pieces]


def run_computations(pieces: Sequence[Computations]) -> list[list[Any]]:
    """Runs the computations of all pieces one after the other."""
    try:
        return [[run() for run in piece] for piece in pieces]
    except ValueError as error:
        raise NonFiniteActivations(str(error)) from error  # as of scores


def _text_score(score: RowScore) -> TextScore:
    return TextScore(
        _token_scores(score.unedited),
        None if score.edited is None else _token_scores(score.edited),
        None if score.kl is None else score.kl.float().cpu().numpy(),
    )


def _token_scores(predictions: Predictions) -> TokenScores:
    """Without the entry after the last token, where no token follows."""
    loss, correct = predictions.loss[:-1].float().cpu().numpy(), predictions.correct[:-1].cpu().numpy()
    return TokenScores(
        loss=loss,
        correct=correct,
        target_logits=predictions.target_logit[:-1].float().cpu().numpy(),
        token_logits=predictions.token_logits.float().cpu().numpy(),
        mean_loss=float(loss.mean(dtype=float)),
        accuracy=float(correct.mean()),
    )
