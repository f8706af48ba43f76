"""`saeserve tokenize` as it is called; the library's tests cover what it writes."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_runtime import Backbone
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


GOOD = b'{"text": "document"}\n'
BAD = {
    "half of a line": ("bad.jsonl", GOOD * 2 + b'{"text": "cut', "bad.jsonl:3: expected a JSON object"),
    "Latin-1": ("bad.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "bad.jsonl:2: byte 0xe9 is not UTF-8"),
    "a text file in Latin-1": ("bad.txt", b"one\ncaf\xe9", "bad.txt:2: byte 0xe9 is not UTF-8"),
    "null": ("bad.jsonl", GOOD + b'{"text": null}\n', "bad.jsonl:2: `text` is NoneType"),
    "too deep": ("bad.jsonl", GOOD + b"[" * 100_000, "bad.jsonl:2: the JSON is nested too deeply"),
    "a cut .gz": ("bad.jsonl.gz", gzip.compress(GOOD * 9)[:-10], "the file is cut or damaged here"),
    "plain text called .gz": ("bad.jsonl.gz", GOOD, "bad.jsonl.gz:1: the file is cut or damaged here"),
    "plain text called .xz": ("bad.txt.xz", GOOD, "bad.txt.xz:1: the file is cut or damaged here"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_stops_with_one_line_or_is_skipped(
    saeserve: Saeserve,
    text: Path,
    tmp_path: Path,
    tiny_backbone_folder: Path,  # noqa: F811
    name: str,
):
    file, content, message = BAD[name]
    bad = tmp_path / file
    bad.write_bytes(content)
    command = ["tokenize", str(text), str(bad), "--out", str(tmp_path / "t"), "--backbone", str(tiny_backbone_folder)]
    code, _, error = saeserve(*command)
    assert code == 1
    assert error.startswith(f"saeserve: {bad}:")
    assert message in error
    assert error.count("\n") == 1
    with pytest.warns(UserWarning, match=f"^skipped 1 document that cannot be used: {bad}:"):
        code, _, error = saeserve(*command, "--bad-documents", "skip")
    assert code == 0, error
    assert TokenFolder(tmp_path / "t").n_documents("train") >= 48


def test_a_name_that_is_not_utf_8_is_recorded(
    saeserve: Saeserve,
    text: Path,
    tmp_path: Path,
    tiny_backbone_folder: Path,  # noqa: F811
):
    named = text.rename(tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    command = ["tokenize", str(named), "--out", str(tmp_path / "t"), "--backbone", str(tiny_backbone_folder)]
    code, _, error = saeserve(*command)
    assert code == 0, error
    assert TokenFolder(tmp_path / "t").manifest.sources[0]["name"] == "caf\ufffd.jsonl"


def test_half_of_a_surrogate_pair_is_replaced(
    saeserve: Saeserve,
    tmp_path: Path,
    tiny_backbone_folder: Path,  # noqa: F811
):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d of it"}\n')
    command = ["tokenize", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "t"), "--held-out-fraction", "0"]
    code, _, error = saeserve(*command, "--backbone", str(tiny_backbone_folder), "--no-append-end-of-text")
    assert code == 0, error
    tokenizer = Backbone.load(tiny_backbone_folder).text_tokenizer
    assert tokenizer.decode(TokenFolder(tmp_path / "t").document("train", 0)) == "half \ufffd of it"
