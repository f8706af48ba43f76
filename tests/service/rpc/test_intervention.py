"""Generate: streams, seeds, stop strings, edits, truncation."""

import asyncio

import grpc
import numpy as np
import pytest

from sae_runtime import Edit
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import intervention_service_pb2 as pb
from tests.service.conftest import Served
from tests.service.engine.models import SlowGenerator


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
    reference = SlowGenerator(served.backbone, served.dictionaries)
    prompt = served.backbone.encode_text("Once upon").ids
    maximum = float(served.dictionaries["mid"].statistics.max[3])
    amount = pb.Amount(value=2, unit=pb.UNIT_RECORDED_MAXIMUM)
    cases = [
        ([], []),
        (
            [pb.Edit(dictionary="mid", feature=3, set=amount)],
            [Edit(dictionary="mid", feature=3, operation="set", value=2 * maximum)],
        ),
        (
            [
                pb.Edit(
                    dictionary="wide",
                    feature=5,
                    add=pb.Amount(value=4),
                    positions=pb.Positions(range=pb.POSITION_RANGE_GENERATED),
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
