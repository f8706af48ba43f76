"""Lanes: on the CPU the rows of an extraction are shared out over threads that compute on one core each.

torch can split every single operation over the cores instead. It then waits for the slowest core some hundred times a
batch, and the event loop, the ingress or a client holds a core up now and then. Lanes wait for each other once a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from sae_runtime.dictionary.readings import Readings
from sae_runtime.model.backbone import Backbone
from service.engine.batch import Extraction, run_extract
from service.engine.work import DictionaryRows

MIN_LANE_TOKENS = 64
"""Smaller shares would spend their time on starting operations, not in them."""

Result = TypeVar("Result")


class Lanes:
    """Threads that run shares of batches. One for an engine; used by its model thread alone."""

    def __init__(self, count: int) -> None:
        """`count` threads with one torch thread each. The calling thread keeps its own number of torch threads."""
        self.count = count
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "lane", initializer=_use_one_thread)
        # torch keeps this number for each thread, and the last one set for threads yet to come: all must be there now.
        barrier = threading.Barrier(count)
        for future in [self._pool.submit(barrier.wait) for _ in range(count)]:
            future.result()
        torch.set_num_threads(threads)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def run(self, shares: Sequence[Callable[[], Result]]) -> list[Result]:
        """Runs the shares side by side. Raises the first one's exception after all have ended."""
        futures = [self._pool.submit(_inferring, share) for share in shares]
        for error in [future.exception() for future in futures]:
            if error is not None:
                raise error
        return [future.result() for future in futures]


def new_lanes(device: torch.device, count: int) -> Lanes | None:
    """Lanes for a device: `count`, or if that is 0 as many as torch has threads. None: torch splits operations."""
    count = count or torch.get_num_threads()
    return Lanes(count) if device.type == "cpu" and count > 1 else None


def _use_one_thread() -> None:
    # A thread's first question or parallel operation gives it the number last set anywhere, so it must be asked before.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _inferring(share: Callable[[], Result]) -> Result:
    with torch.inference_mode():  # a property of the thread
        return share()


@dataclass(frozen=True, slots=True, eq=False)
class LaneReadings:
    """What one lane has read, and the rows that it ran, in the order of its tokens."""

    readings: Readings
    rows: Sequence[tuple[int, int]] = ()
    """By row of the lane: the piece that it belongs to, and its number in that piece. Empty: all rows of the batch."""


def extract_in_lanes(
    backbone: Backbone, pieces: Sequence[Extraction], lanes: Lanes | None
) -> tuple[list[list[list[DictionaryRows]]], list[LaneReadings]]:
    """`run_extract` with the rows of the batch shared out over the lanes, nearly the same number of tokens to each.

    Returns the results as `run_extract`, and what each lane has read. Every lane is a forward pass of its own.
    """
    rows = [(p, r) for p, piece in enumerate(pieces) for r in range(len(piece.rows))]

    def tokens(row: tuple[int, int]) -> int:
        return len(pieces[row[0]].rows[row[1]])

    n = 1 if lanes is None else min(lanes.count, len(rows), sum(map(tokens, rows)) // MIN_LANE_TOKENS)
    if lanes is None or n < 2:
        readings = Readings()
        return run_extract(backbone, pieces, readings), [LaneReadings(readings)]

    # The longest row first, each to the lane that has the fewest tokens.
    loads = [0] * n
    by_lane: list[list[tuple[int, int]]] = [[] for _ in range(n)]
    for row in sorted(rows, key=tokens, reverse=True):
        lane = loads.index(min(loads))
        loads[lane] += tokens(row)
        by_lane[lane].append(row)

    lane_readings = [LaneReadings(Readings(), sorted(lane_rows)) for lane_rows in by_lane]

    def share(lane: LaneReadings) -> list[list[DictionaryRows]]:
        """Results of the lane's rows, in their order."""
        numbers: dict[int, list[int]] = {}
        for p, r in lane.rows:
            numbers.setdefault(p, []).append(r)
        contents = [replace(pieces[p], rows=[pieces[p].rows[r] for r in chosen]) for p, chosen in numbers.items()]
        return [row for piece in run_extract(backbone, contents, lane.readings) for row in piece]

    results: dict[tuple[int, int], list[DictionaryRows]] = {}
    outcomes = lanes.run([partial(share, lane) for lane in lane_readings])
    for lane_reading, outcome in zip(lane_readings, outcomes, strict=True):
        results.update(zip(lane_reading.rows, outcome, strict=True))
    return [[results[p, r] for r in range(len(piece.rows))] for p, piece in enumerate(pieces)], lane_readings
