"""What runs next: a bounded queue, packed into batches of a token budget, in fair turns with generation."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from threading import Condition
from typing import Any, Generic, TypeVar

from service.engine.errors import EngineStopped, QueueFull
from service.engine.settings import EngineSettings

LOOK_AHEAD_BATCHES = 4
"""How many batches' worth of tokens behind the oldest part are looked at for parts of a similar length."""

Generation = TypeVar("Generation", bound=Hashable)


@dataclass(slots=True, eq=False)
class Part:
    """The smallest unit that is scheduled: a request, or a piece of one that is larger than a batch."""

    kind: tuple[str, Hashable]
    """Parts of the same kind can share a batch: the work's name, and what else must agree."""
    tokens: int
    """Its share of the budget."""
    length: int
    """Length of its longest row: parts of similar lengths run together, since attention pads."""
    payload: Any
    """What the execution needs."""


class Turn(Enum):
    """Whose turn it is on the model thread, if not a batch's."""

    GENERATION = auto()
    STOP = auto()


class Scheduler(Generic[Generation]):
    """Queue between the event loop (`put`, `discard`) and the model thread (`next_turn`, `batch_finished`).

    Order: the oldest part always runs in the next batch, together with queued parts of its kind that fit the budget,
    nearest in length first. So a part waits at most for as many batches as there were parts before it. A device that is
    idle starts at once; only after a batch of several requests may the next one wait for company (`batch_window_ms`).
    Much that waits runs as two batches (`split_batch_tokens`): the replies to one are made while the other computes.
    Generations wait in arrival order; their turns alternate with batches (`generation_steps_per_batch`), which are
    smaller then (`shared_batch_tokens`), so that streams go on.
    """

    def __init__(self, settings: EngineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._changed = Condition()
        # Ordered dictionaries as queues: what is cancelled leaves at once, wherever it stands.
        self._parts: OrderedDict[Part, None] = OrderedDict()
        self._part_tokens = 0
        self._generations: OrderedDict[Generation, int] = OrderedDict()
        self._prompt_tokens = 0
        self._closed = False
        self._generation_steps = 0
        self._last_batch_parts = 0
        self._last_batch_tokens = 0
        self._last_batch_end = 0.0
        self._tokens_per_s = 0.0

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait, prompts of waiting generations included."""
        return self._part_tokens + self._prompt_tokens

    @property
    def queued_generations(self) -> int:
        return len(self._generations)

    @property
    def queued_parts(self) -> int:
        return len(self._parts)

    def put(self, parts: list[Part], *, under_way: bool = False) -> None:
        """Queues the parts of one request, all or none. Those of one that is `under_way` always fit: it runs in small
        rounds, the first of which was admitted.

        Raises:
            QueueFull: they do not fit beside what waits.
            EngineStopped: the queue is closed.
        """
        tokens = sum(part.tokens for part in parts)
        with self._changed:
            self._admit(tokens, under_way)
            for part in parts:
                self._parts[part] = None
            self._part_tokens += tokens
            self._changed.notify()

    def put_generation(self, generation: Generation, prompt_tokens: int, free_slots: int) -> None:
        """Queues a generation; the first `free_slots` of those that wait do not count as waiting.

        Raises:
            QueueFull, EngineStopped: as `put`.
        """
        with self._changed:
            self._admit(prompt_tokens)
            if len(self._generations) >= free_slots + self._settings.max_queued_generations:
                raise QueueFull(
                    f"{len(self._generations)} generations wait for a slot already",
                    limit_name="max_queued_generations",
                    retry_after_s=1.0,
                )
            self._generations[generation] = prompt_tokens
            self._prompt_tokens += prompt_tokens
            self._changed.notify()

    def _admit(self, tokens: int, under_way: bool = False) -> None:
        if self._closed:
            raise EngineStopped("the engine is stopping")
        queued = self.queued_tokens
        if queued and queued + tokens > self._settings.max_queued_tokens and not under_way:
            speed = self._tokens_per_s
            raise QueueFull(
                f"{queued} tokens wait already and {tokens} more would pass the limit of "
                f"{self._settings.max_queued_tokens} queued tokens",
                limit_name="max_queued_tokens",
                retry_after_s=min(max(queued / speed, 0.05), 30.0) if speed else 1.0,
            )

    def discard(self, parts: Iterable[Part]) -> None:
        """Takes the parts that still wait out of the queue."""
        with self._changed:
            for part in parts:
                if part in self._parts:
                    del self._parts[part]
                    self._part_tokens -= part.tokens

    def discard_generation(self, generation: Generation) -> None:
        """Takes a generation out of the queue if it still waits there, and wakes the model thread if it does not."""
        with self._changed:
            self._prompt_tokens -= self._generations.pop(generation, 0)
            self._changed.notify()

    def next_turn(self, generating: Callable[[], bool]) -> list[Part] | Turn:
        """Waits for work and takes it. `generating` tells whether any generation holds a slot."""
        with self._changed:
            while True:
                if self._closed:
                    return Turn.STOP
                generation = bool(self._generations) or generating()
                if self._parts:
                    if not generation:
                        window = self._window()
                        if window <= 0:
                            return self._take_batch(self._budget())
                        self._changed.wait(window)
                        continue
                    if self._generation_steps >= self._settings.generation_steps_per_batch:
                        return self._take_batch(self._settings.shared_batch_tokens)
                if generation:
                    self._generation_steps += 1
                    return Turn.GENERATION
                self._changed.wait()

    def next_generation(self) -> Generation | None:
        """Takes the generation that has waited longest."""
        with self._changed:
            if not self._generations:
                return None
            generation, tokens = self._generations.popitem(last=False)
            self._prompt_tokens -= tokens
            return generation

    def batch_finished(self, parts: list[Part], seconds: float) -> None:
        """Tells how the last batch went: the window and the estimate of QueueFull are based on it."""
        tokens = sum(part.tokens for part in parts)
        with self._changed:
            self._last_batch_parts, self._last_batch_tokens = len(parts), tokens
            self._last_batch_end = self._clock()
            speed = tokens / max(seconds, 1e-6)
            self._tokens_per_s = 0.9 * self._tokens_per_s + 0.1 * speed if self._tokens_per_s else speed

    def close(self) -> tuple[list[Part], list[Generation]]:
        """Ends the model thread's loop after its current turn and returns what still waited."""
        with self._changed:
            self._closed = True
            parts, generations = list(self._parts), list(self._generations)
            self._parts.clear()
            self._generations.clear()
            self._part_tokens = self._prompt_tokens = 0
            self._changed.notify()
            return parts, generations

    def _window(self) -> float:
        """Seconds to wait for more parts before the next batch."""
        if self._last_batch_parts < 2 or self._part_tokens >= self._last_batch_tokens:
            return 0.0
        return self._last_batch_end + self._settings.batch_window_ms / 1000 - self._clock()

    def _budget(self) -> int:
        """Tokens of the next batch, if nothing generates: half of what waits, or all if that would be too little."""
        split, waiting = self._settings.split_batch_tokens, self._part_tokens
        # About as much as the last batch had is the other half of what was split then, which is not split again.
        if split and waiting >= max(2 * split, 1.5 * self._last_batch_tokens):
            return waiting // 2
        return self._settings.max_batch_tokens

    def _take_batch(self, budget: int) -> list[Part]:
        self._generation_steps = 0
        budget = min(budget, self._settings.max_batch_tokens)
        oldest = next(iter(self._parts))
        near, near_tokens = [], 0
        for part in self._parts:
            if part.kind == oldest.kind and (part is oldest or part.tokens <= budget - oldest.tokens):
                near.append(part)
                near_tokens += part.tokens
                if near_tokens >= LOOK_AHEAD_BATCHES * budget:
                    break
        batch = near if near_tokens <= budget else _around(oldest, near, budget)
        for part in batch:
            del self._parts[part]
            self._part_tokens -= part.tokens
        return batch


def _around(oldest: Part, parts: list[Part], budget: int) -> list[Part]:
    """The oldest part and those nearest to it in length, older ones first among equals, within the budget."""
    batch, left = [oldest], budget - oldest.tokens
    others = (part for part in parts if part is not oldest)
    for part in sorted(others, key=lambda part: abs(part.length - oldest.length)):
        if part.tokens > left:
            break
        batch.append(part)
        left -= part.tokens
    return batch
