"""`saeserve feature` and `saeserve search` against a dictionary with a catalogue, and labels in other commands."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.client import AsyncClient
from service.replica import ReplicaSettings
from tests.service.cli.conftest import Run
from tests.service.conftest import LIMITS, serve
from tests.service.rpc.catalogue.conftest import with_catalogue

pytestmark = pytest.mark.any_cpu


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    settings = ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path / "labels"))
    async for server in serve(settings, dictionaries=with_catalogue(tmp_path / "mid")):
        yield server.address


async def test_a_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = await run("feature", "mid:0")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "mid:0  any token of Spanish text",
        "  rule, F1 0.90 (precision 0.90, recall 0.70) on 60 + 60 held-out contexts",
        "",
        "fires on    2 % of tokens (100), 12 % of documents",
        "activation  mean 1.25 where it fires, at most 2.50",
        "explained   50% of the activation by the current token",
        "position    correlation with log(1 + position) -0.12",
        "by kind     code 50 %, prose 25 %",
        "ablation    KL 0.2500 nats where it fires",
        "histogram   0 █▆▄▃ 2.50",
        "active on   ·de ×50  ·la ×50",
        "promotes    ·sat +2.00",
        "suppresses  ·dog +2.00",
        "",
        "neighbour  by              score  label",
        'mid:1      decoder cosine   0.75  token "="',
        "early:5    fires together   0.50",
        "",
        "activation  strongest contexts          document",
        "      2.50  la casa⟦ de⟧ mi madre está  prose.jsonl:3",
        "      2.00  ⟦de⟧                        prose.jsonl:3",
    ]


async def test_a_feature_without_a_label(run: Run) -> None:
    out = (await run("feature", "2", "--dictionary", "mid")).out
    assert out.startswith("mid:2  no simple label\n")
    assert "flags       dense, positional" in out


async def test_a_page_as_json(run: Run) -> None:
    document = json.loads((await run("feature", "mid:0", "--json")).out)
    assert document["page"]["summary"]["label"] == "any token of Spanish text"
    assert document["page"]["contexts"][0]["tokens"][:2] == ["la", " casa"]
    assert len(document["fingerprint"]) == 64


async def test_labels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    markup = "[bold]x[/bold] :smile: {0}"
    written = await run("feature", "mid:0", "--label", markup, "--author", "Ada")
    assert written.out == f"mid:0 is labelled {markup!r}\n"
    page = (await run("feature", "mid:0")).out.splitlines()
    assert page[:3] == [
        f"mid:0  {markup}",
        "  person Ada",
        "  rule, F1 0.90 (precision 0.90, recall 0.70) on 60 + 60 held-out contexts: any token of Spanish text",
    ]
    assert markup in (await run("search", "smile", "--dictionary", "mid")).out
    replacing = await run("feature", "mid:0", "--label", "y")
    assert replacing.out == f"mid:0 is labelled 'y', in place of {markup!r} of Ada\n"
    assert (await run("feature", "mid:0", "--label", "")).out == "mid:0: removed the label 'y'\n"
    assert (await run("feature", "mid:0", "--label", "")).out == "mid:0 had no label of a person\n"
    code, _, err = await run("feature", "mid:0", "--label", "a\nb")
    assert code == 1
    assert "text: has the control character U+000A at 1" in err


async def test_no_catalogue(run: Run) -> None:
    code, out, err = await run("feature", "early:0")
    assert (code, out) == (1, "")
    assert "has no catalogue; build one with `saeserve catalogue build early --data TEXT`" in err


async def test_search(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = (await run("search", "=", "--dictionary", "mid")).out
    assert out.splitlines() == [
        "feature  label              F1  fires on  tokens",
        'mid:1    token "="        0.95       1 %  ·= =',
        "mid:2    no simple label            30 %  , ·=",
        "mid:3    Python keywords  0.60     0.5 %  def ·return",
        "",
        "`saeserve feature mid:1` shows the first of them",
    ]
    everywhere = (await run("search", "spanish")).out
    assert "without a catalogue, only" in everywhere
    assert (await run("search", "nowhere", "--dictionary", "mid")).out == "no feature found\n"
    assert json.loads((await run("search", "spanish", "--json")).out)["hits"][0]["dictionary"] == "mid"


async def test_search_by_texts(run: Run) -> None:
    out = (await run("search", "--fires-on", "Once upon", "--silent-on", "12", "--limit", "4")).out.splitlines()
    assert out[0].split() == ["feature", "activation", "label", "F1", "fires", "on", "tokens"]
    assert len([line for line in out if ":" in line.split(" ")[0]]) == 4


async def test_search_for_nothing(run: Run) -> None:
    for line in (["search"], ["search", "a", "--fires-on", "b"], ["search", "--silent-on", "b"]):
        code, _, err = await run(*line)
        assert code == 2
        assert "give words, or --fires-on TEXT" in err


async def test_labels_in_other_commands(run: Run, address: str) -> None:
    """The column that names the feature stays whole, at 80 columns and in a pipe."""
    label = "a rather long label of a feature that has to wrap somewhere"
    async with AsyncClient(address) as client:
        for feature in range(5, 96):
            await client.label_feature("mid", feature, label)
    for line in (
        ["features", "Once upon", "--dictionary", "mid"],
        ["features", "Once upon", "--dictionary", "mid", "--aggregate", "max"],
        ["ablate", "Once upon", "--dictionary", "mid", "--strongest", "8"],
        ["attribute", "Once upon", "--dictionary", "mid", "--count", "8"],
        ["contrast", "--a-text", "ab", "--a-text", "abc", "--b-text", "12", "--b-text", "123", "--dictionary", "mid"],
        ["generate", "Once", "--show-features", "mid", "--max-new-tokens", "4", "--seed", "0", "--ignore-end-of-text"],
    ):
        out = (await run(*line)).out
        assert "label" in out
        assert "a rather long" in out, line
    rows = json.loads((await run("features", "Once", "--dictionary", "mid", "--json")).out)
    assert label in rows[0]["dictionaries"][0]["labels"].values()
