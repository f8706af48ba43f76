"""`saeserve publish`: from any format to a published folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_runtime import load_dictionary
from tests import golden
from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)

Saeserve = Callable[..., tuple[int, str, str]]
GOLDEN = golden.FOLDER


def test_publish_with_statistics(saeserve: Saeserve, tmp_path: Path, tiny_backbone_folder: Path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("a cat and a dog and a fox " * 20)
    command = ["publish", str(GOLDEN / "sparsify_topk"), "--backbone", str(tiny_backbone_folder)]
    code, out, err = saeserve(*command, str(tmp_path / "d"))
    assert code == 1
    assert "does not say which site it reads" in err
    code, out, err = saeserve(
        *command, str(tmp_path / "d"), "--site", "0.resid_pre", "--name", "cats", "--data", str(text), "--tokens", "64"
    )
    assert code == 0, err
    assert "over 64 tokens" in out
    published = load_dictionary(tmp_path / "d")
    assert (published.name, published.site, published.activation) == ("cats", "0.resid_pre", "topk")
    assert published.statistics is not None
    assert published.statistics.n_tokens == 64

    code, out, err = saeserve(*command, str(tmp_path / "d"), "--site", "0.resid_pre")
    assert code == 1
    assert "exists" in err
    statistics = str(tmp_path / "d" / "stats.safetensors")
    code, out, err = saeserve(
        *command, str(tmp_path / "e"), "--site", "0.resid_pre", "--statistics", statistics, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["statistics_tokens"] == 64


def test_a_builtin_dictionary_fits(saeserve: Saeserve, tmp_path: Path):
    code, out, err = saeserve("publish", "resid-mid", str(tmp_path / "d"), "--json")
    assert (code, err) == (0, "")
    fit = json.loads(out)["fit"]
    assert 0 < fit["nmse"] < 0.5
    assert fit["n_tokens"] >= 8_192
    shown = saeserve("publish", "resid-mid", str(tmp_path / "e"))[1]
    assert f"{fit['nmse']:.4f} over {int(fit['n_tokens']):,} tokens" in shown


def test_a_dictionary_of_another_model_is_told(
    saeserve: Saeserve,
    tmp_path: Path,
    tiny_backbone_folder: Path,  # noqa: F811
):
    """Random weights reconstruct nothing, and the file names gpt2."""
    command = ["publish", str(GOLDEN / "saelens_gated_layernorm_nosub"), "--backbone", str(tiny_backbone_folder)]
    code, out, err = saeserve(*command, str(tmp_path / "d"))
    assert code == 0
    assert f"made for gpt2; the backbone is {tiny_backbone_folder}" in err
    assert "which is worse than predicting the mean activation" in err
    assert "(1 is predicting the mean)" in out
    # A published one names its backbone's weights, and is refused.
    code, _, err = saeserve("publish", str(tmp_path / "d"), str(tmp_path / "e"))
    assert code == 1
    assert "was made for backbone" in err
    assert not (tmp_path / "e").exists()


def test_a_site_that_is_not_there_is_refused(saeserve: Saeserve, tmp_path: Path, tiny_backbone_folder: Path):  # noqa: F811
    command = ["publish", str(GOLDEN / "sparsify_topk"), str(tmp_path / "d"), "--backbone", str(tiny_backbone_folder)]
    code, _, err = saeserve(*command, "--site", "7.resid_pre")
    assert code == 1
    assert "layers 0 to 1" in err


def test_a_bad_document_stops_with_one_line_or_is_skipped(
    saeserve: Saeserve,
    tmp_path: Path,
    tiny_backbone_folder: Path,  # noqa: F811
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a cat and a dog and a fox, and all of them again"}\n{"text": 3}\n')
    command = ["publish", str(GOLDEN / "sparsify_topk"), str(tmp_path / "d"), "--backbone", str(tiny_backbone_folder)]
    command += ["--site", "0.resid_pre", "--data", str(bad), "--tokens", "64"]
    code, _, error = saeserve(*command)
    assert code == 1
    assert error == f"saeserve: {bad}:2: `text` is int, expected a string\n"
    with pytest.warns(UserWarning, match=f"^skipped 1 document that cannot be used: {bad}:2"):
        code, _, error = saeserve(*command, "--bad-documents", "skip")
    assert code == 0, error
