"""`saeserve attribute` on small random models."""

from __future__ import annotations

import json
from pathlib import Path

from tests.service.cli.conftest import PNG, Run


async def test_a_table_of_pairs(run: Run, tmp_path: Path) -> None:
    plot = tmp_path / "attribute.png"
    code, out, err = await run(
        "attribute", "Once upon", "--target", "e", "--foil", "#9", "--count", "6", "--plot", str(plot)
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("logit of 'e' minus that of ')' after token 8: ")
    assert sum(line.split(":")[0] in ("early", "mid", "wide", "delta", "plain") for line in lines) == 6
    assert "Spearman" in lines[-1]
    assert plot.read_bytes().startswith(PNG)


async def test_json(run: Run) -> None:
    document = json.loads((await run("attribute", "Once", "--count", "2", "--json")).out)
    assert len(document["attributions"]) == 2
    assert document["foil_id"] is None
