"""A folder that stops at a bad document keeps what it has, and goes on once the text is mended or with skip."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from sae_runtime.data.token_folder.manifest import TokenManifest
from tests.sae_runtime.data.token_folder.examples import stored, texts, write_jsonl

pytestmark = pytest.mark.any_cpu


@pytest.fixture
def with_a_cut_line(tmp_path: Path) -> list[Path]:
    """A file whose line 350 is cut, after more text than is tokenized at a time, and a file without fault."""
    path = write_jsonl(tmp_path / "cut.jsonl", [f"{i} " + "long " * 180 for i in range(400)])
    lines = path.read_text().splitlines()
    lines[349] = '{"text": "cut'
    path.write_text("\n".join(lines))
    return [path, write_jsonl(tmp_path / "whole.jsonl", texts(40))]


def mend(path: Path) -> None:
    path.write_text(path.read_text().replace('{"text": "cut', json.dumps({"text": "mended " * 1000})))


@pytest.mark.parametrize("remedy", ["skip", "mend"])
def test_a_folder_that_stopped_at_a_bad_line_goes_on(
    make: Callable[..., TokenManifest], with_a_cut_line: list[Path], tmp_path: Path, remedy: str
) -> None:
    with pytest.raises(ValueError, match=r"cut\.jsonl:350: expected a JSON object"):
        make(with_a_cut_line, shard_tokens=10**9)
    partial = tmp_path / "tokens.partial"
    before = json.loads((partial / "journal.json").read_text())
    assert before["documents"] > 250  # what was tokenized is kept, though its file was not full
    written = (partial / "train-00000.npy").stat().st_mtime_ns
    folder, whole = tmp_path / "tokens", tmp_path / "whole"
    settings: dict[str, Any] = {}
    told: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if remedy == "mend":
        mend(with_a_cut_line[0])
    else:
        settings = {"bad_documents": "skip"}
        told = pytest.warns(UserWarning, match=r"^skipped 1 document that cannot be used: .*cut\.jsonl:350: ")
    with told:
        manifest = make(with_a_cut_line, shard_tokens=10**9, **settings)
        make(with_a_cut_line, out=whole, **settings)  # nothing interrupts this one
    assert (folder / "train-00000.npy").stat().st_mtime_ns == written
    for split in ("train", "held_out"):
        assert sorted(stored(folder, split)) == sorted(stored(whole, split))
    assert manifest.documents("train") + manifest.documents("held_out") == 440 - (remedy == "skip")


@pytest.fixture
def changed_tokenizer(tiny_backbone_folder: Path, tmp_path: Path) -> Callable[[Callable[[Tokenizer], Any]], Path]:
    def change(how: Callable[[Tokenizer], Any]) -> Path:
        folder = shutil.copytree(tiny_backbone_folder, tmp_path / "changed")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        how(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return change


def test_a_document_that_spells_a_token_without_an_embedding_is_named_or_skipped(
    make: Callable[..., TokenManifest], tmp_path: Path, changed_tokenizer: Any
) -> None:
    backbone = str(changed_tokenizer(lambda tokenizer: tokenizer.add_tokens(["<extra>"])))
    text = write_jsonl(tmp_path / "a.jsonl", ["abc", "an <extra> token", "de"])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: holds '<extra>', token id 257 .* vocabulary of 257$"):
        make([text], backbone=backbone, held_out_fraction=0)
    with pytest.warns(UserWarning, match=r"^skipped 1 document .*a\.jsonl:2: holds '<extra>'"):
        make([text], backbone=backbone, held_out_fraction=0, bad_documents="skip")
    assert [len(document) for document in stored(tmp_path / "tokens", "train")] == [4, 3]


def test_a_tokenizer_that_changes_text_is_refused_at_the_start(
    make: Callable[..., TokenManifest], corpus: list[Path], tmp_path: Path, changed_tokenizer: Any
) -> None:
    backbone = str(changed_tokenizer(lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase())))
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        make(corpus, backbone=backbone)
    assert not (tmp_path / "tokens.partial").exists()


def test_a_document_that_is_in_a_shard_must_not_change(
    make: Callable[..., TokenManifest], with_a_cut_line: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cut\.jsonl:350"):
        make(with_a_cut_line)
    path = with_a_cut_line[0]
    path.write_text(path.read_text().replace("7 long", "7 brief", 1))
    mend(path)
    with pytest.raises(ValueError, match=r"documents that .*tokens\.partial was begun with have changed: .*--restart"):
        make(with_a_cut_line)
    assert make(with_a_cut_line, restart=True).documents("train") > 400
