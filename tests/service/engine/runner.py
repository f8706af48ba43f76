"""Runs generation step by step on the calling thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.model.backbone import Backbone
from service.engine.continuation import Continuation, Event
from service.engine.generation import Generation, StepOutcome
from service.engine.settings import EngineSettings
from service.engine.work import GeneratedTokens, GenerateWork, GenerationEnd


class Runner:
    """Joins requests, steps, and collects what each delivers."""

    def __init__(
        self, backbone: Backbone, dictionaries: Mapping[str, Dictionary], *works: GenerateWork, **settings: int
    ) -> None:
        made = EngineSettings(**settings)
        longest = min(backbone.context_length, made.max_cache_tokens)
        self.generation = Generation(backbone, dictionaries, made, longest)
        self.waiting: deque[Continuation] = deque()
        self.continuations: list[Continuation] = []
        self.events: dict[Continuation, list[Event]] = {}
        for work in works:
            self.join(work)

    def join(self, work: GenerateWork) -> Continuation:
        """Queues a request."""
        continuation = Continuation(work, lambda event: None)
        self.continuations.append(continuation)
        self.events[continuation] = []
        self.waiting.append(continuation)
        return continuation

    def step(self) -> StepOutcome:
        with torch.inference_mode():
            outcome = self.generation.step(lambda: self.waiting.popleft() if self.waiting else None)
        for continuation, event in outcome.events:
            self.events[continuation].append(event)
        return outcome

    @property
    def done(self) -> bool:
        return not (self.waiting or self.generation.n_active or self.generation.n_waiting)

    def run(self) -> Runner:
        while not self.done:
            self.step()
        return self

    def tokens(self, i: int, sample: int = 0, *, unedited: bool = False) -> GeneratedTokens:
        """All that a sequence of request i delivered, as one."""
        whole = GeneratedTokens(sample=sample, unedited=unedited)
        for event in self.events[self.continuations[i]]:
            if isinstance(event, GeneratedTokens) and (event.sample, event.unedited) == (sample, unedited):
                whole.extend(event)
        return whole

    def ids(self, i: int) -> list[int]:
        return self.tokens(i).ids

    def logprobs(self, i: int) -> list[float]:
        return self.tokens(i).logprobs

    def text(self, i: int) -> str:
        return self.tokens(i).text

    def ends(self, i: int) -> list[GenerationEnd]:
        return [event for event in self.events[self.continuations[i]] if isinstance(event, GenerationEnd)]

    def end(self, i: int) -> GenerationEnd:
        """Of a request with one sequence: the last event."""
        end = self.events[self.continuations[i]][-1]
        assert isinstance(end, GenerationEnd)
        return end
