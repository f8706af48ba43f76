"""The engine as a whole: concurrent work on the event loop, one model thread, against the library's own results."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.edits import Edit, InvalidEdit, Reference
from sae_runtime.errors import EditConflict, UnknownDictionary
from sae_runtime.model.packed import PackedTokens
from service.engine.engine import Engine
from service.engine.errors import DeviceLost, EngineStopped, NonFiniteActivations, QueueFull
from service.engine.settings import EngineSettings
from service.engine.work import (
    Csr,
    DecodeWork,
    EncodeWork,
    ExtractWork,
    GeneratedTokens,
    GenerateWork,
    GenerationEnd,
    SamplingOptions,
    Selection,
)
from tests.builders import (
    N_LATENTS,
    edited_model,
    random_dictionary,
    random_rows,
    small_backbone,
    small_dictionaries,
)

BACKBONE = small_backbone()
DICTIONARIES = small_dictionaries()
GREEDY = SamplingOptions(temperature=0)


class Log:
    """An observer that remembers."""

    features = None

    def __init__(self) -> None:
        self.batches: list[tuple[str, int, int]] = []
        self.waits: list[str] = []

    def batch_done(self, kind: str, items: int, tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.batches.append((kind, items, tokens))

    def waited(self, kind: str, seconds: float) -> None:
        assert seconds >= 0
        self.waits.append(kind)


@asynccontextmanager
async def running(log: Log | None = None, **settings: Any) -> AsyncIterator[Engine]:
    engine = Engine(BACKBONE, DICTIONARIES, EngineSettings(torch_threads=1, **settings), log)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


class Gate:
    """Holds the model thread inside its next forward pass until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.error: Exception | None = None
        forward = BACKBONE.forward

        def held(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            if self.error is not None:
                raise self.error
            return forward(*args, **kwargs)

        monkeypatch.setattr(BACKBONE, "forward", held)

    async def occupy(self, engine: Engine) -> asyncio.Task[Any]:
        """Starts a request and returns when the model thread is held inside of it."""
        task = asyncio.create_task(engine.extract(ExtractWork(((1, 2, 3),), ("mid",))))
        await asyncio.to_thread(self.reached.wait, 60)
        return task


async def queued(engine: Engine, *coroutines: Any) -> list[asyncio.Task[Any]]:
    """Tasks that have put their work into the queue."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    await asyncio.sleep(0)
    return tasks


def library(row: tuple[int, ...], name: str) -> tuple[torch.Tensor, SparseFeatures]:
    """Activations and features of one row, by the library alone."""
    d = DICTIONARIES[name]
    assert d.site is not None
    x = BACKBONE.activations(torch.tensor([row]), sites=[d.site])[d.site][0]
    return x, d.encode(x)


def dense(csr: Csr) -> np.ndarray:
    rows = np.zeros((len(csr), N_LATENTS), np.float32)
    rows[np.repeat(np.arange(len(csr)), np.diff(csr.row_splits.astype(np.int64))), csr.indices] = csr.values
    return rows


def assert_same(found: Csr, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(dense(found), expected.numpy(), atol=1e-5, rtol=1e-5)
    for start, end in zip(found.row_splits[:-1], found.row_splits[1:], strict=True):
        assert (np.diff(found.values[start:end]) <= 0).all()


async def collect(engine: Engine, work: GenerateWork) -> tuple[GeneratedTokens, GenerationEnd]:
    """A whole stream as one."""
    whole = GeneratedTokens()
    async for event in engine.generate(work):
        if isinstance(event, GenerationEnd):
            return whole, event
        whole.text += event.text
        whole.ids += event.ids
        whole.logprobs += event.logprobs
    raise AssertionError("the stream ended without an end")


class TestExtract:
    async def test_one_request_equals_the_library(self) -> None:
        rows = tuple(random_rows(3, (1, 30), seed=1))
        async with running() as engine:
            result = await engine.extract(ExtractWork(rows, tuple(DICTIONARIES), reconstruction_error=True))
        assert len(result.inputs) == 3
        for row, entries in zip(rows, result.inputs, strict=True):
            assert [entry.dictionary for entry in entries] == list(DICTIONARIES)
            for entry in entries:
                x, features = library(row, entry.dictionary)
                assert_same(entry.features, features.to_dense())
                missed = (x - DICTIONARIES[entry.dictionary].decode(features)).double().square().sum(1)
                assert entry.reconstruction_error == pytest.approx((missed / x.double().square().sum(1)).numpy(), 1e-4)

    async def test_sixty_four_at_once_equal_the_library(self) -> None:
        names = list(DICTIONARIES)
        works = [
            ExtractWork(
                tuple(random_rows(1 + i % 3, (1, 60), seed=i)),
                tuple(names[i % 4 :: 1 + i % 2]),
                [Selection(), Selection("top_k", k=2), Selection("features", features=(1, 5, 90))][i % 3],
                ["none", "max", "mean", "sum", "last"][i % 5],  # type: ignore[arg-type]
                reconstruction_error=i % 4 == 0,
            )
            for i in range(64)
        ]
        log = Log()
        async with running(log, max_batch_tokens=400) as engine:
            results = await asyncio.gather(*map(engine.extract, works))
        for work, result in zip(works, results, strict=True):
            for row, entries in zip(work.rows, result.inputs, strict=True):
                for entry in entries:
                    _, features = library(row, entry.dictionary)
                    selected = features.to_dense()
                    if work.selection.kind == "top_k":
                        selected = features.to_dense() * 0
                        kept = features.indices[:, :2].clamp_min(0)
                        selected.scatter_add_(1, kept, features.values[:, :2])
                    elif work.selection.kind == "features":
                        mask = torch.zeros(N_LATENTS)
                        mask[list(work.selection.features)] = 1
                        selected = selected * mask
                    match work.aggregation:
                        case "max":
                            selected = selected.amax(0, keepdim=True)
                        case "mean":
                            selected = selected.mean(0, keepdim=True)
                        case "sum":
                            selected = selected.sum(0, keepdim=True)
                        case "last":
                            selected = selected[-1:]
                    assert_same(entry.features, selected)
                    n_errors = len(row) if work.reconstruction_error else None
                    found = None if entry.reconstruction_error is None else len(entry.reconstruction_error)
                    assert found == n_errors
        assert len(log.batches) < 64
        assert sum(tokens for _, _, tokens in log.batches) == sum(len(row) for work in works for row in work.rows)
        assert log.waits == ["extract"] * 64

    async def test_a_request_over_the_budget_runs_in_pieces(self) -> None:
        rows = tuple(random_rows(9, (5, 60), seed=4))
        log = Log()
        async with running(log, max_batch_tokens=50) as engine:
            result = await engine.extract(ExtractWork(rows, ("mid",)))
        assert len(log.batches) > 1
        assert all(tokens <= 50 or tokens in map(len, rows) for _, _, tokens in log.batches)
        for row, (entry,) in zip(rows, result.inputs, strict=True):
            assert_same(entry.features, library(row, "mid")[1].to_dense())

    async def test_one_forward_up_to_the_last_site(self, monkeypatch: pytest.MonkeyPatch) -> None:
        captured = []
        forward = BACKBONE.forward

        def spy(packed: Any, **kwargs: Any) -> Any:
            captured.append({str(site) for site in kwargs["capture"]})
            assert kwargs.get("logits", "none") == "none"
            return forward(packed, **kwargs)

        monkeypatch.setattr(BACKBONE, "forward", spy)
        async with running() as engine:
            await engine.extract(ExtractWork(((1, 2), (3,)), ("mid", "wide", "early")))
        assert captured == [{"0.resid_post_mlp", "1.resid_post_mlp", "1.mlp_post_act"}]

    async def test_requests_that_wait_share_a_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate, log = Gate(monkeypatch), Log()
        async with running(log) as engine:
            first = await gate.occupy(engine)
            others = await queued(
                engine, *(engine.extract(ExtractWork((row,), ("mid",))) for row in ((1,), (2, 3), (4,)))
            )
            assert engine.snapshot().queued_items == 3
            assert engine.snapshot().queued_tokens == 4
            gate.open.set()
            await asyncio.gather(first, *others)
        assert log.batches == [("extract", 1, 3), ("extract", 3, 4)]

    async def test_a_batch_without_room_runs_again_in_halves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing of the batch that failed may take room when the first half runs."""
        gate, forward = Gate(monkeypatch), BACKBONE.forward
        tensors: list[weakref.ref[torch.Tensor]] = []
        sizes = []

        def little_memory(packed: PackedTokens, **kwargs: Any) -> Any:
            assert all(tensor() is None for tensor in tensors)
            sizes.append(len(packed.lengths))
            result = forward(packed, **kwargs)
            if len(packed.lengths) > 2:
                tensors.extend(weakref.ref(x) for x in result.activations.values())
                raise torch.OutOfMemoryError("no room")
            return result

        rows = random_rows(4, (2, 9), seed=12)
        async with running() as engine:
            first = await gate.occupy(engine)
            monkeypatch.setattr(BACKBONE, "forward", little_memory)
            tasks = await queued(engine, *(engine.extract(ExtractWork((row,), ("mid",))) for row in rows))
            gate.open.set()
            await first
            results = await asyncio.gather(*tasks)
        assert sizes == [4, 2, 2]
        assert len(tensors) == 1
        for row, result in zip(rows, results, strict=True):
            assert_same(result.inputs[0][0].features, library(row, "mid")[1].to_dense())

    async def test_cancelled_work_is_dropped_before_it_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate, log = Gate(monkeypatch), Log()
        async with running(log) as engine:
            first = await gate.occupy(engine)
            gone, kept = await queued(
                engine,
                engine.extract(ExtractWork(((5,) * 7,), ("mid",))),
                engine.extract(ExtractWork(((6,) * 2,), ("mid",))),
            )
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert engine.snapshot().queued_tokens == 2
            first.cancel()  # runs already: its result finds nobody
            gate.open.set()
            await kept
        assert log.batches == [("extract", 1, 3), ("extract", 1, 2)]

    async def test_one_bad_item_fails_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Token 256 is made to overflow: batches with it raise, and only its own request may fail."""
        gate = Gate(monkeypatch)
        good = BACKBONE._model._weights.wte[256].clone()
        BACKBONE._model._weights.wte[256] = float("inf")
        try:
            async with running() as engine:
                first = await gate.occupy(engine)
                works = [ExtractWork((row,), ("mid", "wide")) for row in ((7, 8), (9, 256, 10), (11,))]
                tasks = await queued(engine, *map(engine.extract, works))
                gate.open.set()
                await first
                fine, bad, also_fine = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            BACKBONE._model._weights.wte[256] = good
        assert isinstance(bad, NonFiniteActivations)
        for work, result in ((works[0], fine), (works[2], also_fine)):
            assert_same(result.inputs[0][0].features, library(work.rows[0], "mid")[1].to_dense())  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("work", "error", "message"),
        [
            (ExtractWork(((1,),), ("nothing",)), UnknownDictionary, "loaded: delta, early, mid, wide"),
            (ExtractWork(((1,),), ("mid", "nothing")), UnknownDictionary, "nothing"),
            (ExtractWork((), ("mid",)), ValueError, "no rows"),
            (ExtractWork(((1,),), ()), ValueError, "no dictionaries"),
            (ExtractWork(((1,), ()), ("mid",)), ValueError, "0 tokens, expected 1 to 96"),
            (ExtractWork(((1,) * 97,), ("mid",)), ValueError, "97 tokens, expected 1 to 96"),
            (ExtractWork(((257,),), ("mid",)), ValueError, "leave the vocabulary"),
            (ExtractWork(((-1,),), ("mid",)), ValueError, "leave the vocabulary"),
            (ExtractWork(((1,),), ("mid",), Selection("features", features=(96,))), ValueError, "latent 96"),
        ],
    )
    async def test_work_that_cannot_run_is_refused(
        self, work: ExtractWork, error: type[Exception], message: str
    ) -> None:
        async with running() as engine:
            with pytest.raises(error, match=message):
                await engine.extract(work)


class TestEncodeAndDecode:
    @pytest.mark.parametrize("name", list(DICTIONARIES))
    async def test_equal_the_library(self, name: str) -> None:
        d = DICTIONARIES[name]
        xs = [torch.randn(n, d.d_in, generator=torch.Generator().manual_seed(n)) for n in (1, 40, 17)]
        async with running(max_batch_tokens=16) as engine:
            encoded = await asyncio.gather(*(engine.encode(EncodeWork(name, x.numpy())) for x in xs))
            decoded = await asyncio.gather(
                *(engine.decode(DecodeWork(name, e.features, e.mean, e.std)) for e in encoded)
            )
        for x, e, y in zip(xs, encoded, decoded, strict=True):
            features = d.encode(x)
            assert_same(e.features, features.to_dense())
            assert (e.mean is None) == (not d.normalizes_input)
            if features.input_statistics is not None:
                np.testing.assert_allclose(e.mean, features.input_statistics.mean.squeeze(1), atol=1e-6)
                np.testing.assert_allclose(e.std, features.input_statistics.std.squeeze(1), rtol=1e-6)
            np.testing.assert_allclose(y.x, d.decode(features), atol=1e-5)

    async def test_decoding_rows_of_any_form(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Entries in any order, empty rows, one long row among short ones, little memory for padding."""
        monkeypatch.setattr("service.engine.batch.MAX_PADDED_ENTRIES", 100)
        d = DICTIONARIES["mid"]
        generator = np.random.default_rng(0)
        counts = np.array([0, 3, 90, 1, 0, 5, 96, 2])
        indices = np.concatenate([generator.permutation(N_LATENTS)[:c] for c in counts]).astype(np.uint32)
        values = generator.normal(size=len(indices)).astype(np.float32)
        csr = Csr(np.cumsum([0, *counts]).astype(np.uint32), indices, values)
        async with running() as engine:
            result = await engine.decode(DecodeWork("mid", csr))
        np.testing.assert_allclose(result.x, dense(csr) @ d.decoder.numpy() + d.pre_bias.numpy(), atol=1e-5)

    async def test_rows_that_are_not_finite_fail_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch)
        good, bad = np.ones((2, 32), np.float32), np.full((1, 32), np.nan, np.float32)
        async with running() as engine:
            first = await gate.occupy(engine)
            tasks = await queued(engine, *(engine.encode(EncodeWork("mid", x)) for x in (good, bad, good)))
            gate.open.set()
            await first
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result).__name__ for result in results] == ["EncodeResult", "NonFiniteActivations", "EncodeResult"]

    async def test_malformed_rows_are_refused(self) -> None:
        def csr(splits: list[int], indices: list[int]) -> Csr:
            return Csr(np.array(splits, np.uint32), np.array(indices, np.uint32), np.ones(len(indices), np.float32))

        async with running() as engine:
            for bad, message in [
                (csr([0, 2], [1]), "different lengths"),
                (csr([1, 2], [1, 2]), "rising offsets"),
                (csr([0, 2, 1], [1]), "rising offsets"),
                (csr([0], []), "at least one row"),
                (csr([0, 1], [N_LATENTS]), f"latent {N_LATENTS}"),
            ]:
                with pytest.raises(ValueError, match=message):
                    await engine.decode(DecodeWork("mid", bad))
            with pytest.raises(ValueError, match=r"expected \[n, 32\]"):
                await engine.encode(EncodeWork("mid", np.ones((2, 31), np.float32)))


class TestGenerate:
    async def test_steered_and_plain_streams_beside_extraction(self) -> None:
        """Every stream gives what it gives alone, and every extraction what the library gives."""
        slow = edited_model(BACKBONE, DICTIONARIES)
        prompts = random_rows(6, (2, 20), seed=9)
        edits = (Edit("mid", 3, "add", 6.0), Edit("wide", 8, "set", 4.0, positions="generated"))
        works = [
            GenerateWork(p, 8, GREEDY, edits=edits * (i % 2), ignore_end_of_text=True) for i, p in enumerate(prompts)
        ]
        rows = random_rows(12, (3, 50), seed=10)
        async with running(max_concurrent_generations=4) as engine:
            streams = [asyncio.create_task(collect(engine, work)) for work in works]
            extracted = await asyncio.gather(*(engine.extract(ExtractWork((row,), ("mid",))) for row in rows))
            outcomes = await asyncio.gather(*streams)
        for work, (tokens, end) in zip(works, outcomes, strict=True):
            expected, logprobs = slow.greedy(work.prompt, 8, work.edits)
            assert tokens.ids == expected
            assert tokens.logprobs == pytest.approx(logprobs, abs=1e-4)
            assert (end.reason, end.prompt_tokens, end.generated_tokens) == ("length", len(work.prompt), 8)
            assert end.timing.compute_s > 0
        for row, result in zip(rows, extracted, strict=True):
            assert_same(result.inputs[0][0].features, library(row, "mid")[1].to_dense())

    async def test_neither_extraction_nor_generation_starves(self) -> None:
        """While both have work, their turns alternate as set: counted in turns of the model thread."""
        log = Log()
        async with running(log, generation_steps_per_batch=2, max_batch_tokens=10) as engine:
            streams = [
                asyncio.create_task(collect(engine, GenerateWork((i,), 90, GREEDY, ignore_end_of_text=True)))
                for i in (1, 2)
            ]
            await asyncio.sleep(0)
            await asyncio.gather(*(engine.extract(ExtractWork(((1,) * 10,), ("mid",))) for _ in range(30)))
            await asyncio.gather(*streams)
        kinds = [kind for kind, _, _ in log.batches]
        assert kinds.count("extract") == 30
        shared = "".join(
            kind[0] for kind in kinds[kinds.index("extract") : 1 + len(kinds) - kinds[::-1].index("extract")]
        )
        assert "eee" not in shared
        assert "ggggg" not in shared

    async def test_closing_a_stream_frees_its_slot(self) -> None:
        async with running(max_concurrent_generations=1) as engine:
            long = engine.generate(GenerateWork((1, 2), 90, GREEDY, ignore_end_of_text=True))
            assert isinstance(await anext(long), GeneratedTokens)
            waiting = asyncio.create_task(collect(engine, GenerateWork((3,), 2, GREEDY, ignore_end_of_text=True)))
            await asyncio.sleep(0)
            await long.aclose()  # type: ignore[attr-defined]
            _, end = await waiting
            assert end.generated_tokens == 2
            assert engine.snapshot().active_generations == 0

    async def test_a_cancelled_stream_that_waits_never_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate, log = Gate(monkeypatch), Log()
        async with running(log) as engine:
            first = await gate.occupy(engine)
            (stream,) = await queued(engine, collect(engine, GenerateWork((1, 2, 3), 5)))
            assert engine.snapshot().queued_tokens == 3
            stream.cancel()
            await asyncio.gather(stream, return_exceptions=True)
            assert engine.snapshot().queued_tokens == 0
            gate.open.set()
            await first
        assert [kind for kind, _, _ in log.batches] == ["extract"]

    async def test_edits_out_of_range_fail_their_own_stream(self) -> None:
        strong = GenerateWork((1, 2), 5, GREEDY, edits=(Edit("delta", 1, "set", 3e38),))
        async with running() as engine:
            bad, (tokens, _) = await asyncio.gather(
                collect(engine, strong), collect(engine, replace(strong, edits=())), return_exceptions=True
            )
            assert isinstance(bad, NonFiniteActivations)
            assert tokens.ids == edited_model(BACKBONE, DICTIONARIES).greedy((1, 2), len(tokens.ids))[0]

    async def test_waiting_streams_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch)
        async with running(max_concurrent_generations=1, max_queued_generations=1) as engine:
            first = await gate.occupy(engine)
            work = GenerateWork((1,), 2, GREEDY, ignore_end_of_text=True)
            streams = await queued(engine, *(collect(engine, work) for _ in range(3)))
            with pytest.raises(QueueFull) as error:
                await streams[2]
            assert error.value.limit_name == "max_queued_generations"
            gate.open.set()
            await asyncio.gather(first, *streams[:2])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"prompt": ()}, ValueError, "0 tokens"),
            ({"prompt": (1,) * 96}, ValueError, "expected 1 to 95"),
            ({"prompt": (999,)}, ValueError, "vocabulary"),
            ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
            ({"edits": (Edit("none", 1, "set"),)}, UnknownDictionary, "none"),
            ({"edits": (Edit("mid", 96, "set"),)}, InvalidEdit, "feature"),
            ({"edits": (Edit("mid", 1, "resample", reference=Reference((1,))),)}, InvalidEdit, "has not been run"),
            ({"edits": (Edit("mid", 1, "set"), Edit("mid", 1, "add"))}, EditConflict, r"edits\[0\].*edits\[1\]"),
        ],
    )
    async def test_work_that_cannot_run_is_refused(
        self, change: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        async with running() as engine:
            with pytest.raises(error, match=message):
                await collect(engine, replace(GenerateWork((1,), 3), **change))


class TestLifeCycle:
    async def test_not_running_refuses_work(self) -> None:
        engine = Engine(BACKBONE, DICTIONARIES, EngineSettings())
        started = False
        assert not engine.ready
        for _ in ("never started", "stopped"):
            with pytest.raises(EngineStopped):
                await engine.extract(ExtractWork(((1,),), ("mid",)))
            with pytest.raises(EngineStopped):
                await collect(engine, GenerateWork((1,), 3))
            if not started:
                await engine.start()
                assert engine.ready
                await engine.stop()
                assert not engine.ready
                started = True

    async def test_stopping_fails_what_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch)
        engine = Engine(BACKBONE, DICTIONARIES, EngineSettings())
        await engine.start()
        first = await gate.occupy(engine)
        others = await queued(
            engine, engine.extract(ExtractWork(((1,),), ("mid",))), collect(engine, GenerateWork((1,), 3))
        )
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        gate.open.set()
        await stopping
        await first  # was running
        for error in await asyncio.gather(*others, return_exceptions=True):
            assert isinstance(error, EngineStopped)

    async def test_a_full_queue_says_which_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch)
        async with running(max_queued_tokens=20) as engine:
            tasks = [await gate.occupy(engine)]
            tasks += await queued(engine, engine.extract(ExtractWork(((1,) * 15,), ("mid",))))
            with pytest.raises(QueueFull) as error:
                await engine.extract(ExtractWork(((1,) * 6,), ("mid",)))
            assert error.value.limit_name == "max_queued_tokens"
            gate.open.set()
            await asyncio.gather(*tasks)

    async def test_a_defect_of_the_engine_leaves_nobody_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        engine = Engine(BACKBONE, DICTIONARIES, EngineSettings())
        monkeypatch.setattr(engine, "_run_batch", lambda parts: 1 / 0)
        await engine.start()
        with pytest.raises(EngineStopped, match="ZeroDivisionError"):
            await engine.extract(ExtractWork(((1,),), ("mid",)))
        assert not engine.ready
        await engine.stop()

    async def test_a_lost_device_fails_all_that_waits_and_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As after an illegal access: the replica must not look healthy, or nobody replaces it."""
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        gate = Gate(monkeypatch)
        engine = Engine(BACKBONE, DICTIONARIES, EngineSettings())
        await engine.start()
        first = await gate.occupy(engine)
        others = await queued(
            engine, engine.extract(ExtractWork(((1,),), ("mid",))), collect(engine, GenerateWork((1,), 3))
        )
        gate.error = torch.AcceleratorError("an illegal memory access was encountered")
        assert engine.ready
        gate.open.set()
        for error in await asyncio.gather(first, *others, return_exceptions=True):
            assert isinstance(error, DeviceLost)
            assert "illegal memory access" in str(error)
        assert not engine.ready
        with pytest.raises(EngineStopped):
            await engine.extract(ExtractWork(((1,),), ("mid",)))
        await engine.stop()

    async def test_a_device_lost_in_a_generation_step_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        gate = Gate(monkeypatch)
        gate.error = torch.AcceleratorError("an illegal memory access was encountered")
        gate.open.set()
        engine = Engine(BACKBONE, DICTIONARIES, EngineSettings())
        await engine.start()
        with pytest.raises(DeviceLost):
            await collect(engine, GenerateWork((1,), 3))
        assert not engine.ready
        await engine.stop()

    def test_dictionaries_must_fit_the_backbone(self) -> None:
        for site, d_in, message in [("9.resid_pre", 32, "layers 0 to 2"), ("1.resid_pre", 31, "reads 31 values")]:
            wrong = random_dictionary(site, d_in, k=4, normalize=False, seed=0)
            with pytest.raises(ValueError, match=message):
                Engine(BACKBONE, {"wrong": wrong}, EngineSettings())
