"""Continuous batching: sequences join and leave the running batch at token boundaries (model thread only)."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import EditOutOfRange
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.kv_cache import KVCache
from service.engine.errors import NonFiniteActivations
from service.engine.sequence import RESERVATION_STEP, Event, GeneratedSequence, GenerateRequest
from service.engine.settings import EngineSettings
from service.engine.step import Row, RowResult, StepRunner
from service.engine.work import GenerateWork, GenerationEnd


@dataclass(slots=True)
class StepOutcome:
    """One generation step, for the event loop to hand on."""

    events: list[tuple[GenerateRequest, Event]]
    started: list[GenerateRequest]
    """Requests whose first step this was."""
    n_rows: int
    n_tokens: int
    seconds: float


class RunningBatch:
    """The running batch and its key-value cache. `step` decodes one token for every sequence in it."""

    def __init__(
        self, backbone: Backbone, dictionaries: Mapping[str, Dictionary], settings: EngineSettings, max_tokens: int
    ) -> None:
        """`max_tokens`: prompt and new tokens of one sequence."""
        self._backbone = backbone
        self._dictionaries = dictionaries
        self._runner = StepRunner(backbone, dictionaries)
        self._prefill_tokens = settings.prefill_chunk_tokens
        self._max_tokens = max_tokens
        self._end_of_text = backbone.settings.eos_token_id
        self._has_text = backbone.has_tokenizer
        if self._has_text:
            backbone.token_bytes(0)  # builds the table of all tokens now rather than in the first step
        self._n_slots = settings.max_concurrent_generations
        self._cache_tokens = settings.max_cache_tokens
        if backbone.device.type != "cpu":
            self._cache  # noqa: B018  # device memory that is missing must show at the start
        # A heap: the lowest free slot first, which keeps the used ones together.
        self._free_slots = list(range(self._n_slots))
        self._reserved = 0
        self._active: list[GeneratedSequence] = []
        self._next: GenerateRequest | None = None
        """The request that waits for room; those behind it wait as well, so that it is never overtaken."""

    @cached_property
    def _cache(self) -> KVCache:
        """Made by the first step on the host, where it may be over a gigabyte that nobody ever generates with."""
        return self._backbone.new_cache(self._n_slots, self._max_tokens, self._cache_tokens)

    @property
    def n_active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        """Requests that were taken from the queue and wait for room."""
        return 0 if self._next is None else 1

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the cache that are spoken for."""
        return self._reserved

    def sequence_tokens(self, work: GenerateWork) -> int:
        """What each of the work's sequences reserves."""
        wanted = len(work.prompt) + work.max_new_tokens
        return min(math.ceil(wanted / RESERVATION_STEP) * RESERVATION_STEP, self._max_tokens)

    def check_fits(self, work: GenerateWork) -> None:
        """ValueError, naming the setting, for work that does not fit even if nothing else runs."""
        if work.n_sequences > self._n_slots:
            raise ValueError(
                f"{work.n_sequences} sequences cannot run together: max_concurrent_generations = {self._n_slots}"
            )
        tokens = work.n_sequences * self.sequence_tokens(work)
        if tokens > self._cache_tokens:
            raise ValueError(
                f"{work.n_sequences} sequences of {len(work.prompt)} + {work.max_new_tokens} tokens reserve {tokens} "
                f"tokens of the key-value cache, which holds max_cache_tokens = {self._cache_tokens}"
            )

    def step(self, next_waiting: Callable[[], GenerateRequest | None]) -> StepOutcome:
        """Lets cancelled requests leave and waiting ones join, and runs one forward pass for all.

        Args:
            next_waiting: takes the next of those that wait, or returns None.
        """
        begin = time.monotonic()
        self._leave([sequence for sequence in self._active if sequence.request.cancelled])
        events = self._join(next_waiting)
        rows = self._rows()
        requests = list(dict.fromkeys(row.sequence.request for row in rows))
        started = [request for request in requests if request.queue_s is None]
        for request in started:
            request.queue_s = begin - request.arrival
        results = self._run(rows)
        seconds = time.monotonic() - begin
        for request in requests:
            request.compute_s += seconds
        for row, result in zip(rows, results, strict=True):
            events += self._advance(row, result)
        return StepOutcome(events, started, len(rows), sum(row.n for row in rows), seconds)

    # Coming and going

    def _join(self, next_waiting: Callable[[], GenerateRequest | None]) -> list[tuple[GenerateRequest, Event]]:
        """Takes waiting requests in while there is room; the errors of those whose edits cannot be made ready."""
        failed: list[tuple[GenerateRequest, Event]] = []
        while self._free_slots:
            request = self._next or next_waiting()
            if request is None:
                break
            self._next = request
            if not request.cancelled:
                size = self.sequence_tokens(request.work)
                wanted = len(request.sequences)
                if wanted > len(self._free_slots) or wanted * size > self._cache_tokens - self._reserved:
                    break
                self._next = None
                try:
                    request.prepare_edits(self._dictionaries, self._backbone)
                except Exception as error:
                    failed.append((request, error))
                    continue
                for sequence in request.sequences:
                    sequence.slot = heapq.heappop(self._free_slots)
                    self._cache.reserve(sequence.slot, size)
                    self._reserved += size
                self._active += request.sequences
            self._next = None
        return failed

    def _leave(self, sequences: Iterable[GeneratedSequence]) -> None:
        for sequence in sequences:
            self._active.remove(sequence)
            self._cache.release(sequence.slot)
            self._reserved -= self.sequence_tokens(sequence.request.work)
            heapq.heappush(self._free_slots, sequence.slot)
            sequence.slot = -1

    # A step

    def _rows(self) -> list[Row]:
        """Every sequence that decodes, and pieces of the prompts up to the prefill budget."""
        following = {follower for sequence in self._active for follower in sequence.followers}
        prompts = [s for s in self._active if s.in_prompt and s not in following]
        pieces = _shares([len(s.tokens) - s.past for s in prompts], self._prefill_tokens)
        piece_of = {sequence: n for sequence, n in zip(prompts, pieces, strict=True) if n}
        return [
            Row(sequence, piece_of.get(sequence, 1))
            for sequence in self._active
            if not sequence.in_prompt or sequence in piece_of
        ]

    def _run(self, rows: Sequence[Row]) -> list[RowResult | Exception]:
        """A result a row, or why it failed."""
        if not rows:
            return []
        try:
            return list(self._runner.run(rows, self._cache))
        except EditOutOfRange as error:
            found = iter(self._run([row for i, row in enumerate(rows) if i not in error.rows]))
            failure = NonFiniteActivations(str(error))
            return [failure if i in error.rows else next(found) for i in range(len(rows))]
        except Exception as error:
            if len(rows) == 1:
                return [error]
        # One row failed all. None has advanced, so that they can run again, alone.
        return [self._run([row])[0] for row in rows]

    def _advance(self, row: Row, result: RowResult | Exception) -> list[tuple[GenerateRequest, Event]]:
        """Takes one row's result into its sequences; what they deliver. Ended sequences leave."""
        sequence, request = row.sequence, row.sequence.request
        if sequence.slot < 0:  # another sequence of its request has failed in this step
            return []
        if isinstance(result, RowResult) and not all(sampled.finite for sampled in result.sampled):
            result = _non_finite(sequence)
        if isinstance(result, Exception):
            self._leave([s for s in self._active if s.request is request])
            return [(request, result)]
        takers = row.takers
        sequence.past += row.n
        if result.features is not None:
            sequence.features.append(result.features)
        if sequence.followers and takers:
            self._cache.copy(sequence.slot, [follower.slot for follower in sequence.followers], sequence.past)
            for follower in sequence.followers:
                follower.past = sequence.past
            sequence.followers = []
        if not takers:  # in the midst of its prompt
            return [(request, event) for event in sequence.take_features()]
        events: list[tuple[GenerateRequest, Event]] = []
        for own, sampled in zip(takers, result.sampled, strict=True):
            is_end = sampled.id == self._end_of_text
            is_full = len(own.tokens) + 1 >= self._max_tokens
            for event in own.take(sampled, self._piece(sampled.id), is_end=is_end, is_full=is_full):
                events.append((request, event))
                if isinstance(event, GenerationEnd):
                    self._leave([own])
        return events

    def _piece(self, token: int) -> bytes:
        if not self._has_text:
            return b""
        try:
            return self._backbone.token_bytes(token)
        except ValueError:  # a row of the embedding that the tokenizer has no token for
            return b""


def _shares(pending: Sequence[int], budget: int) -> list[int]:
    """Splits the budget evenly over prompts with `pending` tokens each; what the short ones leave goes to the long."""
    shares = [0] * len(pending)
    if budget < len(pending):
        for i, n in enumerate(pending):  # first come, first served: an even share would be less than a token
            shares[i] = min(n, budget)
            budget -= shares[i]
        return shares
    order = sorted(range(len(pending)), key=pending.__getitem__)
    for place, i in enumerate(order):
        shares[i] = min(pending[i], budget // (len(order) - place))
        budget -= shares[i]
    return shares


def _non_finite(sequence: GeneratedSequence) -> NonFiniteActivations:
    cause = "its edits are too strong" if sequence.edits else "the backbone overflows its dtype on this text"
    return NonFiniteActivations(f"the logits after {len(sequence.tokens)} tokens are not finite: {cause}")
