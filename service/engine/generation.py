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
from service.engine.failures import raise_if_lost, release_tensors, run_isolated
from service.engine.observer import FeatureObserver
from service.engine.sequence import RESERVATION_STEP, Event, GeneratedSequence, GenerateRequest
from service.engine.settings import EngineSettings
from service.engine.step import Row, RowResult, StepRunner
from service.engine.work import GenerateWork, GenerationEnd

PREFILL_S = 0.2
"""Most seconds that a step with prompts should take while other sequences decode, which wait for it."""
PREFILL_STEPS = 4
"""Such a step may take this many times as long as one without prompts, if that is more. A step without prompts mostly
reads the weights, and every step reads them again. In shorter steps a prompt would take over a quarter longer."""
LEAST_PREFILL_TOKENS = 32
"""Least prompt tokens of a step, however long they take. Fewer would take nearly as long."""
OLDEST_SHARE = 4
"""The oldest prompt gets at least 1 / OLDEST_SHARE of the prompt tokens of a step."""


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
        self,
        backbone: Backbone,
        dictionaries: Mapping[str, Dictionary],
        settings: EngineSettings,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        observe: FeatureObserver | None = None,
    ) -> None:
        """`max_tokens`: prompt and new tokens of one sequence."""
        self._backbone = backbone
        self._dictionaries = dictionaries
        self._runner = StepRunner(backbone, dictionaries, observe)
        self._clock = clock
        self._pace = PrefillPace(settings.prefill_chunk_tokens)
        self._max_tokens = max_tokens
        self._end_of_text = backbone.settings.ends_of_text
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
        """The request that waits for slots or cache. All behind it wait as well, so that none overtakes it."""

    @cached_property
    def _cache(self) -> KVCache:
        """On the CPU it is made by the first step: it can take over a gigabyte, and perhaps nobody generates."""
        return self._backbone.new_cache(self._n_slots, self._max_tokens, self._cache_tokens)

    @property
    def n_active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        """Requests that left the queue and wait for slots or cache."""
        return 0 if self._next is None else 1

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the cache that sequences reserve."""
        return self._reserved

    def sequence_tokens(self, work: GenerateWork) -> int:
        """Tokens of the cache that one sequence of the work reserves."""
        most_tokens = len(work.prompt) + work.max_new_tokens
        return min(math.ceil(most_tokens / RESERVATION_STEP) * RESERVATION_STEP, self._max_tokens)

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
            next_waiting: takes the next request out of the queue, or returns None.
        """
        begin = self._clock()
        self._leave([sequence for sequence in self._active if sequence.request.cancelled])
        events = self._join(next_waiting)
        rows = self._rows()
        requests = list(dict.fromkeys(row.sequence.request for row in rows))
        started = [request for request in requests if request.queue_s is None]
        for request in started:
            request.queue_s = begin - request.arrival
        results = self._run(rows)
        seconds = self._clock() - begin
        if rows:
            self._pace.note(sum(row.n for row in rows if row.sequence.in_prompt), seconds)
        for request in requests:
            request.compute_s += seconds
        for row, result in zip(rows, results, strict=True):
            events += self._advance(row, result)
        return StepOutcome(events, started, len(rows), sum(row.n for row in rows), seconds)

    # Coming and going

    def _join(self, next_waiting: Callable[[], GenerateRequest | None]) -> list[tuple[GenerateRequest, Event]]:
        """Lets waiting requests join while they fit. Returns the errors of those whose edits cannot be prepared."""
        failed: list[tuple[GenerateRequest, Event]] = []
        while self._free_slots:
            request = self._next or next_waiting()
            if request is None:
                break
            self._next = request
            if not request.cancelled:
                size = self.sequence_tokens(request.work)
                n_sequences = len(request.sequences)
                if n_sequences > len(self._free_slots) or n_sequences * size > self._cache_tokens - self._reserved:
                    break
                self._next = None
                try:
                    request.prepare_edits(self._dictionaries, self._backbone)
                except Exception as error:
                    raise_if_lost(error)
                    release_tensors(error)
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
        """The rows of the next step: every sequence that decodes, with one token, and pieces of prompts.

        Followers have no rows until the sequence that runs their prompt is done with it.
        """
        following = {follower for sequence in self._active for follower in sequence.followers}
        prompts = [s for s in self._active if s.in_prompt and s not in following]
        budget = self._pace.budget(others_decode=any(not s.in_prompt for s in self._active))
        pieces = prompt_pieces([len(s.tokens) - s.past for s in prompts], budget)
        piece_of = {sequence: n for sequence, n in zip(prompts, pieces, strict=True) if n}
        return [
            Row(sequence, piece_of.get(sequence, 1))
            for sequence in self._active
            if not sequence.in_prompt or sequence in piece_of
        ]

    def _run(self, rows: Sequence[Row]) -> list[RowResult | Exception]:
        """A result or an error a row. A failed run advances no row, so that its rows can run again."""
        return run_isolated(self._run_together, rows) if rows else []

    def _run_together(self, rows: Sequence[Row]) -> list[RowResult | Exception]:
        """As `_run`, but returns only EditOutOfRange by row, as NonFiniteActivations. Raises all other errors."""
        try:
            return [*self._runner.run(rows, self._cache)]
        except EditOutOfRange as error:
            failed, failure = error.rows, NonFiniteActivations(str(error))
        others = [row for i, row in enumerate(rows) if i not in failed]
        results = iter(self._run_together(others) if others else [])
        return [failure if i in failed else next(results) for i in range(len(rows))]

    def _advance(self, row: Row, result: RowResult | Exception) -> list[tuple[GenerateRequest, Event]]:
        """Adds one row's result to its sequences and returns the events. Sequences that end leave."""
        sequence, request = row.sequence, row.sequence.request
        if sequence.slot < 0:  # another sequence of its request has failed in this step
            return []
        if isinstance(result, RowResult) and not all(sampled.finite for sampled in result.sampled):
            result = _non_finite(sequence)
        if isinstance(result, Exception):
            self._leave([s for s in self._active if s.request is request])
            return [(request, result)]
        sampling = row.sampling
        sequence.past += row.n
        if result.features is not None:
            sequence.features.append(result.features)
        if sequence.followers and sampling:
            self._cache.copy(sequence.slot, [follower.slot for follower in sequence.followers], sequence.past)
            for follower in sequence.followers:
                follower.past = sequence.past
            sequence.followers = []
        if not sampling:  # in the midst of its prompt
            return [(request, event) for event in sequence.pop_features()]
        events: list[tuple[GenerateRequest, Event]] = []
        for receiver, sampled in zip(sampling, result.sampled, strict=True):
            is_end = sampled.id in self._end_of_text
            is_full = len(receiver.tokens) + 1 >= self._max_tokens
            for event in receiver.append(sampled, self._piece(sampled.id), is_end=is_end, is_full=is_full):
                events.append((request, event))
                if isinstance(event, GenerationEnd):
                    self._leave([receiver])
        return events

    def _piece(self, token: int) -> bytes:
        if not self._has_text:
            return b""
        try:
            return self._backbone.token_bytes(token)
        except ValueError:  # a row of the embedding that the tokenizer has no token for
            return b""


class PrefillPace:
    """How many prompt tokens a step may run beside sequences that decode. It follows the speed of the last steps.

    tokens = speed * max(PREFILL_S, PREFILL_STEPS * plain_s), between LEAST_PREFILL_TOKENS and `most_tokens`

    speed: prompt tokens a second of steps with prompts; plain_s: seconds of a step without prompts.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._budget = most_tokens
        self._tokens_per_s = 0.0
        """Prompt tokens a second of steps with prompts; 0 before the first one."""
        self._plain_s = 0.0
        """Seconds of a step without prompts; 0 before the first one."""

    def budget(self, *, others_decode: bool) -> int:
        """Prompt tokens of the next step. If nothing decodes, nobody waits for it, and it runs as many as it may."""
        self._budget = self._most_tokens
        if others_decode:
            step_s = max(PREFILL_S, PREFILL_STEPS * self._plain_s)
            self._budget = min(max(int(self._tokens_per_s * step_s), LEAST_PREFILL_TOKENS), self._most_tokens)
        return self._budget

    def note(self, tokens: int, seconds: float) -> None:
        """Notes that a step ran `tokens` prompt tokens in `seconds`.

        A step with less than half of its budget says little of the speed, since most of its time is that of any step.
        """
        if tokens == 0:
            self._plain_s = _running_mean(self._plain_s, seconds)
        elif 2 * tokens >= self._budget:
            self._tokens_per_s = _running_mean(self._tokens_per_s, tokens / max(seconds, 1e-6))


def _running_mean(mean: float, value: float) -> float:
    """Exponential moving average: each value weighs half as much as the one after it. 0 means no value yet."""
    return (mean + value) / 2 if mean else value


def prompt_pieces(pending: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt run in the next step.

    `pending` is how many tokens of each prompt are left, the oldest prompt first. The oldest gets its share, so that no
    prompt waits for ever. The rest of the budget goes to the prompts with the fewest tokens left. So a short prompt
    does not wait for a long one, and prompts that arrive together end one after the other, each as early as it can.

        budget 8, pending [20, 3, 9]   ->   share of the oldest: 2   then 3, 3   ->   [2, 3, 3]
    """
    pieces = [0] * len(pending)
    if not pending:
        return pieces
    pieces[0] = min(pending[0], math.ceil(budget / OLDEST_SHARE))
    budget -= pieces[0]
    for i in sorted(range(len(pending)), key=lambda i: pending[i] - pieces[i]):
        more = min(pending[i] - pieces[i], budget)
        pieces[i] += more
        budget -= more
    return pieces


def _non_finite(sequence: GeneratedSequence) -> NonFiniteActivations:
    cause = "its edits are too strong" if sequence.edits else "the backbone overflows its dtype on this text"
    return NonFiniteActivations(f"the logits after {len(sequence.tokens)} tokens are not finite: {cause}")
