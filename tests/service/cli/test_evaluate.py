"""`saeserve evaluate`: settings, files and messages; the measurements are tested in tests/sae_runtime/evaluation."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_runtime import Backbone
from sae_runtime.dictionary.formats.published import save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.evaluation.settings import EvaluationSettings
from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)
from tests.sae_runtime.evaluation.reference import random_dictionary

Saeserve = Callable[..., tuple[int, str, str]]

QUICK = [
    *("--tokens", "300", "--baseline-tokens", "100", "--feature-tokens", "600", "--resamples", "20"),
    *("--ablation-positions", "2", "--ablation-window", "16", "--ablation-horizon", "4"),
    *("--single-splice-positions", "2", "--n2g-latents", "2", "--n2g-examples", "4", "--n2g-max-length", "3"),
]


@pytest.fixture
def published(tmp_path: Path, tiny_backbone_folder: Path) -> Path:  # noqa: F811
    n = 48
    statistics = LatentStatistics(
        firing_rate=torch.zeros(n),
        mean=torch.zeros(n),
        mean_square=torch.zeros(n),
        max=torch.ones(n),
        quantiles=torch.zeros(n, 1),
        quantile_levels=torch.tensor([0.5]),
        n_tokens=10,
    )
    fingerprint = Backbone.load(tiny_backbone_folder).fingerprint
    save_dictionary(
        random_dictionary(),
        tmp_path / "tiny",
        backbone=BackboneReference(str(tiny_backbone_folder), fingerprint),
        statistics=statistics,
        name="tiny",
        dtype="float32",
    )
    return tmp_path / "tiny"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text("Some text = 12, and then some more.\n" * 30)
    return path


def test_writes_the_report_and_shows_the_figures(saeserve: Saeserve, published: Path, text: Path, tmp_path: Path):
    out_folder = tmp_path / "report"
    code, out, err = saeserve("evaluate", str(published), "--data", str(text), "--out", str(out_folder), *QUICK)
    assert code == 0, err
    figures = json.loads((out_folder / "evaluation.json").read_text())
    assert f"{figures['nmse']:.4f}" in out
    assert f"Everything is in {out_folder}" in out
    assert "# tiny" in (out_folder / "CARD.md").read_text()
    assert (out_folder / "plots" / "latents.png").is_file()
    assert "baselines 0 of 320 tokens" in err
    assert "splice 320 of 320 tokens" in err

    (tmp_path / "settings.yaml").write_text(f"data: [{text}]\ntokens: 999\nseed: 0\n")
    config = ("--config", str(tmp_path / "settings.yaml"), "--out", str(out_folder), "--json")
    code, out, err = saeserve("evaluate", str(published), *config, *QUICK)  # flags win over the file
    assert code == 0, err
    assert json.loads(out) == {"dictionary": str(published), "path": str(out_folder), "figures": figures}


def test_without_matplotlib(
    saeserve: Saeserve, published: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    code, out, err = saeserve("evaluate", str(published), "--data", str(text), *QUICK)
    assert code == 1
    assert "plots need matplotlib, which is not installed: pip install 'saeserve[evaluate]'" in err.replace("\n", " ")
    assert "Everything is in tiny-evaluation" in out  # named after the dictionary where --out is not given
    assert (tmp_path / "tiny-evaluation" / "evaluation.json").is_file()


def test_every_setting_has_a_flag(saeserve: Saeserve):
    out = saeserve("evaluate", "--help")[1]
    for name in EvaluationSettings.model_fields:
        assert f"--{name.replace('_', '-')} " in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-dictionary", "--data", "{file}"], 1, "no-such-dictionary"),
        (["x", "--data", "{file}", "{file}.none"], 1, "no text file or token folder at {file}.none"),
        (["x", "--tokens", "many"], 2, "tokens: Input should be a valid integer"),
        (["x", "--baseline-tokens", "5", "--tokens", "4"], 2, "baseline_tokens is 5, more than tokens = 4"),
        (["x", "--config", "{file}"], 2, "found str, expected a mapping of settings"),
        (["x", "--config", "{file}.none"], 2, "cannot read settings"),
    ],
)
def test_what_is_wrong(saeserve: Saeserve, text: Path, arguments: list[str], code: int, message: str):
    exit_code, out, err = saeserve("evaluate", *(argument.replace("{file}", str(text)) for argument in arguments))
    assert (exit_code, out) == (code, "")
    assert message.replace("{file}", str(text)) in err


def test_a_backbone_that_it_was_not_made_for(saeserve: Saeserve, published: Path, text: Path):
    code, _, err = saeserve("evaluate", str(published), "--data", str(text), "--backbone", "builtin")
    assert code == 1
    assert "was made for backbone" in err


def test_a_bad_document_stops_with_one_line_or_is_skipped(
    saeserve: Saeserve, published: Path, text: Path, tmp_path: Path
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n["a list"]\n')
    command = ["evaluate", str(published), "--data", str(text), str(bad), "--out", str(tmp_path / "report"), *QUICK]
    code, _, error = saeserve(*command)
    assert code == 1
    assert error.splitlines()[-1].startswith(f"saeserve: {bad}:2: expected a JSON object")
    assert "Traceback" not in error
    with pytest.warns(UserWarning, match=f"^skipped 1 document that cannot be used: {bad}:2"):
        code, _, error = saeserve(*command, "--bad-documents", "skip")
    assert code == 0, error
    assert "setting_bad_documents" not in json.loads((tmp_path / "report" / "evaluation.json").read_text())


def test_a_name_that_is_not_utf_8_is_recorded(saeserve: Saeserve, published: Path, text: Path, tmp_path: Path):
    named = text.rename(tmp_path / os.fsdecode(b"caf\xe9.txt"))
    code, _, error = saeserve("evaluate", str(published), "--data", str(named), "--out", str(tmp_path / "r"), *QUICK)
    assert code == 0, error
    assert json.loads((tmp_path / "r" / "evaluation.json").read_text())["setting_data"] == ["caf\ufffd.txt"]


def test_a_package_that_is_missing_is_one_line(
    saeserve: Saeserve, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"anything")
    code, _, error = saeserve("evaluate", str(published), "--data", str(tmp_path / "a.txt.zst"))
    assert (code, "needs the package zstandard" in error) == (1, True)
