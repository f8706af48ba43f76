"""Chunks and whole sequences of a generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.client import Internal, SaeserveError, set_feature
from tests.service.client.both_clients import Run, items, value
from tests.service.client.fake_server import FakeServer


def test_generate(run: Run, fake: FakeServer):
    async def script(client: Any) -> tuple[list[Any], Any, Any]:
        generation = client.generate(
            "Once", [set_feature("resid-mid", 3, 2.0)], max_new_tokens=6, seed=5, stop=["x"], request_id="g"
        )
        chunks = await items(generation)
        return chunks, await value(generation.result()), await value(generation.result())

    chunks, result, again = run(script)
    assert [chunk.text for chunk in chunks] == [" a cat", "", " é."]
    np.testing.assert_array_equal(chunks[1].token_ids, [1, 11])
    assert result.text == " a cat é."
    np.testing.assert_array_equal(result.token_ids, [0, 10, 1, 11, 2, 12])
    np.testing.assert_array_equal(result.logprobs, np.array([-0.5, 0, -0.5, -1, -0.5, -2], np.float32))
    assert (result.finish_reason, result.stop, result.seed) == ("stop", "x", 5)
    assert (result.prompt_tokens, result.generated_tokens, result.request_id) == (4, 6, "g")
    assert again.text == result.text
    (sent,) = fake.requests("Generate")
    assert (sent.max_new_tokens, sent.edits[0].feature, sent.edits[0].set.value) == (6, 3, 2.0)


def test_generate_result_alone(run: Run):
    result = run(lambda client: value(client.generate("Once").result()))
    assert (result.text, result.finish_reason, result.seed) == (" a dog é.", "length", 77)


def test_generate_several_sequences(run: Run, fake: FakeServer):
    async def script(client: Any) -> tuple[list[Any], Any, Any]:
        generation = client.generate("Once", [set_feature("resid-mid", 3, 2.0)], samples=2, compare=True)
        return await items(generation), await value(generation.all_results()), await value(generation.result())

    chunks, results, first = run(script)
    assert [(chunk.sample, chunk.unedited) for chunk in chunks[:4]] == [(0, True), (1, True), (0, False), (1, False)]
    assert [(r.unedited, r.sample, r.text) for r in results] == [
        (False, 0, " a cat é."),
        (False, 1, " a cat é.!"),
        (True, 0, " a dog é."),
        (True, 1, " a dog é.!"),
    ]
    assert first is results[0]
    (sent,) = fake.requests("Generate")
    assert (sent.samples, sent.compare) == (2, True)


def test_generate_tells_tokens_and_features(run: Run, fake: FakeServer):
    result = run(
        lambda client: value(
            client.generate(
                "Once", top_logprobs=2, features="resid-mid", features_top_k=2, repetition_penalty=1.5
            ).result()
        )
    )
    assert [list(top.token_ids) for top in result.top[:2]] == [[0, 7], [10, 7]]
    np.testing.assert_allclose(result.top[0].logprobs, [-0.5, -3])
    assert result.top[1].pieces == (b"<10>", b" x")
    first, second = result.features
    assert (first.first_position, second.first_position, first.pieces) == (4, 6, (b"a", b" b"))
    indices, values = first.dictionaries["resid-mid"].row(0)
    assert (indices.tolist(), values.tolist()) == ([5, 9], [2.5, 1.0])
    (sent,) = fake.requests("Generate")
    assert (sent.top_logprobs, list(sent.features.dictionaries), sent.features.top_k) == (2, ["resid-mid"], 2)
    assert sent.sampling.repetition_penalty == 1.5


def test_a_sequence_without_an_end_is_an_error(run: Run, fake: FakeServer):
    fake.end_without_finish = True
    with pytest.raises(SaeserveError, match="ended"):
        run(lambda client: value(client.generate("a", samples=2).all_results()))


def test_a_generation_whose_stream_just_ends(run: Run, fake: FakeServer):
    fake.end_without_finish = True
    with pytest.raises(Internal, match="ended before the generation did"):
        run(lambda client: value(client.generate("a").result()))
