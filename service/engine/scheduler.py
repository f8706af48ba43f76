"""What runs next: a bounded queue, cut into batches of a token budget, in fair turns with generation."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Condition
from typing import Any, Generic, TypeVar

from service.engine.errors import EngineStopped, QueueFull
from service.engine.settings import EngineSettings

LOOK_AHEAD_BATCHES = 4
"""How many batches' worth of tokens behind the oldest work are looked at for works of a similar length."""

Generation = TypeVar("Generation", bound=Hashable)


@dataclass(slots=True, eq=False)
class Work:
    """The rows of one request. They leave the queue in order, in one batch or in several."""

    kind: tuple[str, Hashable]
    """Works of the same kind can share a batch: what runs them, and what else must agree."""
    content: Any
    """What the batch needs, a row an entry: slices of it are pieces of the work."""
    sizes: Sequence[int]
    """Tokens of each row, which count against the budget. At least one row."""
    n_taken: int = field(default=0, init=False)
    """Rows that have left the queue."""
    tokens: int = field(init=False)
    """Of the rows that wait."""
    longest: int = field(init=False)
    """Tokens of the longest row. Works of similar lengths run together, since attention pads."""

    def __post_init__(self) -> None:
        self.tokens, self.longest = sum(self.sizes), max(self.sizes)

    def cut(self, budget: int) -> Piece:
        """Takes the next rows of at most `budget` tokens together, but at least one row."""
        start, tokens = self.n_taken, 0
        while self.n_taken < len(self.sizes):
            size = self.sizes[self.n_taken]
            if self.n_taken > start and tokens + size > budget:
                break
            tokens += size
            self.n_taken += 1
        self.tokens -= tokens
        return Piece(self, slice(start, self.n_taken), tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Consecutive rows of a work that run in one batch."""

    work: Work
    rows: slice
    tokens: int

    @property
    def content(self) -> Any:
        """What the batch needs of the work."""
        return self.work.content[self.rows]


class Turn(Enum):
    """Whose turn it is on the model thread, if not a batch's."""

    GENERATION = auto()
    STOP = auto()


class Scheduler(Generic[Generation]):
    """Queue between the event loop (`put`, `discard`) and the model thread (`next_turn`, `batch_finished`).

    The oldest work always runs in the next batch, as many of its rows as fit the budget. Works of its kind that are
    nearest to it in length fill what is left. So a work waits at most until those before it are done.

    An idle device starts at once. Only after a batch of several requests may the next one wait for company
    (`batch_window_ms`). Much that waits runs as two batches (`split_batch_tokens`): the replies to one are made while
    the other computes.

    Generations wait in arrival order. Their turns alternate with batches (`generation_steps_per_batch`), which are
    smaller then (`shared_batch_tokens`), so that streams go on.
    """

    def __init__(self, settings: EngineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._changed = Condition()
        # Ordered dictionaries as queues: what is cancelled leaves at once, wherever it stands.
        self._works: OrderedDict[Work, None] = OrderedDict()
        self._work_tokens = 0
        self._generations: OrderedDict[Generation, int] = OrderedDict()
        self._prompt_tokens = 0
        self._closed = False
        self._generation_steps = 0
        self._last_batch_works = 0
        self._last_batch_tokens = 0
        self._last_batch_end = 0.0
        self._tokens_per_s = 0.0

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait, prompts of waiting generations included."""
        return self._work_tokens + self._prompt_tokens

    @property
    def queued_generations(self) -> int:
        return len(self._generations)

    @property
    def queued_works(self) -> int:
        return len(self._works)

    def put(self, work: Work, *, under_way: bool = False) -> None:
        """Queues a work. One that is `under_way` always fits: it is a later round of a request that was admitted.

        Raises:
            QueueFull: it does not fit beside what waits.
            EngineStopped: the queue is closed.
        """
        with self._changed:
            self._admit(work.tokens, under_way)
            self._works[work] = None
            self._work_tokens += work.tokens
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

    def discard(self, work: Work) -> None:
        """Takes what still waits of a work out of the queue."""
        with self._changed:
            if work in self._works:
                del self._works[work]
                self._work_tokens -= work.tokens

    def discard_generation(self, generation: Generation) -> None:
        """Takes a generation out of the queue if it still waits there, and wakes the model thread if it does not."""
        with self._changed:
            self._prompt_tokens -= self._generations.pop(generation, 0)
            self._changed.notify()

    def next_turn(self, generating: Callable[[], bool]) -> list[Piece] | Turn:
        """Waits for work and takes it. `generating` tells whether any generation holds a slot."""
        with self._changed:
            while True:
                if self._closed:
                    return Turn.STOP
                generation = bool(self._generations) or generating()
                if self._works:
                    if not generation:
                        window = self._window()
                        if window <= 0:
                            return self._pop_batch(self._budget())
                        self._changed.wait(window)
                        continue
                    if self._generation_steps >= self._settings.generation_steps_per_batch:
                        return self._pop_batch(self._settings.shared_batch_tokens)
                if generation:
                    self._generation_steps += 1
                    return Turn.GENERATION
                self._changed.wait()

    def pop_generation(self) -> Generation | None:
        """Takes the generation that has waited longest."""
        with self._changed:
            if not self._generations:
                return None
            generation, tokens = self._generations.popitem(last=False)
            self._prompt_tokens -= tokens
            return generation

    def batch_finished(self, batch: Sequence[Piece], seconds: float) -> None:
        """Tells how the last batch went: the window and the estimate of QueueFull are based on it."""
        tokens = sum(piece.tokens for piece in batch)
        with self._changed:
            self._last_batch_works, self._last_batch_tokens = len(batch), tokens
            self._last_batch_end = self._clock()
            speed = tokens / max(seconds, 1e-6)
            self._tokens_per_s = 0.9 * self._tokens_per_s + 0.1 * speed if self._tokens_per_s else speed

    def close(self) -> None:
        """Empties the queue and ends the model thread's loop after its current turn."""
        with self._changed:
            self._closed = True
            self._works.clear()
            self._generations.clear()
            self._work_tokens = self._prompt_tokens = 0
            self._changed.notify()

    def _window(self) -> float:
        """Seconds to wait for more works before the next batch."""
        if self._last_batch_works < 2 or self._work_tokens >= self._last_batch_tokens:
            return 0.0
        return self._last_batch_end + self._settings.batch_window_ms / 1000 - self._clock()

    def _budget(self) -> int:
        """Tokens of the next batch, if nothing generates: half of what waits, or all if that would be too little."""
        split, waiting = self._settings.split_batch_tokens, self._work_tokens
        # About as much as the last batch had is the other half of what was split then, which is not split again.
        if split and waiting >= max(2 * split, 1.5 * self._last_batch_tokens):
            return waiting // 2
        return self._settings.max_batch_tokens

    def _pop_batch(self, budget: int) -> list[Piece]:
        self._generation_steps = 0
        budget = min(budget, self._settings.max_batch_tokens)
        oldest = next(iter(self._works))
        batch = [self._cut(oldest, budget)]
        left = budget - batch[0].tokens
        for work in self._company(oldest, budget):
            if work.sizes[work.n_taken] > left:
                break
            batch.append(self._cut(work, left))
            left -= batch[-1].tokens
        return batch

    def _company(self, oldest: Work, budget: int) -> list[Work]:
        """Works of the same kind, nearest in length first, older ones first among equals."""
        works, tokens = [], 0
        for work in self._works:
            if work is not oldest and work.kind == oldest.kind:
                works.append(work)
                tokens += work.tokens
                if tokens >= LOOK_AHEAD_BATCHES * budget:
                    break
        return sorted(works, key=lambda work: abs(work.longest - oldest.longest))

    def _cut(self, work: Work, budget: int) -> Piece:
        piece = work.cut(budget)
        self._work_tokens -= piece.tokens
        if not work.tokens:
            del self._works[work]
        return piece
