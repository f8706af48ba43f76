"""What the engine reports to observers, such as metrics and statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.readings import Reading, Readings
from service.engine.lanes import LaneReadings
from service.engine.scheduler import Piece


@dataclass(frozen=True, slots=True, eq=False)
class ObservedReading:
    """All latents of one dictionary on T tokens of a batch that has succeeded."""

    kind: str
    """Of the batch: "extract", "encode", "score" or "generate"."""
    reading: Reading
    """The dictionary, the features as tensors on its device (T rows), and whether edits came before."""
    rows: NDArray[np.int64]
    """[T], ascending: each token's row in the batch: a text (of scores an edited one), a sequence or an activation."""
    positions: NDArray[np.int64]
    """[T]: each token's position in its text, from 0."""
    requests: tuple[int, ...]
    """By row of the batch: the number of its request. It is the same in all batches of the request."""


FeatureObserver = Callable[[ObservedReading], None]


class EngineObserver(Protocol):
    """Called on the event loop, after the results of a batch have been handed over; `features` on the model thread.

    `kind` is "extract", "activations", "encode", "decode", "score", "ablate", "attribute", "resample" or "generate"
    (one step is a batch).
    """

    @property
    def features(self) -> FeatureObserver | None:
        """Takes the readings of texts, given activations and generations, one a call, after the batch succeeded.

        None: nobody observes features. An exception that it raises fails the batch.
        """

    def batch_done(self, kind: str, items: int, tokens: int, seconds: float) -> None:
        """One batch with pieces of `items` requests ran for `seconds`. For "generate", `items` are rows."""

    def waited(self, kind: str, seconds: float) -> None:
        """One request waited `seconds` from its arrival to its first batch."""


def observe_readings(
    observe: FeatureObserver,
    kind: str,
    readings: Readings,
    requests: Sequence[int],
    lengths: Sequence[int],
    past: Sequence[int] | None = None,
) -> None:
    """Calls `observe` with each reading of a batch.

    `requests`, `lengths` and `past` have one entry a row: its request, its tokens in the batch, and its tokens before
    those (None: 0 for all rows). With lengths [3, 2] and past [0, 7]:

        row of token   0 0 0 1 1
        position       0 1 2 7 8
    """
    row_of_token = np.arange(len(lengths)).repeat(lengths)
    starts = np.cumsum(lengths) - lengths - (0 if past is None else np.array(past))
    positions = np.arange(len(row_of_token)) - starts[row_of_token]
    for reading in readings.made:
        rows = row_of_token[reading.tokens]
        observe(ObservedReading(kind, reading, rows, positions[reading.tokens], tuple(requests)))


def observe_pieces(observe: FeatureObserver, kind: str, pieces: Sequence[Piece], lanes: Sequence[LaneReadings]) -> None:
    """Calls `observe` with each reading of a batch of pieces. Every lane has rows and tokens of its own."""
    # Of scores only edited rows are read.
    sizes = [piece.content.edited_lengths if kind == "score" else piece.work.sizes[piece.rows] for piece in pieces]
    for lane in lanes:
        rows = lane.rows or [(p, r) for p, piece_sizes in enumerate(sizes) for r in range(len(piece_sizes))]
        requests = [pieces[p].work.number for p, _ in rows]
        observe_readings(observe, kind, lane.readings, requests, [sizes[p][r] for p, r in rows])
