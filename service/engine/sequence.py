"""A Generate request and its sequences: from the prompt to streamed text. On the model thread, but for `Mailbox`."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import Callable, Mapping, Sequence

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import RowEdits
from sae_runtime.model.backbone import Backbone
from service.engine.sampling import RowSampler, SampledToken
from service.engine.work import EndReason, GeneratedTokens, GenerateWork, GenerationEnd, TokenFeatures, WorkTiming

RESERVATION_STEP = 64
"""Reservations are multiples of this: rows at equal distances in the cache share an attention call."""

Event = GeneratedTokens | GenerationEnd | Exception
"""What a request delivers: tokens of its sequences, one end a sequence, or one error."""


class GenerateRequest:
    """One Generate request. Only `cancelled` is written by the event loop."""

    def __init__(self, work: GenerateWork, deliver: Callable[[Event], None], number: int = 0) -> None:
        self.work = work
        self.number = number
        """Identifies the request to observers of the engine."""
        self.deliver = deliver
        """Takes the events of this request, on the event loop."""
        self.cancelled = False
        self.arrival = time.monotonic()
        self.queue_s: float | None = None
        """Seconds from arrival to the first step; None before it."""
        self.compute_s = 0.0
        self.sequences: list[GeneratedSequence] = []
        for unedited in (True, False) if work.compare else (False,):
            first = GeneratedSequence(self, 0, unedited)
            self.sequences += [first, *(GeneratedSequence(self, i, unedited) for i in range(1, work.samples))]
            first.followers = self.sequences[-work.samples + 1 :] if work.samples > 1 else []

    def prepare_edits(self, dictionaries: Mapping[str, Dictionary], backbone: Backbone) -> None:
        """Prepares the edits of all sequences but the unedited ones."""
        edits = self.work.edits
        if not edits:
            return
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
    """One sequence: the prompt and the tokens sampled after it."""

    def __init__(self, request: GenerateRequest, sample: int, unedited: bool) -> None:
        work = request.work
        self.request = request
        self.sample = sample
        self.unedited = unedited
        self.edits: RowEdits | None = None
        """See GenerateRequest.prepare_edits."""
        self.slot = -1
        self.tokens = list(work.prompt)
        """The prompt, then the sampled tokens."""
        self.past = 0
        """How many of `tokens` are in the cache."""
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

    def append(self, sampled: SampledToken, piece: bytes, *, is_end: bool, is_full: bool) -> list[Event]:
        """Appends the next token and returns the events to deliver.

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
                # The text held back may contain a stop string that ends in a cut character.
                tokens.text += self.text.finish()
                reason = "length"
            if self.text.stopped_by is not None:
                reason = "stop"
        events: list[Event] = [tokens] if tokens.ids or tokens.text or tokens.features else []
        if reason is not None:
            events.append(self._end(reason))
        return events

    def pop_features(self) -> list[Event]:
        """Takes the features that are not delivered yet, as an event without tokens."""
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


class Mailbox:
    """Events of one Generate request, on one event loop. A slow reader gets all waiting tokens of a sequence as one."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._filled = asyncio.Event()

    def deliver(self, event: Event) -> None:
        self._events.append(event)
        self._filled.set()

    async def pop(self) -> list[Event]:
        """Waits for events and takes all; tokens that follow one another in a sequence are one event."""
        await self._filled.wait()
        self._filled.clear()
        events, self._events = self._events, []
        if len(events) == 1:
            return events
        joined: list[Event] = []
        last: dict[tuple[int, bool], GeneratedTokens] = {}
        for event in events:
            if isinstance(event, GeneratedTokens):
                earlier = last.get((event.sample, event.unedited))
                if earlier is None:
                    last[event.sample, event.unedited] = event
                    joined.append(event)
                else:
                    earlier.extend(event)
            else:
                joined.append(event)
        return joined


class TextStream:
    """Turns the bytes of one sequence's tokens into text, up to a stop string.

    What comes out does not depend on where the tokens are cut: the stream stops at the first character that completes a
    stop string (the longest of them, if several end there). Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Longest first, so that the longest wins where several end at the same character.
        self._matchers = [_Matcher(text) for text in sorted(stop, key=len, reverse=True)]
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def push(self, token: bytes) -> str:
        """Takes the next token's bytes and returns the text that is certain now; empty after a stop string."""
        return self._release(self._decoder.decode(token))

    def finish(self) -> str:
        """Ends the sequence and returns the text held back. A character that was cut becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._matchers:
            return text
        self._held += text
        for i, char in enumerate(text, start=len(self._held) - len(text) + 1):
            for matcher in self._matchers:
                if matcher.push(char):
                    self.stopped_by = matcher.pattern
                    certain, self._held = self._held[: i - len(matcher.pattern)], ""
                    return certain
        undecided = max(matcher.matched for matcher in self._matchers)
        certain = self._held[: len(self._held) - undecided]
        self._held = self._held[len(certain) :]
        return certain


class _Matcher:
    """Knuth-Morris-Pratt: how much of the pattern's start the text seen so far ends with."""

    def __init__(self, pattern: str) -> None:
        if not pattern:
            raise ValueError("a stop string is empty")
        self.pattern = pattern
        self.matched = 0
        # fallback[n]: length of the longest proper start of pattern[:n] that is also its end.
        self._fallback = [0, 0]
        for n in range(1, len(pattern)):
            length = self._fallback[n]
            while length and pattern[n] != pattern[length]:
                length = self._fallback[length]
            self._fallback.append(length + 1 if pattern[n] == pattern[length] else 0)

    def push(self, char: str) -> bool:
        """Takes one character; true when it completes the pattern."""
        while self.matched and self.pattern[self.matched] != char:
            self.matched = self._fallback[self.matched]
        if self.pattern[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.pattern)
