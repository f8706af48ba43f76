"""Continuous batching: continuations join and leave the running batch at token boundaries (model thread only)."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sae_runtime.autoencoder import Dictionary
from sae_runtime.backbone import Backbone
from sae_runtime.interventions import RowEdits, plan_edits
from sae_runtime.kv_cache import KVCache
from sae_runtime.packed import PackedTokens
from sae_runtime.sites import Site
from service.engine.errors import NonFiniteActivations
from service.engine.sampling import RowSampler, SampledTokens, sample
from service.engine.settings import EngineSettings
from service.engine.text_stream import TextStream
from service.engine.work import EndReason, GeneratedTokens, GenerateWork, GenerationEnd, WorkTiming


class Continuation:
    """One generation, from its arrival to its end. Only `cancelled` is written by the event loop."""

    def __init__(self, work: GenerateWork, deliver: Callable[[Event], None]) -> None:
        self.work = work
        self.deliver = deliver
        """Takes the events of this continuation, on the event loop."""
        self.cancelled = False
        self.arrival = time.monotonic()
        self.queue_s: float | None = None
        """Seconds from arrival to the first step, once there was one."""
        self.compute_s = 0.0
        self.slot = -1
        self.tokens = list(work.prompt)
        """Prompt and what was sampled."""
        self.past = 0
        """How many of them are in the cache."""
        self.sampler = RowSampler(work.sampling)
        self.text = TextStream(work.stop)

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - len(self.work.prompt)


Event = GeneratedTokens | GenerationEnd | Exception
"""What a continuation delivers: tokens, then one end or error."""


@dataclass(slots=True)
class StepOutcome:
    """One generation step, for the event loop to hand on."""

    events: list[tuple[Continuation, Event]]
    started: list[Continuation]
    """Sequences whose first step this was."""
    n_rows: int
    n_tokens: int
    seconds: float


@dataclass(slots=True)
class _Row:
    """A continuation and how many of its tokens run in this step."""

    continuation: Continuation
    n: int

    @property
    def completes(self) -> bool:
        """Whether the step reaches the continuation's last token, so that the next one can be sampled."""
        return self.continuation.past + self.n == len(self.continuation.tokens)


class Generation:
    """The running batch and its key-value cache. `step` decodes one token for every continuation in it."""

    def __init__(
        self, backbone: Backbone, dictionaries: Mapping[str, Dictionary], settings: EngineSettings, max_tokens: int
    ) -> None:
        self._backbone = backbone
        self._dictionaries = dictionaries
        self._prefill_tokens = settings.prefill_chunk_tokens
        self._max_tokens = max_tokens
        self._end_of_text = backbone.settings.eos_token_id
        self._has_text = backbone.has_tokenizer
        if self._has_text:
            backbone.token_bytes(0)  # builds the table of all tokens now rather than in the first step
        self._n_slots = settings.max_concurrent_generations
        if backbone.device.type != "cpu":
            self._cache  # noqa: B018  # device memory that is missing must show at the start
        # A heap: the lowest free slot first, which keeps the used ones together.
        self._free_slots = list(range(self._n_slots))
        self._active: list[Continuation] = []

    @cached_property
    def _cache(self) -> KVCache:
        """Made by the first step on the host, where it may be over a gigabyte that nobody ever generates with."""
        return self._backbone.new_cache(self._n_slots, self._max_tokens)

    @property
    def n_active(self) -> int:
        return len(self._active)

    def step(self, next_waiting: Callable[[], Continuation | None]) -> StepOutcome:
        """Lets cancelled continuations leave and waiting ones join, and runs one forward pass for all.

        Args:
            next_waiting: takes the next of those that wait, or returns None.
        """
        begin = time.monotonic()
        for continuation in [c for c in self._active if c.cancelled]:
            self._leave(continuation)
        while self._free_slots and (waiting := next_waiting()) is not None:
            if not waiting.cancelled:
                waiting.slot = heapq.heappop(self._free_slots)
                self._active.append(waiting)
        rows = self._rows()
        started = [row.continuation for row in rows if row.continuation.queue_s is None]
        for continuation in started:
            continuation.queue_s = begin - continuation.arrival
        sampled = self._run(rows)
        seconds = time.monotonic() - begin
        for row in rows:
            row.continuation.compute_s += seconds
        events = [event for row in rows for event in self._advance(row, sampled)]
        return StepOutcome(events, started, len(rows), sum(row.n for row in rows), seconds)

    def _leave(self, continuation: Continuation) -> None:
        self._active.remove(continuation)
        heapq.heappush(self._free_slots, continuation.slot)

    def _rows(self) -> list[_Row]:
        """Every decoding continuation, and prompts in arrival order up to the prefill budget."""
        rows, budget = [], self._prefill_tokens
        for continuation in self._active:
            pending = len(continuation.tokens) - continuation.past
            if continuation.past >= len(continuation.work.prompt):
                rows.append(_Row(continuation, pending))
            elif budget > 0:
                n = min(pending, budget)
                budget -= n
                rows.append(_Row(continuation, n))
        return rows

    def _run(self, rows: Sequence[_Row]) -> dict[Continuation, tuple[int, float] | Exception]:
        """What each row's continuation sampled, with its log-probability, or why it failed."""
        try:
            return self._forward(rows)
        except Exception as error:
            if len(rows) == 1:
                return {rows[0].continuation: error}
        # One row failed all. None has advanced, so that they can run again, alone.
        outcome: dict[Continuation, tuple[int, float] | Exception] = {}
        for row in rows:
            outcome |= self._run([row])
        return outcome

    def _forward(self, rows: Sequence[_Row]) -> dict[Continuation, tuple[int, float] | Exception]:
        if not rows:
            return {}
        continuations = [row.continuation for row in rows]
        packed = PackedTokens.from_rows(
            [c.tokens[c.past : c.past + row.n] for c, row in zip(continuations, rows, strict=True)],
            past=[c.past for c in continuations],
            slots=[c.slot for c in continuations],
        )
        if any(c.work.edits for c in continuations):
            plan = plan_edits(
                [
                    RowEdits(c.work.edits, len(c.work.prompt), c.past, row.n)
                    for c, row in zip(continuations, rows, strict=True)
                ],
                self._dictionaries,
            )

            def edit(site: Site, x: Tensor) -> Tensor:
                try:
                    return plan.apply(site, x)
                except ValueError as error:
                    # The edits were checked before they were queued; what is left is activations out of range.
                    raise NonFiniteActivations(f"{site} cannot be edited: {error}") from error

            result = self._backbone.forward(packed, edit=edit, edit_sites=plan.sites, cache=self._cache, logits="last")
        else:
            result = self._backbone.forward(packed, cache=self._cache, logits="last")
        logits = result.logits
        assert logits is not None
        sampling = [i for i, row in enumerate(rows) if row.completes]
        if len(sampling) < len(rows):
            logits = logits[sampling]
        sampled = (
            sample(logits, [continuations[i].sampler for i in sampling]) if sampling else SampledTokens([], [], [])
        )
        return {
            continuations[i]: (token, logprob) if finite else _non_finite(continuations[i])
            for i, token, logprob, finite in zip(sampling, sampled.ids, sampled.logprobs, sampled.finite, strict=True)
        }

    def _advance(
        self, row: _Row, outcome: Mapping[Continuation, tuple[int, float] | Exception]
    ) -> list[tuple[Continuation, Event]]:
        """Takes one row's result into its continuation; what it delivers. Ended continuations leave."""
        continuation = row.continuation
        sampled = outcome.get(continuation)
        if isinstance(sampled, Exception):
            self._leave(continuation)
            return [(continuation, sampled)]
        continuation.past += row.n
        if sampled is None:  # in the midst of its prompt
            return []
        token, logprob = sampled
        continuation.tokens.append(token)
        reason: EndReason | None
        if token == self._end_of_text and not continuation.work.ignore_end_of_text:
            tokens, reason = GeneratedTokens(continuation.text.finish(), [], []), "end_of_text"
        else:
            tokens = GeneratedTokens(self._push_text(continuation, token), [token], [logprob])
            reason = self._reason(continuation)
            if reason == "length":
                tokens.text += continuation.text.finish()
                # What was held back may hold a stop string that ends in a cut character.
                reason = self._reason(continuation)
        events: list[tuple[Continuation, Event]] = [(continuation, tokens)] if tokens.ids or tokens.text else []
        if reason is not None:
            self._leave(continuation)
            timing = WorkTiming(continuation.queue_s or 0.0, continuation.compute_s)
            stop = continuation.text.stopped_by or ""
            end = GenerationEnd(reason, len(continuation.work.prompt), continuation.n_generated, stop, timing)
            events.append((continuation, end))
        return events

    def _push_text(self, continuation: Continuation, token: int) -> str:
        if not self._has_text:
            return ""
        try:
            piece = self._backbone.token_bytes(token)
        except ValueError:  # a row of the embedding that the tokenizer has no token for
            piece = b""
        return continuation.text.push(piece)

    def _reason(self, continuation: Continuation) -> EndReason | None:
        if continuation.text.stopped_by is not None:
            return "stop"
        full = len(continuation.tokens) >= self._max_tokens
        return "length" if full or continuation.n_generated >= continuation.work.max_new_tokens else None


def _non_finite(continuation: Continuation) -> NonFiniteActivations:
    cause = "its edits are too strong" if continuation.work.edits else "the backbone overflows its dtype on this text"
    return NonFiniteActivations(f"the logits after {len(continuation.tokens)} tokens are not finite: {cause}")
