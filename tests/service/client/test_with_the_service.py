"""The clients and the command line against the real handlers and engine (no Ray), on small random models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import torch

from service.cli.main import main
from service.client import (
    AblationStudy,
    AsyncClient,
    Attributions,
    Client,
    Contrast,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Scores,
    ablate_feature,
    set_feature,
)
from service.replica import ReplicaSettings, ServiceRuntime
from service.rpc.register import add_to_grpc_server, build_handlers
from tests.builders import small_backbone
from tests.service.conftest import LIMITS, served_dictionaries

TEXT = "Zwölf Boxkämpfer jagen"


@pytest.fixture
async def runtime() -> AsyncIterator[ServiceRuntime]:
    runtime = ServiceRuntime(small_backbone(), served_dictionaries(), ReplicaSettings(limits=LIMITS))
    await runtime.open()
    yield runtime
    await runtime.stop()


@pytest.fixture
async def address(runtime: ServiceRuntime) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add_to_grpc_server(build_handlers(runtime), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_features_equal_the_librarys(runtime: ServiceRuntime, address: str):
    async with AsyncClient(address) as client:
        await client.wait_until_ready(10)
        reply = await client.extract_features(TEXT, tokens=True, reconstruction_error=True)
    tokens = reply[0].tokens
    assert tokens is not None
    assert b"".join(tokens.pieces).decode() == TEXT
    assert set(reply[0].dictionaries) == set(runtime.model.dictionaries)
    for name, dictionary in runtime.model.dictionaries.items():
        assert dictionary.site is not None
        acts = runtime.model.backbone.activations(
            torch.tensor(tokens.ids.astype(np.int64))[None], sites=[dictionary.site]
        )
        x = acts[dictionary.site][0]
        expected = dictionary.encode(x)
        got = reply[0][name]
        np.testing.assert_allclose(got.to_dense(dictionary.n_latents), expected.to_dense().numpy(), atol=1e-5)
        error = (x - dictionary.decode(expected)).square().sum(1) / x.square().sum(1)
        np.testing.assert_allclose(reply[0].dictionaries[name].reconstruction_error, error.numpy(), atol=1e-5)


async def test_blocking_client_encodes_decodes_and_generates(runtime: ServiceRuntime, address: str):
    def script() -> None:
        with Client(address) as client:
            assert client.is_healthy()
            assert client.is_healthy("saeserve.v1.FeatureService")
            assert client.server_info().backbone.fingerprint == runtime.model.backbone.fingerprint
            for info in client.list_dictionaries():
                dictionary = runtime.model.dictionaries[info.name]
                assert (info.d_in, info.n_latents, info.normalizes_input) == (
                    dictionary.d_in,
                    dictionary.n_latents,
                    dictionary.normalizes_input,
                )
                x = np.random.default_rng(0).normal(size=(3, info.d_in)).astype(np.float32)
                encoding = client.encode_activations(info.name, x)
                decoding = client.decode_features(info.name, encoding.features, encoding.input_statistics)
                expected = dictionary.decode(dictionary.encode(torch.from_numpy(x)))
                np.testing.assert_allclose(decoding.activations, expected.numpy(), atol=1e-5)
            replies = list(client.extract_features_stream([["a", "b c"], TEXT], top_k=2))
            assert [len(reply) for reply in replies] == [2, 1]

            edits = [set_feature("mid", 3, 30.0), ablate_feature("mid", 5)]
            plain, steered = (client.generate(TEXT, e, max_new_tokens=8).result() for e in ([], edits))
            again = client.generate(TEXT, max_new_tokens=8, seed=1, temperature=1.0, top_p=0.9)
            chunks = list(again)
            assert list(plain.token_ids) != list(steered.token_ids)
            assert plain.finish_reason in ("length", "end_of_text")
            assert "".join(chunk.text for chunk in chunks) == again.result().text
            assert again.result().seed == 1

    await asyncio.to_thread(script)


async def test_errors_name_what_is_wrong(address: str):
    async with AsyncClient(address) as client:
        with pytest.raises(NotFound) as not_found:
            await client.extract_features("a", "no-such", request_id="mine")
        assert not_found.value.resources == ("no-such",)
        assert not_found.value.request_id == "mine"
        with pytest.raises(InvalidArgument) as wrong:
            await client.extract_features(["a", ""], "mid", threshold=-1.0)
        assert any("threshold" in violation.field for violation in wrong.value.field_violations)
        with pytest.raises(FailedPrecondition) as lacking:
            await client.generate("a", [set_feature("plain", 1, 2.0, unit="max")]).result()
        assert lacking.value.field_violations[0].field.startswith("edits[0]")
        with pytest.raises(InvalidArgument):
            await client.generate("a", [set_feature("mid", 1, 2.0), ablate_feature("mid", 1)]).result()


async def test_both_clients_measure_the_same(address: str) -> None:
    edits = [set_feature("mid", 3, 6.0), ablate_feature("wide", 5, "mean", positions="last")]
    texts = ["Once upon a time", "x = 1 + 2"]

    def with_the_blocking_client() -> tuple[Scores, AblationStudy, Attributions, Contrast]:
        with Client(address) as client:
            return (
                client.score(texts, edits, logit_tokens=["e", 9], tokens=True),
                client.ablate_features(texts, 3, ["mid", "wide"], ablations=["mean"], single_tokens=1),
                client.attribute_features(texts[0], target="e", foil=9, count=4, tokens=True),
                client.contrast_features(texts, ["ab", "cd"], "mid", suggest=1, validate=True),
            )

    scores, study, attributions, contrast = await asyncio.to_thread(with_the_blocking_client)
    async with AsyncClient(address) as client:
        scores_again = await client.score(texts, edits, logit_tokens=["e", 9], tokens=True)
        study_again = await client.ablate_features(texts, 3, ["mid", "wide"], ablations=["mean"], single_tokens=1)
        attributions_again = await client.attribute_features(texts[0], target="e", foil=9, count=4, tokens=True)
        contrast_again = await client.contrast_features(texts, ["ab", "cd"], "mid", suggest=1, validate=True)
        strongest = [effect.feature for effect in study.effects]
        study_of_names = await client.ablate_features(texts, strongest, ablations=["mean"], single_tokens=1)
        with pytest.raises(NotFound) as raised:
            await client.ablate_features(texts, [("mid", 96)])
    assert raised.value.resources == ("mid:96",)
    assert len(scores) == 2
    assert scores[0].unedited.token_logits.shape == (16, 2)
    assert scores[0].tokens is not None
    assert b"".join(scores[0].tokens.pieces) == b"Once upon a time"
    edited_again, kl = scores_again[0].edited, scores[0].kl
    assert edited_again is not None
    assert kl is not None
    np.testing.assert_allclose(scores[0].delta_loss, edited_again.loss - scores_again[0].unedited.loss, atol=1e-6)
    assert np.abs(edited_again.loss - scores_again[0].unedited.loss).max() > 0
    assert (kl >= 0).all()
    assert {effect.ablation for effect in study.effects} == {"mean"}
    assert study.effects == study_again.effects == study_of_names.effects
    assert attributions.attributions == attributions_again.attributions
    assert attributions.tokens is not None
    assert (len(attributions.attributions), len(attributions.tokens), attributions.position) == (4, 16, 15)
    assert contrast.features == contrast_again.features
    assert contrast.suggestion == contrast_again.suggestion == max(contrast.trials, key=lambda t: t.shift).edits


async def test_command_line(address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")

    async def run(*arguments: str) -> str:
        assert await asyncio.to_thread(main, [*arguments, "--address", address]) == 0
        return capsys.readouterr().out

    assert TEXT in await run("features", TEXT, "--dictionary", "mid")
    assert len(json.loads(await run("features", "a", "b", "--json"))) == 2
    assert "mid" in await run("dictionaries")
    assert "mid" in await run("dictionaries", "mid")
    assert "max_queued_tokens" in await run("info")
    out = await run("generate", TEXT, "--set", "mid:3=9", "--max-new-tokens", "4", "--seed", "3", "--compare", "--json")
    compared = json.loads(out)
    assert compared["unedited"]["seed"] == compared["edited"]["seed"] == 3
