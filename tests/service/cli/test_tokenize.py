"""`saeserve tokenize` as it is called; the library's tests cover what it writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_runtime.data.token_folder.reader import TokenFolder
from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)

Saeserve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(50)))
    return path


def test_writes_a_folder_and_checks_it(saeserve: Saeserve, text: Path, tmp_path: Path, tiny_backbone_folder: Path):  # noqa: F811
    out = tmp_path / "tokens"
    arguments = ("tokenize", str(text), "--out", str(out), "--backbone", str(tiny_backbone_folder))
    code, printed, _ = saeserve(*arguments, "--held-out-fraction", "0.2", "--no-append-end-of-text")
    assert code == 0
    assert f"Train on it: saeserve train --data {out}" in printed
    folder = TokenFolder(out)
    assert folder.n_documents("train") + folder.n_documents("held_out") == 50
    assert not folder.manifest.append_end_of_text
    code, printed, _ = saeserve("tokenize", "--check", str(out), "--json")
    assert code == 0
    assert json.loads(printed)["training documents"] == folder.n_documents("train")
    file = out / "train-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, _, error = saeserve("tokenize", "--check", str(out))
    assert code == 1
    assert "train-00000.npy has sha256" in error
    code, _, error = saeserve(*arguments)
    assert code == 1
    assert "exists; remove it" in error


def test_settings_come_from_a_file_and_flags(saeserve: Saeserve, text: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"sources": [str(text)], "out": str(tmp_path / "out"), "shard_token": 3}))
    code, _, error = saeserve("tokenize", "--config", str(config))
    assert (code, "shard_token: no such setting" in error) == (2, True)
    code, _, error = saeserve("tokenize", "--out", "x")
    assert (code, "sources is not given" in error) == (2, True)
    code, _, error = saeserve("tokenize", str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "x"))
    assert (code, "no file, folder or data set" in error) == (1, True)
