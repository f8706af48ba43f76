"""The engine of a replica: takes work on the event loop, runs it on the model thread, hands the results back."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sae_runtime.dictionary.dictionary import Dictionary, find_dictionary
from sae_runtime.edits import Edit
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from service.engine.admission import check_csr, check_row, check_row_edits, check_selection, split_rows
from service.engine.batch import (
    DecodePart,
    EncodePart,
    ExtractPart,
    run_decode,
    run_encode,
)
from service.engine.errors import EngineStopped
from service.engine.generation import RunningBatch, StepOutcome
from service.engine.lanes import Lanes, extract_in_lanes
from service.engine.measure import KINDS, Measurements, run_measurements
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
from service.engine.observer import EngineObserver
from service.engine.scheduler import Part, Scheduler, Turn
from service.engine.selection import join_arrays, join_rows
from service.engine.sequence import GenerateRequest, Mailbox
from service.engine.settings import EngineSettings
from service.engine.work import (
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

SMALL_BACKBONE_BYTES = 64 << 20
"""Generation steps of backbones with fewer bytes of weights run on few threads (see EngineSettings.decode_threads)."""
SMALL_BACKBONE_THREADS = 2
"""On two cores they were faster than one; more were never measured."""
GIL_SWITCH_S = 0.0005
"""Longest time a busy event loop keeps the model thread waiting (see `Engine.start`)."""


@dataclass(slots=True, eq=False)
class _Request:
    """One piece of work other than a generation: its parts and where its results go."""

    parts: list[Part]
    future: asyncio.Future[tuple[list[Any], WorkTiming]]
    arrival: float
    results: dict[Part, Any] = field(default_factory=dict)
    queue_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Payload:
    request: _Request
    work: Any


@dataclass(slots=True)
class _BatchOutcome:
    kind: str
    parts: list[Part]
    results: list[Any]
    """A result or an exception a part."""
    begin: float
    seconds: float


class Engine:
    """Runs work on one backbone and its dictionaries. All methods are called on one event loop.

    Each kind of work raises, before it runs: EngineStopped, QueueFull, UnknownDictionary, ValueError (work that cannot
    run); and after it ran: NonFiniteActivations, or whatever its own computation raised. One request's failure never
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
        self._sites = {name: d.site_in(backbone) for name, d in self.dictionaries.items() if d.site is not None}
        self._max_sequence_tokens = min(
            settings.max_sequence_tokens or sys.maxsize, settings.max_cache_tokens, backbone.context_length
        )
        if backbone.device.type != "cpu":
            settings = settings.model_copy(update={"split_batch_tokens": 0})
        self._scheduler: Scheduler[GenerateRequest] = Scheduler(settings)
        self._running = RunningBatch(backbone, self.dictionaries, settings, self._max_sequence_tokens)
        self._causal = Measurements(backbone, self.dictionaries, settings, self._run, self.extract)
        self._requests: set[_Request] = set()
        self._generating: set[GenerateRequest] = set()
        self._lanes: Lanes | None = None
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
        """Refuses new work, waits up to `drain_s` for what there is, and fails the rest with EngineStopped."""
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

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt and new tokens of one generation together; a prompt must be shorter."""
        return self._max_sequence_tokens

    def check_fits(self, work: GenerateWork) -> None:
        """ValueError, naming the setting, for work that does not fit the slots or the key-value cache."""
        self._running.check_fits(work)

    def snapshot(self) -> EngineSnapshot:
        """What waits and runs now."""
        return EngineSnapshot(
            queued_items=self._scheduler.queued_parts + self._scheduler.queued_generations + self._running.n_waiting,
            queued_tokens=self._scheduler.queued_tokens,
            active_generations=self._running.n_active,
            cache_tokens=self._running.reserved_tokens,
        )

    async def extract(self, work: ExtractWork, *, under_way: bool = False) -> ExtractResult:
        """The features of token rows in one or more dictionaries, from one forward pass.

        `under_way`: for a later round of a request that was admitted before.
        """
        dictionaries = [(name, self._dictionary(name), self._site(name)) for name in work.dictionaries]
        if not dictionaries or not work.rows:
            raise ValueError("extract needs at least one row and one dictionary")
        for row in work.rows:
            check_row(row, self.backbone, self.backbone.context_length)
        for _, dictionary, _ in dictionaries:
            check_selection(work.selection, dictionary)
        # Rows share a batch if the forward pass stops at the same block for all of them.
        kind = ("extract", max(site for _, _, site in dictionaries).layer)
        parts = []
        for rows in split_rows(work.rows, min(self.settings.max_batch_tokens, self.settings.shared_batch_tokens)):
            payload = ExtractPart(rows, dictionaries, work.selection, work.aggregation, work.reconstruction_error)
            parts.append(Part(kind, sum(map(len, rows)), max(map(len, rows)), payload))
        results, timing = await self._run(parts, under_way)
        inputs: list[list[DictionaryRows]] = [entry for part in results for entry in part]
        return ExtractResult(inputs, timing)

    async def encode(self, work: EncodeWork) -> EncodeResult:
        """The features of given activations."""
        dictionary = self._dictionary(work.dictionary)
        if work.x.ndim != 2 or work.x.shape[0] < 1 or work.x.shape[1] != dictionary.d_in:
            raise ValueError(f"activations have shape {list(work.x.shape)}, expected [n, {dictionary.d_in}], n >= 1")
        check_selection(work.selection, dictionary)
        step = self.settings.max_batch_tokens
        pieces = [work.x[start : start + step] for start in range(0, len(work.x), step)]
        parts = [Part(("encode", dictionary), len(x), 0, EncodePart(dictionary, x, work.selection)) for x in pieces]
        encoded, timing = await self._run(parts)
        return EncodeResult(
            join_rows([part.features for part in encoded]),
            join_arrays([part.mean for part in encoded]),
            join_arrays([part.std for part in encoded]),
            timing,
        )

    async def decode(self, work: DecodeWork) -> DecodeResult:
        """Reconstructions from given features."""
        dictionary = self._dictionary(work.dictionary)
        check_csr(work, dictionary)
        step, n = self.settings.max_batch_tokens, len(work.features)
        parts = []
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            mean = None if work.mean is None else work.mean[rows]
            std = None if work.std is None else work.std[rows]
            payload = DecodePart(dictionary, work.features[rows], mean, std)
            parts.append(Part(("decode", dictionary), rows.stop - rows.start, 0, payload))
        decoded, timing = await self._run(parts)
        x = join_arrays(decoded)
        assert x is not None
        return DecodeResult(x, timing)

    async def generate(self, work: GenerateWork) -> AsyncIterator[GeneratedTokens | GenerationEnd]:
        """Streams tokens of each sequence as they are sampled, and exactly one GenerationEnd of each.

        Work is queued when the iteration begins. Closing the iterator, or cancelling the task that awaits it, frees the
        slots before the next step. Besides the errors of the class: EditConflict and InvalidEdit (ValueErrors). A
        sequence that fails ends all of its request's.
        """
        self._check_accepting()
        self._check_generation(work)
        mailbox = Mailbox()
        request = GenerateRequest(work, mailbox.put)
        free_slots = self.settings.max_concurrent_generations - self._running.n_active
        self._scheduler.put_generation(
            request, len(work.prompt), 0 if self._running.n_waiting else free_slots // work.n_sequences
        )
        self._generating.add(request)
        self._idle.clear()
        running = work.n_sequences
        try:
            while running:
                for event in await mailbox.take():
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
        return await self._causal.resolve_references(edits)

    async def score(self, work: ScoreWork) -> ScoreResult:
        """Teacher-forced scores of rows, unedited and edited."""
        return await self._causal.score(work)

    async def ablate(self, work: AblateWork) -> AblateResult:
        """What taking features away, one at a time, does to the predictions on rows."""
        return await self._causal.ablate(work)

    async def attribute(self, work: AttributeWork) -> AttributeResult:
        """Which features on which tokens drive a logit."""
        return await self._causal.attribute(work)

    async def contrast(self, work: ContrastWork) -> ContrastResult:
        """Which features tell two sets of rows apart, and an edit made of them."""
        return await self._causal.contrast(work)

    # Admission

    def _check_accepting(self) -> None:
        if not self.ready:
            raise EngineStopped("the engine is not running")

    def _check_generation(self, work: GenerateWork) -> None:
        """ValueError or UnknownDictionary for work that cannot run."""
        if work.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {work.max_new_tokens}, expected at least 1")
        if work.samples < 1:
            raise ValueError(f"samples is {work.samples}, expected at least 1")
        if not work.sampling.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {work.sampling.repetition_penalty}, expected a positive number")
        check_row(work.prompt, self.backbone, self._max_sequence_tokens - 1)
        if work.stop and not self.backbone.has_tokenizer:
            raise ValueError("stop strings need a backbone with a tokenizer")
        for name in work.features.dictionaries if work.features else ():
            self._dictionary(name)
            self._site(name)
        check_row_edits(work.edits, self.dictionaries, len(work.prompt), self.backbone)
        self._running.check_fits(work)

    def _dictionary(self, name: str) -> Dictionary:
        return find_dictionary(name, self.dictionaries)

    def _site(self, name: str) -> Site:
        return self._sites.get(name) or self._dictionary(name).require_site()

    # Event loop

    async def _run(self, parts: list[Part], under_way: bool = False) -> tuple[list[Any], WorkTiming]:
        """Queues the parts of one request and waits for their results, which come in the same order.

        `under_way`: a later round of a request that was admitted before.
        """
        self._check_accepting()
        assert self._loop is not None
        request = _Request(parts, self._loop.create_future(), time.monotonic())
        for part in parts:
            part.payload = _Payload(request, part.payload)
        self._scheduler.put(parts, under_way=under_way)
        self._requests.add(request)
        self._idle.clear()
        try:
            return await request.future
        finally:
            self._requests.discard(request)
            if len(request.results) < len(parts):
                self._scheduler.discard(parts)
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._requests and not self._generating:
            self._idle.set()

    def _take_batch(self, outcome: _BatchOutcome) -> None:
        """Hands the results of a batch to those who wait for them."""
        waits = []
        requests: set[_Request] = {part.payload.request for part in outcome.parts}
        for request in requests:
            if not request.results:
                waits.append(outcome.begin - request.arrival)
            request.queue_s = max(request.queue_s, outcome.begin - request.arrival)
            request.compute_s += outcome.seconds
        for part, result in zip(outcome.parts, outcome.results, strict=True):
            request = part.payload.request
            request.results[part] = result
            if request.future.done():
                continue
            if isinstance(result, BaseException):
                request.future.set_exception(result)
            elif len(request.results) == len(request.parts):
                results = [request.results[part] for part in request.parts]
                request.future.set_result((results, WorkTiming(request.queue_s, request.compute_s)))
        if self._observer is not None:
            tokens = sum(part.tokens for part in outcome.parts)
            self._observer.batch_done(outcome.kind, len(requests), tokens, outcome.seconds)
            for seconds in waits:
                self._observer.waited(outcome.kind, seconds)

    def _take_step(self, outcome: StepOutcome) -> None:
        """Hands the events of a generation step to their streams."""
        for request, event in outcome.events:
            request.deliver(event)
        if self._observer is not None and outcome.n_rows:
            self._observer.batch_done("generate", outcome.n_rows, outcome.n_tokens, outcome.seconds)
            for request in outcome.started:
                self._observer.waited("generate", request.queue_s or 0.0)

    def _fail_everything(self, error: Exception) -> None:
        self._accepting = False
        for request in self._requests:
            if not request.future.done():
                request.future.set_exception(error)
        for generating in self._generating:
            generating.deliver(error)

    # Model thread

    def _model_thread(self) -> None:
        try:
            if self.settings.torch_threads:
                torch.set_num_threads(self.settings.torch_threads)
            n_lanes = self.settings.batch_lanes or torch.get_num_threads()
            if self.backbone.device.type == "cpu" and n_lanes > 1:
                self._lanes = Lanes(n_lanes)
            threads = torch.get_num_threads()
            decode_threads = self.settings.decode_threads or (
                min(threads, SMALL_BACKBONE_THREADS) if self.backbone.decode_bytes < SMALL_BACKBONE_BYTES else threads
            )
            with torch.inference_mode():
                while True:
                    turn = self._scheduler.next_turn(lambda: self._running.n_active > 0)
                    # A number of this thread's, cheap to change.
                    torch.set_num_threads(decode_threads if turn is Turn.GENERATION else threads)
                    if turn is Turn.STOP:
                        return
                    if turn is Turn.GENERATION:
                        self._call_soon(self._take_step, self._running.step(self._scheduler.next_generation))
                    else:
                        self._call_soon(self._take_batch, self._run_batch(turn))
        except BaseException as error:
            # A defect of the engine itself: nobody must wait for an answer that never comes.
            self._scheduler.close()
            self._call_soon(self._fail_everything, EngineStopped(f"the model thread failed: {error!r}"))
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

    def _run_batch(self, parts: list[Part]) -> _BatchOutcome:
        begin = time.monotonic()
        kind = parts[0].kind[0]
        results = self._execute(kind, [part.payload.work for part in parts])
        seconds = time.monotonic() - begin
        self._scheduler.batch_finished(parts, seconds)
        return _BatchOutcome(kind, parts, results, begin, seconds)

    def _execute(self, kind: str, works: list[Any]) -> list[Any]:
        """A result or an exception each. What fails together runs again one by one, so that only the culprit fails."""
        try:
            match kind:
                case "extract":
                    return list(extract_in_lanes(self.backbone, works, self._lanes))
                case "encode":
                    return list(run_encode(works))
                case _ if kind in KINDS:
                    return run_measurements(self.backbone, works)
                case _:
                    return list(run_decode(works))
        except Exception as error:
            if len(works) > 1:
                return [self._execute(kind, [work])[0] for work in works]
            return [error]
