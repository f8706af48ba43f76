"""Runs generation step by step on the calling thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.model.backbone import Backbone
from service.engine.generation import RunningBatch, StepOutcome
from service.engine.observer import FeatureObserver
from service.engine.sequence import Event, GenerateRequest
from service.engine.settings import EngineSettings
from service.engine.work import GeneratedTokens, GenerateWork, GenerationEnd


class Runner:
    """Joins requests, steps, and collects what each delivers."""

    def __init__(
        self,
        backbone: Backbone,
        dictionaries: Mapping[str, Dictionary],
        *works: GenerateWork,
        clock: Callable[[], float] = lambda: 0.0,
        observe: FeatureObserver | None = None,
        **settings: int,
    ) -> None:
        made = EngineSettings(**settings)
        longest = min(backbone.context_length, made.max_cache_tokens)
        self.running = RunningBatch(backbone, dictionaries, made, longest, clock, observe)
        self.waiting: deque[GenerateRequest] = deque()
        self.requests: list[GenerateRequest] = []
        self.events: dict[GenerateRequest, list[Event]] = {}
        for work in works:
            self.join(work)

    def join(self, work: GenerateWork) -> GenerateRequest:
        """Queues a request."""
        request = GenerateRequest(work, lambda event: None, len(self.requests))
        self.requests.append(request)
        self.events[request] = []
        self.waiting.append(request)
        return request

    def step(self) -> StepOutcome:
        with torch.inference_mode():
            outcome = self.running.step(lambda: self.waiting.popleft() if self.waiting else None)
        for request, event in outcome.events:
            self.events[request].append(event)
        return outcome

    @property
    def done(self) -> bool:
        return not (self.waiting or self.running.n_active or self.running.n_waiting)

    def run(self) -> Runner:
        while not self.done:
            self.step()
        return self

    def tokens(self, i: int, sample: int = 0, *, unedited: bool = False) -> GeneratedTokens:
        """All that a sequence of request i delivered, as one."""
        whole = GeneratedTokens(sample=sample, unedited=unedited)
        for event in self.events[self.requests[i]]:
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
        return [event for event in self.events[self.requests[i]] if isinstance(event, GenerationEnd)]

    def end(self, i: int) -> GenerationEnd:
        """Of a request with one sequence: the last event."""
        end = self.events[self.requests[i]][-1]
        assert isinstance(end, GenerationEnd)
        return end
