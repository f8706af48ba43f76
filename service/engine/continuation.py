"""A Generate request and its sequences, from their arrival to their end (model thread, but for `cancelled`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import RowEdits, resolve_references
from sae_runtime.model.backbone import Backbone
from service.engine.sampling import RowSampler, SampledToken
from service.engine.text_stream import TextStream
from service.engine.work import EndReason, GeneratedTokens, GenerateWork, GenerationEnd, TokenFeatures, WorkTiming

RESERVATION_STEP = 64
"""Reservations are multiples of this: rows at equal distances in the cache share an attention call."""

Event = GeneratedTokens | GenerationEnd | Exception
"""What a request delivers: tokens of its sequences, one end of each, or one error."""


class Continuation:
    """One Generate request. Only `cancelled` is written by the event loop."""

    def __init__(self, work: GenerateWork, deliver: Callable[[Event], None]) -> None:
        self.work = work
        self.deliver = deliver
        """Takes the events of this request, on the event loop."""
        self.cancelled = False
        self.arrival = time.monotonic()
        self.queue_s: float | None = None
        """Seconds from arrival to the first step, once there was one."""
        self.compute_s = 0.0
        self.sequences: list[GeneratedSequence] = []
        for unedited in (True, False) if work.compare else (False,):
            first = GeneratedSequence(self, 0, unedited)
            self.sequences += [first, *(GeneratedSequence(self, i, unedited) for i in range(1, work.samples))]
            first.followers = self.sequences[-work.samples + 1 :] if work.samples > 1 else []

    def prepare_edits(self, dictionaries: Mapping[str, Dictionary], backbone: Backbone) -> None:
        """Makes the edits of all sequences ready; runs the reference texts of those that resample."""
        edits = self.work.edits
        if not edits:
            return
        if any(edit.reference is not None for edit in edits):
            edits = resolve_references(edits, dictionaries, backbone)
        row_edits = RowEdits(
            edits,
            dictionaries,
            len(self.work.prompt),
            token_bytes=backbone.token_bytes if backbone.has_tokenizer else None,
            max_relative_change=self.work.max_relative_change,
        )
        for sequence in self.sequences:
            if not sequence.unedited:
                sequence.edits = row_edits.for_another_row()


class GeneratedSequence:
    """The prompt and what was sampled after it."""

    def __init__(self, request: Continuation, sample: int, unedited: bool) -> None:
        work = request.work
        self.request = request
        self.sample = sample
        self.unedited = unedited
        self.edits: RowEdits | None = None
        """See Continuation.prepare_edits."""
        self.slot = -1
        self.tokens = list(work.prompt)
        """Prompt and what was sampled."""
        self.past = 0
        """How many of them are in the cache."""
        self.followers: list[GeneratedSequence] = []
        """Other samples that wait until this one has run the prompt, and then start from a copy."""
        self.sampler = RowSampler(work.sampling, sample, work.prompt)
        self.text = TextStream(work.stop)
        self.features: list[TokenFeatures] = []
        """Not delivered yet."""

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - len(self.request.work.prompt)

    @property
    def in_prompt(self) -> bool:
        """Whether tokens of the prompt have yet to be run."""
        return self.past < len(self.request.work.prompt)

    def take(self, sampled: SampledToken, piece: bytes, *, is_end: bool, is_full: bool) -> list[Event]:
        """Takes the next token; what that delivers.

        Args:
            sampled: the token.
            piece: its bytes, empty without a tokenizer.
            is_end: it is the backbone's end of text.
            is_full: nothing can be run after it.
        """
        work = self.request.work
        tokens = GeneratedTokens(features=self.features, sample=self.sample, unedited=self.unedited)
        self.features = []
        self.tokens.append(sampled.id)
        self.sampler.append(sampled.id)
        reason: EndReason | None = None
        if is_end and not work.ignore_end_of_text:
            tokens.text, reason = self.text.finish(), "end_of_text"
        else:
            tokens.ids, tokens.logprobs = [sampled.id], [sampled.logprob]
            if work.top_logprobs:
                tokens.top = [sampled.top]
            tokens.text = self.text.push(piece)
            if self.text.stopped_by is None and (is_full or self.n_generated >= work.max_new_tokens):
                # What was held back may hold a stop string that ends in a cut character.
                tokens.text += self.text.finish()
                reason = "length"
            if self.text.stopped_by is not None:
                reason = "stop"
        events: list[Event] = [tokens] if tokens.ids or tokens.text or tokens.features else []
        if reason is not None:
            events.append(self._end(reason))
        return events

    def take_features(self) -> list[Event]:
        """Delivers the features of a piece of the prompt."""
        if not self.features:
            return []
        tokens = GeneratedTokens(features=self.features, sample=self.sample, unedited=self.unedited)
        self.features = []
        return [tokens]

    def _end(self, reason: EndReason) -> GenerationEnd:
        request = self.request
        return GenerationEnd(
            reason=reason,
            prompt_tokens=len(request.work.prompt),
            generated_tokens=self.n_generated,
            stop=self.text.stopped_by or "",
            timing=WorkTiming(request.queue_s or 0.0, request.compute_s),
            sample=self.sample,
            unedited=self.unedited,
        )
