"""Generate: streams, seeds, stop strings, edits, truncation."""

import asyncio
import threading
from typing import Any

import grpc
import numpy as np
import pytest

from sae_runtime import Edit
from service.engine.settings import EngineSettings
from service.pb.saeserve.v1 import common_pb2, edits_pb2, feature_service_pb2, server_service_pb2
from service.pb.saeserve.v1 import intervention_service_pb2 as pb
from service.replica import ReplicaSettings
from tests.builders import edited_model
from tests.service.conftest import LIMITS, Served, serve


async def generate(served: Served, **fields: object) -> tuple[str, list[int], list[float], pb.GenerationFinish]:
    prompt = common_pb2.TextInput(text=fields.pop("text", "Once upon"))
    request = pb.GenerateRequest(request_id="g-1", prompt=prompt, ignore_end_of_text=True, **fields)
    replies = [reply async for reply in served.interventions.Generate(request)]
    assert {reply.request_id for reply in replies} == {"g-1"}
    *chunks, last = replies
    assert last.WhichOneof("event") == "finish"
    assert all(reply.WhichOneof("event") == "chunk" for reply in chunks)
    text = "".join(reply.chunk.text for reply in chunks)
    ids = [token for reply in chunks for token in reply.chunk.token_ids]
    logprobs = [logprob for reply in chunks for logprob in reply.chunk.logprobs]
    return text, ids, logprobs, last.finish


async def test_greedy_equals_the_reference_with_and_without_an_edit(served: Served) -> None:
    reference = edited_model(served.backbone, served.dictionaries)
    prompt = served.backbone.encode_text("Once upon").ids
    maximum = float(served.dictionaries["mid"].statistics.max[3])
    amount = edits_pb2.Amount(value=2, unit=edits_pb2.UNIT_RECORDED_MAXIMUM)
    cases = [
        ([], []),
        (
            [edits_pb2.Edit(dictionary="mid", feature=3, set=amount)],
            [Edit(dictionary="mid", feature=3, operation="set", value=2 * maximum)],
        ),
        (
            [
                edits_pb2.Edit(
                    dictionary="wide",
                    feature=5,
                    add=edits_pb2.Amount(value=4),
                    positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_GENERATED),
                )
            ],
            [Edit(dictionary="wide", feature=5, operation="add", value=4, positions="generated")],
        ),
    ]
    runs = await asyncio.gather(*(generate(served, max_new_tokens=12, edits=messages) for messages, _ in cases))
    for (_, edits), (_, ids, logprobs, finish) in zip(cases, runs, strict=True):
        expected_ids, expected_logprobs = reference.greedy(prompt, 12, edits)
        assert ids == expected_ids
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-3)
        assert finish.reason == pb.FINISH_REASON_LENGTH
        assert (finish.prompt_tokens, finish.generated_tokens) == (len(prompt), 12)
        assert finish.timing.total_ms > 0


async def test_seeds(served: Served) -> None:
    hot = {"temperature": 1.0, "top_k": 50}
    first, again, other = await asyncio.gather(
        *(generate(served, max_new_tokens=20, sampling=pb.Sampling(seed=seed, **hot)) for seed in (7, 7, 2**64 - 1))
    )
    assert first[:2] == again[:2]
    np.testing.assert_allclose(first[2], again[2], atol=1e-5)
    assert first[1] != other[1]
    assert other[3].seed == 2**64 - 1
    drawn = await generate(served, max_new_tokens=5, sampling=pb.Sampling(**hot))
    repeated = await generate(served, max_new_tokens=5, sampling=pb.Sampling(seed=drawn[3].seed, **hot))
    assert drawn[1] == repeated[1]


async def test_stop_string(served: Served) -> None:
    sampling = pb.Sampling(temperature=1, seed=11)
    text, *_ = await generate(served, max_new_tokens=40, sampling=sampling)
    ascii_places = [i for i in range(4, len(text) - 1) if text[i : i + 2].isascii()]
    stop = text[ascii_places[0] : ascii_places[0] + 2]
    stopped, _, _, finish = await generate(served, max_new_tokens=40, sampling=sampling, stop=["never met", stop])
    assert stopped == text[: text.index(stop)]
    assert (finish.reason, finish.stop) == (pb.FINISH_REASON_STOP, stop)


async def test_prompt_and_new_tokens_must_fit(served: Served) -> None:
    context = served.backbone.context_length
    room = await generate(served, text="x" * (context - 3))
    assert room[3].generated_tokens == 3
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generate(served, text="x" * (context - 3), max_new_tokens=4)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"context of {context}" in raised.value.details()
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(served, text="x" * context)

    *_, finish = await generate(
        served, text="a" + "x" * context, max_new_tokens=10, overflow=common_pb2.OVERFLOW_TRUNCATE
    )
    assert (finish.prompt_tokens, finish.truncated_tokens, finish.generated_tokens) == (context - 10, 11, 10)


async def test_cancelling_frees_the_slot(served: Served) -> None:
    request = pb.GenerateRequest(prompt=common_pb2.TextInput(text="a"), max_new_tokens=40, ignore_end_of_text=True)
    for _ in range(3 * served.runtime.settings.engine.max_concurrent_generations):
        call = served.interventions.Generate(request)
        await call.read()
        call.cancel()
    *_, finish = await generate(served, max_new_tokens=2)
    assert finish.generated_tokens == 2


async def responses(served: Served, **fields: object) -> list[pb.GenerateResponse]:
    prompt = common_pb2.TextInput(text="Once upon")
    request = pb.GenerateRequest(prompt=prompt, ignore_end_of_text=True, **fields)
    return [reply async for reply in served.interventions.Generate(request)]


def ids_by_sequence(replies: list[pb.GenerateResponse]) -> dict[tuple[int, bool], list[int]]:
    found: dict[tuple[int, bool], list[int]] = {}
    for reply in replies:
        found.setdefault((reply.sample, reply.unedited), []).extend(reply.chunk.token_ids)
    return found


async def test_samples_and_compare_are_labelled(served: Served) -> None:
    hot = pb.Sampling(temperature=1, seed=5)
    edit = edits_pb2.Edit(dictionary="mid", feature=3, add=edits_pb2.Amount(value=6))
    replies = await responses(served, max_new_tokens=7, sampling=hot, edits=[edit], samples=2, compare=True)
    found = ids_by_sequence(replies)
    assert sorted(found) == [(0, False), (0, True), (1, False), (1, True)]
    ends = [(r.sample, r.unedited) for r in replies if r.WhichOneof("event") == "finish"]
    assert sorted(ends) == sorted(found)
    assert found[0, False] == (await generate(served, max_new_tokens=7, sampling=hot, edits=[edit]))[1]
    assert found[0, True] == (await generate(served, max_new_tokens=7, sampling=hot))[1]


async def test_tokens_come_with_their_alternatives_and_features(served: Served) -> None:
    watched = pb.WatchedFeatures(dictionaries=["early", "mid"], prompt=True)
    replies = await responses(served, max_new_tokens=6, top_logprobs=4, features=watched)
    (ids,) = ids_by_sequence(replies).values()
    tops = [top for reply in replies for top in reply.chunk.top]
    assert [top.token_ids[0] for top in tops] == ids  # greedily
    assert all(list(top.logprobs) == sorted(top.logprobs, reverse=True) and len(top.pieces) == 4 for top in tops)
    told = [each for reply in replies for each in reply.chunk.features]
    prompt = served.backbone.encode_text("Once upon").ids
    assert [token for each in told for token in each.token_ids] == [*prompt, *ids[:-1]]
    assert b"".join(piece for each in told for piece in each.pieces)[:9] == b"Once upon"
    assert [d.dictionary for d in told[0].dictionaries] == ["early", "mid"]
    splits = told[0].dictionaries[1].features.row_splits
    assert (len(splits), max(np.diff(splits))) == (len(prompt) + 1, 5)


async def test_watched_features_in_another_order_are_those_of_extraction(served: Served) -> None:
    surprise = common_pb2.FEATURE_RANKING_SURPRISE
    watched = pb.WatchedFeatures(dictionaries=["early", "mid"], prompt=True, top_k=3, rank_by=surprise)
    replies = await responses(served, max_new_tokens=6, features=watched)
    (ids,) = ids_by_sequence(replies).values()
    prompt = served.backbone.encode_text("Once upon").ids
    extracted = await served.features.ExtractFeatures(
        feature_service_pb2.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=[*prompt, *ids[:-1]]))],
            dictionaries=["early", "mid"],
            selection=feature_service_pb2.FeatureSelection(top_k=3, rank_by=surprise),
        )
    )
    for place, expected in enumerate(extracted.results[0].dictionaries):
        rows = [told.dictionaries[place].features for reply in replies for told in reply.chunk.features]
        assert [latent for row in rows for latent in row.indices] == list(expected.features.indices)


async def test_a_request_that_the_cache_cannot_hold_is_refused_at_once(served: Served) -> None:
    engine = EngineSettings(max_cache_tokens=100)
    async for small in serve(ReplicaSettings(limits=LIMITS, engine=engine)):
        info = await small.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        assert info.limits.max_cache_tokens == 100
        assert info.cache_bytes == 100 * small.backbone.cache_bytes_per_token
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await responses(small, max_new_tokens=30, samples=3)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "max_cache_tokens = 100" in raised.value.details()
        assert len(await responses(small, max_new_tokens=30)) > 1


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_call_that_ends_early_frees_its_slots_within_one_step(
    served: Served, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model thread is held in a step until the call has ended in the engine; the next step is without it."""
    engine = served.runtime.engine
    generation = engine._running
    reached, go_on = threading.Event(), threading.Event()
    rows: list[int] = []
    run = generation._runner.run

    def held(batch: Any, cache: Any) -> Any:
        rows.append(len(batch))
        if len(rows) == 3:
            reached.set()
            assert go_on.wait(60)
        return run(batch, cache)

    monkeypatch.setattr(generation._runner, "run", held)
    prompt = common_pb2.TextInput(text="Once upon")
    request = pb.GenerateRequest(prompt=prompt, max_new_tokens=40, ignore_end_of_text=True, samples=3)
    code = grpc.StatusCode.CANCELLED if how == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED
    for timeout_s in (1, 10, 50):  # on a slow machine a call may expire before its third step
        rows.clear()
        call = served.interventions.Generate(request, timeout=None if how == "cancel" else timeout_s)
        await asyncio.to_thread(reached.wait, 60 if how == "cancel" else timeout_s)
        if how == "cancel":
            call.cancel()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            async for _ in call:
                pass
        assert await call.code() == code
        while engine._generating:  # noqa: ASYNC110  # until the server's side of the call has ended as well
            await asyncio.sleep(0)
        if reached.is_set():
            break
    go_on.set()
    *_, finish = await generate(served, max_new_tokens=2)
    assert finish.generated_tokens == 2
    assert rows == [1, 3, 3, 1, 1]
    assert engine.snapshot().cache_tokens == 0
