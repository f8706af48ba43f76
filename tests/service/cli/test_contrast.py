"""`saeserve contrast` on small random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_runtime.causal.texts_needed import texts_needed
from tests.service.cli.conftest import PNG, Run

FEW = ["--a-text", "ab", "--a-text", "cd", "--b-text", "1+2", "--b-text", "3*4", "--dictionary", "early"]
MANY = [*("--a-text", "aaa") * 12, *("--b-text", "zzz") * 12, "--dictionary", "early"]


async def test_features_and_a_suggestion(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\nthe dog\nthe horse\n")
    plot = tmp_path / "contrast.png"
    code, out, err = await run(
        "contrast", "--a", str(tmp_path / "a.txt"), "--b-text", "1 + 2", "--b-text", "3 * 4", "--dictionary", "mid",
        "--count", "5", "--suggest", "1", "--validate", "--plot", str(plot),
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("3 texts against 2; 0 of ")
    assert sum(line.startswith("mid:") for line in lines) >= 5
    assert any(line.startswith("Suggested: mid:") for line in lines)
    assert plot.read_bytes().startswith(PNG)


async def test_advice_where_there_are_too_few_texts(run: Run) -> None:
    out = " ".join((await run("contrast", *FEW)).out.split())
    n_tested = int(out.split("; 0 of ")[1].split()[0])
    assert "No feature passes a false discovery rate of 0.05. There are too few texts: with 2 and 2, " in out
    assert f"which takes {texts_needed(n_tested, 0.05)} texts in each set." in out


async def test_no_advice_where_features_pass(run: Run) -> None:
    assert "No feature" not in (await run("contrast", *MANY, "--count", "1")).out
    strict = await run("contrast", *MANY, "--fdr", "1e-12")
    assert "No feature passes a false discovery rate of 1e-12." in strict.out
    assert not any(line.startswith("early:") for line in strict.out.splitlines())


async def test_json(run: Run) -> None:
    assert json.loads((await run("contrast", *FEW, "--json")).out)["suggestion"] == []


async def test_a_set_needs_two_texts(run: Run) -> None:
    code, _, err = await run("contrast", "--a-text", "a", "--b-text", "b")
    assert code == 2
    assert "expected at least 2 each" in err


@pytest.mark.parametrize("columns", ["40", "80", None], ids=["40 columns", "80 columns", "a pipe"])
async def test_features_are_named_in_full(run: Run, monkeypatch: pytest.MonkeyPatch, columns: str | None) -> None:
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS")
    out = (await run("contrast", *FEW, "--count", "3", "--suggest", "1", "--validate")).out
    names = [line.split(" ")[0] for line in out.splitlines() if line.startswith("early:")]
    document = json.loads((await run("contrast", *FEW, "--count", "3", "--json")).out)
    assert names[:3] == [f"early:{feature['feature'][1]}" for feature in document["features"]]
    assert "…" not in out


async def test_edits_of_a_suggestion_wrap_between_edits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = (await run("contrast", *MANY, "--suggest", "3", "--validate")).out.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("Suggested: ")]
    trials = [line for line in lines[start:] if line.startswith("early:")]
    assert len(trials) > 3, "one line an edit, several strengths"
    assert max(map(len, lines)) <= 80
