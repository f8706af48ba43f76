"""`saeserve score` on small random models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.service.cli.conftest import PNG, Run


async def test_tables_of_texts_and_tokens(run: Run, tmp_path: Path) -> None:
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


async def test_without_edits_there_are_no_columns_of_changes(run: Run) -> None:
    lines = (await run("score", "abc", "x=1", "--summary")).out.splitlines()
    assert lines[0] == "no edits"
    assert lines[1].split() == ["text", "tokens", "loss", "right"]
    assert [len(line.split()) for line in lines[2:4]] == [4, 4]
    assert "edited" not in lines[-1]


async def test_json(run: Run) -> None:
    document = json.loads((await run("score", "abc", "--set", "mid:3=9", "--json")).out)
    (entry,) = document["scores"]["inputs"]
    assert document["edits"][0]["feature"] == 3
    assert len(entry["unedited"]["loss"]) == len(entry["edited"]["loss"]) == 2
    assert len(entry["kl"]) == 3


async def test_no_text(run: Run) -> None:
    code, _, err = await run("score")
    assert (code, err) == (2, 'saeserve: no text; try: saeserve score "The cat sat on the mat."\n')


async def test_a_plot_without_matplotlib(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = await run("score", "abc", "--plot", str(tmp_path / "no.png"))
    assert code == 1
    assert "2 predictions" in out
    assert "pip install 'saeserve[evaluate]'" in err
    assert not (tmp_path / "no.png").exists()
