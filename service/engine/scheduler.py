"""Chooses what runs next: a bounded queue, cut into batches of a token budget, in fair turns with generation."""

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
"""A batch looks for works of a similar length in this many batches' worth of tokens behind the oldest work."""

Generation = TypeVar("Generation", bound=Hashable)


@dataclass(slots=True, eq=False)
class Work:
    """The rows of one request. They leave the queue in order, in one batch or in several."""

    kind: tuple[str, Hashable]
    """What runs the work, and what else must agree. Works of equal kind can share a batch."""
    content: Any
    """What the batch needs, one entry a row. A slice of it is a piece of the work."""
    sizes: Sequence[int]
    """Tokens by row, which count against the budget. At least one row."""
    number: int = field(default=0, kw_only=True)
    """Identifies the request to observers of the engine."""
    n_taken: int = field(default=0, init=False)
    """Rows that have left the queue."""
    tokens: int = field(init=False)
    """Tokens of the rows that wait."""
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
        """The rows as the batch needs them."""
        return self.work.content[self.rows]


class Turn(Enum):
    """Whose turn it is on the model thread, if not a batch's."""

    GENERATION = auto()
    STOP = auto()


class Scheduler(Generic[Generation]):
    """Queue between the event loop (`put`, `discard`) and the model thread (`next_turn`, `batch_finished`).

    The oldest work always runs in the next batch, with as many of its rows as fit the budget. Works of its kind fill
    the rest, those nearest to it in length first. So a work waits at most until the works before it are done.

    An idle device starts at once. Only after a batch of several requests may the next batch wait for more works
    (`batch_window_ms`). A long queue runs as two batches (`split_batch_tokens`): the replies to one are made while the
    other computes.

    Generations wait in arrival order. While any generates, a batch runs after every few generation steps
    (`generation_steps_per_batch`), and it is smaller (`shared_batch_tokens`), so that streams go on. With 4 steps:

        turns   step step step step batch step step step step batch ...
    """

    def __init__(self, settings: EngineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._changed = Condition()
        # Ordered dictionaries as queues: cancelled work leaves at once, wherever it stands in the queue.
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
        """Queues a work. `under_way`: a later round of a request that was admitted before. It always fits.

        Raises:
            QueueFull: the queue is too full for this work.
            EngineStopped: the queue is closed.
        """
        with self._changed:
            self._admit(work.tokens, under_way)
            self._works[work] = None
            self._work_tokens += work.tokens
            self._changed.notify()

    def put_generation(self, generation: Generation, prompt_tokens: int, free_slots: int) -> None:
        """Queues a generation. The first `free_slots` generations in the queue do not count as waiting.

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
        """Takes the rows of a work that still wait out of the queue."""
        with self._changed:
            if work in self._works:
                del self._works[work]
                self._work_tokens -= work.tokens

    def discard_generation(self, generation: Generation) -> None:
        """Takes a generation out of the queue. If it runs already, the model thread wakes and frees its slots."""
        with self._changed:
            self._prompt_tokens -= self._generations.pop(generation, 0)
            self._changed.notify()

    def next_turn(self, generating: Callable[[], bool]) -> list[Piece] | Turn:
        """Waits until there is something to run and takes it. `generating`: whether a generation holds a slot.

        waiting works   generations    turn
        yes             none           a batch, once the window for more works is over
        yes             yes            a generation step, or a small batch after enough steps
        none            yes            a generation step
        none            none           waits
        """
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
        """Notes size and time of the last batch, for the window and for the estimate in QueueFull."""
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
        """Token budget of the next batch when nothing generates: half of a long queue, else max_batch_tokens."""
        split, waiting = self._settings.split_batch_tokens, self._work_tokens
        # A queue about as long as the last batch is the other half of a split, and is not split again.
        if split and waiting >= max(2 * split, 1.5 * self._last_batch_tokens):
            return waiting // 2
        return self._settings.max_batch_tokens

    def _pop_batch(self, budget: int) -> list[Piece]:
        """Packs the next batch: the oldest work's rows, then rows of similar works until the next row does not fit.

        budget 12; row sizes of the works, oldest first: [4, 3], [9], [3, 2, 5]
        batch  4 3 | 3 2    the third work is nearer in length than the second; its last row waits
        """
        self._generation_steps = 0
        budget = min(budget, self._settings.max_batch_tokens)
        oldest = next(iter(self._works))
        batch = [self._cut(oldest, budget)]
        left = budget - batch[0].tokens
        for work in self._similar_works(oldest, budget):
            if work.sizes[work.n_taken] > left:
                break
            batch.append(self._cut(work, left))
            left -= batch[-1].tokens
        return batch

    def _similar_works(self, oldest: Work, budget: int) -> list[Work]:
        """Other works of the oldest one's kind, nearest in length first. Among equals the older work comes first."""
        works, tokens = [], 0
        for work in self._works:
            if work is not oldest and work.kind == oldest.kind:
                works.append(work)
                tokens += work.tokens
                if tokens >= LOOK_AHEAD_BATCHES * budget:
                    break
        return sorted(works, key=lambda work: abs(work.longest - oldest.longest))

    def _cut(self, work: Work, budget: int) -> Piece:
        """Cuts a piece off a work. A work without rows left leaves the queue."""
        piece = work.cut(budget)
        self._work_tokens -= piece.tokens
        if not work.tokens:
            del self._works[work]
        return piece
