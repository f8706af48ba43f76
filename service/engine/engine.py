"""The engine of a replica: takes work on the event loop, runs it on the model thread, hands the results back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sae_runtime.dictionary.dictionary import Dictionary, find_dictionary
from sae_runtime.dictionary.readings import Readings
from sae_runtime.edits import Edit
from sae_runtime.model.backbone import Backbone
from service.engine.admission import check_features, check_generation, check_rows
from service.engine.batch import Capture, Decoding, Encoded, Encoding, Extraction, run_batch
from service.engine.errors import DeviceLost, EngineStopped
from service.engine.failures import run_isolated
from service.engine.generation import RunningBatch, StepOutcome
from service.engine.lanes import LaneReadings, Lanes, extract_in_lanes, new_lanes
from service.engine.measure import Measurements
from service.engine.measure_work import (
    AblateResult,
    AblateWork,
    AttributeResult,
    AttributeWork,
    ContrastResult,
    ContrastWork,
    ScoreResult,
    ScoreWork,
)
from service.engine.observer import EngineObserver, observe_pieces
from service.engine.scheduler import Piece, Scheduler, Turn, Work
from service.engine.selection import join_arrays, join_rows
from service.engine.sequence import GenerateRequest, Mailbox
from service.engine.settings import EngineSettings
from service.engine.work import (
    ActivationsResult,
    ActivationsWork,
    DecodeResult,
    DecodeWork,
    DictionaryRows,
    EncodeResult,
    EncodeWork,
    EngineSnapshot,
    ExtractResult,
    ExtractWork,
    GeneratedTokens,
    GenerateWork,
    GenerationEnd,
    WorkTiming,
)

GIL_SWITCH_S = 0.0005
"""Longest time a busy event loop keeps the model thread waiting (see `Engine.start`)."""


@dataclass(slots=True, eq=False)
class _AwaitedWork(Work):
    """A work and the future that gets its results."""

    future: asyncio.Future[tuple[list[Any], WorkTiming]] = field(kw_only=True)
    arrival: float = field(kw_only=True)
    results: list[Any] = field(default_factory=list, init=False)
    """One a piece, in order."""
    queue_s: float = field(default=0.0, init=False)
    compute_s: float = field(default=0.0, init=False)


@dataclass(frozen=True, slots=True)
class _BatchOutcome:
    kind: str
    pieces: list[Piece]
    results: list[Any]
    """One result or exception a piece."""
    begin: float
    seconds: float


class Engine:
    """Runs work on one backbone and its dictionaries. All methods are called on one event loop.

    Each kind of work raises, before it runs: EngineStopped, QueueFull, UnknownDictionary, ValueError (work that cannot
    run); and after it ran: NonFiniteActivations, or whatever its computation raised. One request's failure never
    reaches another. Cancelling the awaiting task takes queued work out of the queue.
    """

    def __init__(
        self,
        backbone: Backbone,
        dictionaries: Mapping[str, Dictionary],
        settings: EngineSettings,
        observer: EngineObserver | None = None,
    ) -> None:
        """Raises ValueError for a dictionary whose site the backbone lacks or has with another width."""
        self.backbone = backbone
        self.dictionaries = dict(dictionaries)
        self.settings = settings
        self._observer = observer
        self._observe = None if observer is None else observer.features
        self._numbers = itertools.count()
        for dictionary in self.dictionaries.values():
            if dictionary.site is not None:
                dictionary.site_in(backbone)
        self.max_sequence_tokens = min(
            settings.max_sequence_tokens or sys.maxsize, settings.max_cache_tokens, backbone.context_length
        )
        """Prompt and new tokens of one generation together; a prompt must be shorter."""
        if backbone.device.type != "cpu":
            settings = settings.model_copy(update={"split_batch_tokens": 0})
        self._scheduler: Scheduler[GenerateRequest] = Scheduler(settings)
        self._running = RunningBatch(
            backbone, self.dictionaries, settings, self.max_sequence_tokens, observe=self._observe
        )
        self._measurements = Measurements(backbone, self.dictionaries, settings, self._run, self.extract)
        self._lanes: Lanes | None = None
        self._works: set[_AwaitedWork] = set()
        self._generating: set[GenerateRequest] = set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting = False
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Starts the model thread. An engine starts once.

        Python lets a thread that is computing keep the interpreter for 5 ms, and the model thread gives it up and needs
        it back around every operation of the backbone. So the process's switch interval is lowered.
        """
        if self._thread is not None:
            raise EngineStopped("the engine was started before")
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(min(sys.getswitchinterval(), GIL_SWITCH_S))
        self._thread = threading.Thread(target=self._model_thread, name="model", daemon=True)
        self._thread.start()
        self._accepting = True
        self._idle.set()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new work, waits up to `drain_s` for accepted work, and fails the rest with EngineStopped."""
        self._accepting = False
        if self._thread is None:
            return
        if drain_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain_s)
        self._scheduler.close()
        await asyncio.to_thread(self._thread.join)
        self._fail_everything(EngineStopped("the engine has stopped"))

    @property
    def ready(self) -> bool:
        """Whether work is accepted: started, not draining, and the model thread alive."""
        return self._accepting and self._thread is not None and self._thread.is_alive()

    def check_fits(self, work: GenerateWork) -> None:
        """ValueError, naming the setting, for work that does not fit the slots or the key-value cache."""
        self._running.check_fits(work)

    def snapshot(self) -> EngineSnapshot:
        """What waits and runs now."""
        return EngineSnapshot(
            queued_items=self._scheduler.queued_works + self._scheduler.queued_generations + self._running.n_waiting,
            queued_tokens=self._scheduler.queued_tokens,
            active_generations=self._running.n_active,
            cache_tokens=self._running.reserved_tokens,
        )

    async def extract(self, work: ExtractWork, *, under_way: bool = False) -> ExtractResult:
        """The features of token rows in one or more dictionaries, from one forward pass.

        `under_way`: for a later round of a request that was admitted before.
        """
        check_rows(work.rows, self.backbone)
        dictionaries = []
        for name in work.dictionaries:
            dictionary = find_dictionary(name, self.dictionaries)
            if work.selection.kind == "features":
                dictionary.check_latents(work.selection.features)
            dictionaries.append((name, dictionary, dictionary.site_in(self.backbone)))
        if not dictionaries:
            raise ValueError("there are no dictionaries to extract from")
        # Rows share a batch if the forward pass stops at the same block for all of them.
        kind = ("extract", max(site for _, _, site in dictionaries).layer)
        rows = Extraction(work.rows, dictionaries, work.selection, work.aggregation, work.reconstruction_error)
        results: list[list[list[DictionaryRows]]]
        results, timing = await self._run(kind, rows, list(map(len, work.rows)), under_way=under_way)
        return ExtractResult(list(chain.from_iterable(results)), timing)

    async def activations(self, work: ActivationsWork) -> ActivationsResult:
        """The backbone's activations on token rows, at one or more sites, from one forward pass."""
        check_rows(work.rows, self.backbone)
        sites = [self.backbone.check_site(site) for site in work.sites]
        if not sites:
            raise ValueError("there are no sites to read")
        kind = ("activations", max(sites).layer)
        results: list[list[list[NDArray[np.float32]]]]
        results, timing = await self._run(kind, Capture(work.rows, sites), list(map(len, work.rows)))
        return ActivationsResult(list(chain.from_iterable(results)), timing)

    async def encode(self, work: EncodeWork) -> EncodeResult:
        """The features of given activations."""
        dictionary = find_dictionary(work.dictionary, self.dictionaries)
        if work.x.ndim != 2 or work.x.shape[0] < 1 or work.x.shape[1] != dictionary.d_in:
            raise ValueError(f"activations have shape {list(work.x.shape)}, expected [n, {dictionary.d_in}], n >= 1")
        if work.selection.kind == "features":
            dictionary.check_latents(work.selection.features)
        rows = Encoding(dictionary, work.x, work.selection)
        results: list[Encoded]
        results, timing = await self._run(("encode", dictionary), rows, [1] * len(work.x))
        return EncodeResult(
            join_rows([piece.features for piece in results]),
            join_arrays([piece.mean for piece in results]),
            join_arrays([piece.std for piece in results]),
            timing,
        )

    async def decode(self, work: DecodeWork) -> DecodeResult:
        """Reconstructions from given features."""
        dictionary = find_dictionary(work.dictionary, self.dictionaries)
        check_features(work, dictionary)
        rows = Decoding(dictionary, work.features, work.mean, work.std)
        results, timing = await self._run(("decode", dictionary), rows, [1] * len(work.features))
        x = join_arrays(results)
        assert x is not None
        return DecodeResult(x, timing)

    async def generate(self, work: GenerateWork) -> AsyncIterator[GeneratedTokens | GenerationEnd]:
        """Streams the tokens of all sequences as they are sampled, and exactly one GenerationEnd a sequence.

        Work is queued when the iteration begins. Closing the iterator, or cancelling the task that awaits it, frees the
        slots before the next step. Besides the errors of the class: EditConflict and InvalidEdit (ValueErrors). A
        sequence that fails ends all of its request's.
        """
        self._check_accepting()
        check_generation(work, self.backbone, self.dictionaries, self.max_sequence_tokens)
        self._running.check_fits(work)
        mailbox = Mailbox()
        request = GenerateRequest(work, mailbox.deliver, next(self._numbers))
        free_slots = self.settings.max_concurrent_generations - self._running.n_active
        self._scheduler.put_generation(
            request, len(work.prompt), 0 if self._running.n_waiting else free_slots // work.n_sequences
        )
        self._generating.add(request)
        self._idle.clear()
        running = work.n_sequences
        try:
            while running:
                for event in await mailbox.pop():
                    if isinstance(event, Exception):
                        raise event
                    running -= isinstance(event, GenerationEnd)
                    yield event
        finally:
            request.cancelled = True
            self._scheduler.discard_generation(request)
            self._generating.discard(request)
            self._note_idle()

    async def resolve_references(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """The edits as `score` and `generate` take them: every "resample" made a "set"; references are token ids."""
        return await self._measurements.resolve_references(edits)

    async def score(self, work: ScoreWork) -> ScoreResult:
        """Teacher-forced scores of rows, unedited and edited."""
        return await self._measurements.score(work)

    async def ablate(self, work: AblateWork) -> AblateResult:
        """What taking features away, one at a time, does to the predictions on rows."""
        return await self._measurements.ablate(work)

    async def attribute(self, work: AttributeWork) -> AttributeResult:
        """Which features on which tokens drive a logit."""
        return await self._measurements.attribute(work)

    async def contrast(self, work: ContrastWork) -> ContrastResult:
        """Which features tell two sets of rows apart, and an edit made of them."""
        return await self._measurements.contrast(work)

    # Admission

    def _check_accepting(self) -> None:
        if not self.ready:
            raise EngineStopped("the engine is not running")

    # Event loop

    async def _run(
        self, kind: tuple[str, Hashable], content: Any, sizes: Sequence[int], *, under_way: bool = False
    ) -> tuple[list[Any], WorkTiming]:
        """Queues the rows of one request and waits for their results, one a piece, in order.

        Args: as the fields of Work. `under_way`: a later round of a request that was admitted before.
        """
        self._check_accepting()
        assert self._loop is not None
        future = self._loop.create_future()
        work = _AwaitedWork(kind, content, sizes, future=future, arrival=time.monotonic(), number=next(self._numbers))
        self._scheduler.put(work, under_way=under_way)
        self._works.add(work)
        self._idle.clear()
        try:
            return await work.future
        finally:
            self._works.discard(work)
            self._scheduler.discard(work)
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._works and not self._generating:
            self._idle.set()

    def _deliver_batch(self, outcome: _BatchOutcome) -> None:
        """Hands the results of a batch to the works that wait for them."""
        waits = []
        for piece, result in zip(outcome.pieces, outcome.results, strict=True):
            work = piece.work
            assert isinstance(work, _AwaitedWork)
            waited = outcome.begin - work.arrival
            if piece.rows.start == 0:
                waits.append(waited)
            work.queue_s = max(work.queue_s, waited)
            work.compute_s += outcome.seconds
            work.results.append(result)
            if work.future.done():
                continue
            if isinstance(result, Exception):
                work.future.set_exception(result)
            elif piece.rows.stop == len(work.sizes):
                work.future.set_result((work.results, WorkTiming(work.queue_s, work.compute_s)))
        if self._observer is not None:
            tokens = sum(piece.tokens for piece in outcome.pieces)
            self._observer.batch_done(outcome.kind, len(outcome.pieces), tokens, outcome.seconds)
            for seconds in waits:
                self._observer.waited(outcome.kind, seconds)

    def _deliver_step(self, outcome: StepOutcome) -> None:
        """Hands the events of a generation step to their streams."""
        for request, event in outcome.events:
            request.deliver(event)
        if self._observer is not None and outcome.n_rows:
            self._observer.batch_done("generate", outcome.n_rows, outcome.n_tokens, outcome.seconds)
            for request in outcome.started:
                self._observer.waited("generate", request.queue_s or 0.0)

    def _fail_everything(self, error: Exception) -> None:
        self._accepting = False
        for work in self._works:
            if not work.future.done():
                work.future.set_exception(error)
        for generating in self._generating:
            generating.deliver(error)

    # Model thread

    def _model_thread(self) -> None:
        try:
            if self.settings.torch_threads:
                torch.set_num_threads(self.settings.torch_threads)
            self._lanes = new_lanes(self.backbone.device, self.settings.batch_lanes)
            with torch.inference_mode():
                while (turn := self._scheduler.next_turn(lambda: self._running.n_active > 0)) is not Turn.STOP:
                    if turn is Turn.GENERATION:
                        self._call_soon(self._deliver_step, self._running.step(self._scheduler.pop_generation))
                    else:
                        self._call_soon(self._deliver_batch, self._run_batch(turn))
        except BaseException as error:
            # The device is lost, or the engine itself has a defect: nobody must wait for an answer that never comes.
            self._scheduler.close()
            is_lost = isinstance(error, DeviceLost)
            failure = DeviceLost(str(error)) if is_lost else EngineStopped(f"the model thread failed: {error!r}")
            self._call_soon(self._fail_everything, failure)
            raise
        finally:
            if self._lanes is not None:
                self._lanes.close()

    def _call_soon(self, callback: Callable[[Any], None], argument: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _run_batch(self, pieces: list[Piece]) -> _BatchOutcome:
        begin = time.monotonic()
        kind = pieces[0].work.kind[0]
        results = run_isolated(partial(self._run_pieces, kind), pieces)
        seconds = time.monotonic() - begin
        self._scheduler.batch_finished(pieces, seconds)
        return _BatchOutcome(kind, pieces, results, begin, seconds)

    def _run_pieces(self, kind: str, pieces: Sequence[Piece]) -> list[Any]:
        """Runs pieces of one kind and returns one result a piece. Errors as `run_batch`."""
        contents = [piece.content for piece in pieces]
        if kind == "extract":
            results, read = extract_in_lanes(self.backbone, contents, self._lanes)
        else:
            readings = Readings()
            results = run_batch(self.backbone, kind, contents, readings)
            read = [LaneReadings(readings)]
        if self._observe is not None:
            observe_pieces(self._observe, kind, pieces, read)
        return results
