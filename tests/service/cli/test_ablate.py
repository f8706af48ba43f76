"""`saeserve ablate` on small random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.service.cli.conftest import PNG, Run


async def test_the_strongest_features(run: Run, tmp_path: Path) -> None:
    texts, plot = tmp_path / "texts.txt", tmp_path / "ablate.png"
    texts.write_text("Once upon a time\n\nthere was a king\n")
    code, out, err = await run(
        "ablate", "--file", str(texts), "--lines", "--strongest", "4", "--dictionary", "mid", "--distance", "1",
        "--ablation", "zero", "--ablation", "mean", "--logit-token", "e", "--plot", str(plot),
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("2 texts, 30 predictions, loss ")
    effects, by_distance = out.split("KL by distance from the ablated token\n")
    for table in (effects, by_distance):  # 4 features, 2 ablations
        rows = [line.split() for line in table.splitlines() if line.startswith("mid:")]
        assert len({(feature, ablation) for feature, ablation, *_ in rows}) == 8
        assert {ablation for _, ablation, *_ in rows} == {"zero", "mean"}
    assert plot.read_bytes().startswith(PNG)


async def test_given_features(run: Run) -> None:
    document = json.loads((await run("ablate", "abc", "--feature", "3", "--dictionary", "mid", "--json")).out)
    assert [effect["feature"] for effect in document["effects"]] == [["mid", 3]]


async def test_features_that_cannot_be_ablated(run: Run) -> None:
    code, _, err = await run("ablate", "abc", "--feature", "mid:999")
    assert code == 1
    assert "feature 999 is outside 0..95 of 'mid'" in err
    code, _, err = await run("ablate", "abc", "--feature", "3")
    assert code == 2
    assert "of which dictionary?" in err
    code, _, err = await run("ablate", "abc", "--feature", "3", "--dictionary", "mid", "--dictionary", "wide")
    assert (code, err) == (2, "saeserve: --feature takes one --dictionary; write NAME:FEATURE for others\n")


@pytest.mark.parametrize("columns", ["40", "80", None], ids=["40 columns", "80 columns", "a pipe"])
async def test_features_are_named_in_full(run: Run, monkeypatch: pytest.MonkeyPatch, columns: str | None) -> None:
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS")
    out = (await run("ablate", "abc", "--feature", "early:95", "--distance", "1", "--logit-token", "e")).out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("early:")] == ["early:95"] * 2
    assert "…" not in out
