"""Lanes: a CPU batch cut into shares, each run by a thread of its own on one core.

torch can also split every single operation over the cores, and then waits for the slowest of them some hundred times a
batch: a core that the event loop, the ingress or a client is using holds all others up each time. Lanes meet once a
batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from sae_runtime.model.backbone import Backbone
from service.engine.batch import ExtractPart, run_extract
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
        self._pool.shutdown()

    def run(self, shares: Sequence[Callable[[], Result]]) -> list[Result]:
        """Runs the shares side by side; raises the first one's exception after all have ended."""
        futures = [self._pool.submit(_inferring, share) for share in shares]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in futures]


def _use_one_thread() -> None:
    # A thread's first question or parallel operation gives it the number last set anywhere, so it must be asked before.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _inferring(share: Callable[[], Result]) -> Result:
    with torch.inference_mode():  # a property of the thread
        return share()


def extract_in_lanes(
    backbone: Backbone, parts: Sequence[ExtractPart], lanes: Lanes | None
) -> list[list[list[DictionaryRows]]]:
    """`run_extract` with the rows of the batch shared out over the lanes, nearly the same number of tokens to each."""
    places = [(p, r) for p, part in enumerate(parts) for r in range(len(part.rows))]
    tokens = sum(len(row) for part in parts for row in part.rows)
    n = 1 if lanes is None else min(lanes.count, len(places), tokens // MIN_LANE_TOKENS)
    if lanes is None or n < 2:
        return run_extract(backbone, parts)

    # The longest row first, each to the lane that has the least to do.
    loads = [0] * n
    lane_of: dict[tuple[int, int], int] = {}
    for p, r in sorted(places, key=lambda place: -len(parts[place[0]].rows[place[1]])):
        lane = loads.index(min(loads))
        loads[lane] += len(parts[p].rows[r])
        lane_of[p, r] = lane
    own = [[place for place in places if lane_of[place] == lane] for lane in range(n)]

    def share(lane: int) -> Callable[[], list[list[list[DictionaryRows]]]]:
        rows_of: dict[int, list[int]] = {}
        for p, r in own[lane]:
            rows_of.setdefault(p, []).append(r)
        pieces = [replace(parts[p], rows=[parts[p].rows[r] for r in rows]) for p, rows in rows_of.items()]
        return lambda: run_extract(backbone, pieces)

    found: dict[tuple[int, int], list[DictionaryRows]] = {}
    for places_run, outcome in zip(own, lanes.run([share(lane) for lane in range(n)]), strict=True):
        found.update(zip(places_run, (row for piece in outcome for row in piece), strict=True))
    return [[found[p, r] for r in range(len(part.rows))] for p, part in enumerate(parts)]
