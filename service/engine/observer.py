"""What the engine tells whoever counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.readings import Reading, Readings


@dataclass(frozen=True, slots=True, eq=False)
class ObservedReading:
    """All latents of one dictionary on T tokens of a batch that has succeeded."""

    kind: str
    """Of the batch: "extract", "encode" or "generate"."""
    reading: Reading
    """The dictionary, the features as tensors on its device (T rows), and whether edits came before."""
    rows: NDArray[np.int64]
    """[T], ascending: the row of the batch (a text, a sequence, a given activation) that each token is of."""
    positions: NDArray[np.int64]
    """[T]: where in its text each token is, from 0."""
    requests: tuple[int, ...]
    """For each row of the batch the number of its request, which is the same in all batches of the request."""


FeatureObserver = Callable[[ObservedReading], None]


class EngineObserver(Protocol):
    """Called on the event loop, after the results of a batch have been handed over; `features` on the model thread.

    `kind` is "extract", "encode", "decode", "score", "ablate", "attribute", "resample" or "generate" (one step is a
    batch).
    """

    @property
    def features(self) -> FeatureObserver | None:
        """Takes what is read of texts, given activations and generations: once a reading, when its batch has succeeded.

        None: nobody counts features. What it raises fails the batch.
        """

    def batch_done(self, kind: str, items: int, tokens: int, seconds: float) -> None:
        """One batch ran for `seconds`; `items` requests had a part in it."""

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
    """Tells of all readings of a batch.

    For each row of the batch: its request, how many tokens it brings, and how many it had before (None: none).
    """
    row_of_token = np.arange(len(lengths)).repeat(lengths)
    starts = np.cumsum(lengths) - lengths - (0 if past is None else np.array(past))
    positions = np.arange(len(row_of_token)) - starts[row_of_token]
    for reading in readings.made:
        rows = row_of_token[reading.tokens]
        observe(ObservedReading(kind, reading, rows, positions[reading.tokens], tuple(requests)))
