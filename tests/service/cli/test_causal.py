"""`saeserve score|ablate|attribute|contrast` against the real handlers and engine, on small random models."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from sae_runtime.causal.texts_needed import texts_needed
from service.client import AsyncClient, Client, NotFound, ablate_feature, set_feature
from service.replica import ReplicaSettings, ServiceRuntime
from service.rpc.register import add_to_grpc_server, build_handlers
from tests.builders import small_backbone
from tests.service.cli.conftest import Output
from tests.service.conftest import LIMITS, served_dictionaries

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
async def address() -> AsyncIterator[str]:
    runtime = ServiceRuntime(small_backbone(), served_dictionaries(), ReplicaSettings(limits=LIMITS))
    await runtime.open()
    server = grpc.aio.server()
    add_to_grpc_server(build_handlers(runtime), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)
    await runtime.stop()


@pytest.fixture
def run(saeserve: Callable[..., Output], address: str) -> Callable[..., asyncio.Future[Output]]:
    """Runs a command in a thread, since the server lives on this event loop."""
    return lambda *arguments: asyncio.to_thread(saeserve, *arguments, "--address", address)


async def test_both_clients_measure_the_same(address: str) -> None:
    edits = [set_feature("mid", 3, 6.0), ablate_feature("wide", 5, "mean", positions="last")]
    texts = ["Once upon a time", "x = 1 + 2"]

    def with_the_blocking_client() -> tuple[object, ...]:
        with Client(address) as client:
            return (
                client.score(texts, edits, logit_tokens=["e", 9], tokens=True),
                client.ablate_features(texts, 3, ["mid", "wide"], ablations=["mean"], single_tokens=1),
                client.attribute_features(texts[0], target="e", foil=9, count=4, tokens=True),
                client.contrast_features(texts, ["ab", "cd"], "mid", suggest=1, validate=True),
            )

    scores, study, found, contrast = await asyncio.to_thread(with_the_blocking_client)
    async with AsyncClient(address) as client:
        again = await client.score(texts, edits, logit_tokens=["e", 9], tokens=True)
        study_again = await client.ablate_features(texts, 3, ["mid", "wide"], ablations=["mean"], single_tokens=1)
        found_again = await client.attribute_features(texts[0], target="e", foil=9, count=4, tokens=True)
        contrast_again = await client.contrast_features(texts, ["ab", "cd"], "mid", suggest=1, validate=True)
        named = [effect.feature for effect in study.effects]
        by_name = await client.ablate_features(texts, named, ablations=["mean"], single_tokens=1)
        with pytest.raises(NotFound) as raised:
            await client.ablate_features(texts, [("mid", 96)])
    assert raised.value.resources == ("mid:96",)
    assert len(scores) == 2
    assert scores[0].unedited.token_logits.shape == (16, 2)
    assert b"".join(scores[0].tokens.pieces) == b"Once upon a time"
    np.testing.assert_allclose(scores[0].delta_loss, again[0].edited.loss - again[0].unedited.loss, atol=1e-6)
    assert np.abs(scores[0].delta_loss).max() > 0
    assert (scores[0].kl >= 0).all()
    assert {effect.ablation for effect in study.effects} == {"mean"}
    assert study.effects == study_again.effects == by_name.effects
    assert found.attributions == found_again.attributions
    assert (len(found.attributions), len(found.tokens), found.position) == (4, 16, 15)
    assert contrast.features == contrast_again.features
    assert contrast.suggestion == contrast_again.suggestion == max(contrast.trials, key=lambda t: t.shift).edits


async def test_score(run: Callable[..., asyncio.Future[Output]], tmp_path: Path) -> None:
    plot = tmp_path / "score.png"
    code, out, err = await run(
        "score", "abc", "x=1", "--set", "mid:3=9", "--logit-token", "e", "--logit-token", "#9", "--plot", str(plot)
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "mid:3 = 9"
    assert lines[1].split() == ["text", "tokens", "loss", "edited", "Δ", "loss", "mean", "KL", "right", "edited"]
    header = next(line for line in lines if line.startswith("#"))
    assert header.split() == [
        "#", "token", "loss", "edited", "Δ", "loss", "KL", "right", "logit", "e", "logit", ")",
    ]  # fmt: skip
    assert lines[-1].startswith("4 predictions, mean loss ")
    assert plot.read_bytes().startswith(PNG)
    document = json.loads((await run("score", "abc", "--set", "mid:3=9", "--json")).out)
    entry = document["scores"]["inputs"][0]
    assert document["edits"][0]["feature"] == 3
    assert len(entry["unedited"]["loss"]) == len(entry["edited"]["loss"]) == 2
    assert len(entry["kl"]) == 3
    assert (await run("score")).code == 2


async def test_ablate(run: Callable[..., asyncio.Future[Output]], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Once upon a time\n\nthere was a king\n")
    plot = tmp_path / "ablate.png"
    code, out, err = await run(
        "ablate", "--file", str(texts), "--lines", "--strongest", "4", "--dictionary", "mid", "--distance", "1",
        "--ablation", "zero", "--ablation", "mean", "--logit-token", "e", "--plot", str(plot),
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("2 texts, 30 predictions, loss ")
    assert sum(line.startswith("mid:") for line in lines) == 16  # 4 features, 2 ablations, 2 tables
    assert "KL by distance from the changed token" in out
    assert plot.read_bytes().startswith(PNG)
    document = json.loads((await run("ablate", "abc", "--feature", "3", "--dictionary", "mid", "--json")).out)
    assert [effect["feature"] for effect in document["effects"]] == [["mid", 3]]
    code, _, err = await run("ablate", "abc", "--feature", "mid:999")
    assert code == 1
    assert "feature 999 is outside 0..95 of 'mid'" in err
    code, _, err = await run("ablate", "abc", "--feature", "3")
    assert code == 2
    assert "of which dictionary?" in err


async def test_attribute(run: Callable[..., asyncio.Future[Output]], tmp_path: Path) -> None:
    plot = tmp_path / "attribute.png"
    code, out, err = await run(
        "attribute", "Once upon", "--target", "e", "--foil", "#9", "--count", "6", "--plot", str(plot)
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("logit of 'e' less that of ')' after token 8: ")
    assert sum(line.split(":")[0] in ("early", "mid", "wide", "delta", "plain") for line in lines) == 6
    assert "Spearman" in lines[-1]
    assert plot.read_bytes().startswith(PNG)
    document = json.loads((await run("attribute", "Once", "--count", "2", "--json")).out)
    assert len(document["attributions"]) == 2
    assert document["foil_id"] is None


async def test_contrast(run: Callable[..., asyncio.Future[Output]], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\nthe dog\nthe horse\n")
    plot = tmp_path / "contrast.png"
    code, out, err = await run(
        "contrast", "--a", str(tmp_path / "a.txt"), "--b-text", "1 + 2", "--b-text", "3 * 4", "--dictionary", "mid",
        "--count", "5", "--suggest", "1", "--validate", "--plot", str(plot),
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("3 texts against 2; ")
    assert sum(line.startswith("mid:") for line in lines) >= 5
    assert any(line.startswith("Suggested: mid:") for line in lines)
    assert plot.read_bytes().startswith(PNG)
    assert "No feature passes a false discovery rate of 0.05. The texts are too few: " in " ".join(lines)
    tested = int(lines[0].split("; ")[1].split(" ")[0])
    assert f"That takes {texts_needed(tested, 0.05)} texts in each set." in " ".join(out.split())
    found = json.loads((await run("contrast", "--a-text", "a", "--a-text", "b", "--b-text", "c", "--b-text", "d",
                                  "--dictionary", "mid", "--json")).out)  # fmt: skip
    assert found["suggestion"] == []
    many = [*("--a-text", "aaa") * 12, *("--b-text", "zzz") * 12]
    enough = await run("contrast", *many, "--dictionary", "early", "--count", "1")
    assert "No feature" not in enough.out
    strict = await run("contrast", *many, "--dictionary", "early", "--fdr", "1e-12")
    assert "No feature passes a false discovery rate of 1e-12." in strict.out
    assert not any(line.startswith("early:") for line in strict.out.splitlines())
    code, _, err = await run("contrast", "--a-text", "a", "--b-text", "b")
    assert code == 2
    assert "expected at least 2 each" in err


@pytest.mark.parametrize("columns", ["40", "80", None], ids=["40 columns", "80 columns", "a pipe"])
async def test_tables_name_features_in_full(
    run: Callable[..., asyncio.Future[Output]], monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS")
    ablated = await run("ablate", "abc", "--feature", "early:95", "--distance", "1", "--logit-token", "e")
    assert [line.split()[0] for line in ablated.out.splitlines() if line.startswith("early:")] == ["early:95"] * 2
    texts = ["--a-text", "ab", "--a-text", "cd", "--b-text", "1+2", "--b-text", "3*4"]
    contrast = await run("contrast", *texts, "--dictionary", "early", "--count", "3", "--suggest", "1", "--validate")
    names = [line.split(" ")[0] for line in contrast.out.splitlines() if line.startswith("early:")]
    found = json.loads((await run("contrast", *texts, "--dictionary", "early", "--count", "3", "--json")).out)
    assert names[:3] == [f"early:{each['feature'][1]}" for each in found["features"]]
    for output in (ablated.out, contrast.out):
        assert "…" not in output


async def test_a_plot_without_matplotlib(
    run: Callable[..., asyncio.Future[Output]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = await run("score", "abc", "--plot", str(tmp_path / "no.png"))
    assert code == 1
    assert "2 predictions" in out
    assert "pip install 'saeserve[evaluate]'" in err
    assert not (tmp_path / "no.png").exists()
