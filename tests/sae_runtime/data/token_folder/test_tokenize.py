"""Token folders hold the text's tokens once, apart from what is held out, and train exactly as the text does."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_runtime import Backbone
from sae_runtime.data.token_folder import tokenize as tokenize_module
from sae_runtime.data.token_folder.manifest import TokenManifest, read_manifest
from sae_runtime.data.token_folder.reader import TokenFolder
from sae_runtime.data.token_folder.tokenize import TokenizeProgress
from sae_runtime.training.activations.run_rows import (
    data_fingerprint,
    describe_data,
    held_out_rows,
    row_cutter,
    training_rows,
)
from sae_runtime.training.config import TrainingConfig
from tests.sae_runtime.data.token_folder.examples import stored, texts, write_jsonl

pytestmark = pytest.mark.any_cpu

END = 0


def train_config(data: list[Path], backbone: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig(site="0.resid_pre", data=tuple(data), backbone=str(backbone), out=Path("unused"), **settings)


def encode(backbone: Backbone, document: str) -> list[int]:
    assert backbone.tokenizer is not None
    return list(backbone.tokenizer.encode(document))


def test_every_document_is_stored_once_in_one_split(
    make: Callable[..., TokenManifest], corpus: list[Path], tmp_path: Path, tiny_backbone: Backbone
) -> None:
    manifest = make(corpus, held_out_fraction=0.2)
    folder = tmp_path / "tokens"
    train, held_out = stored(folder, "train"), stored(folder, "held_out")
    expected = sorted([*encode(tiny_backbone, text), END] for text in texts(80) + texts(60, 1))
    assert sorted(train + held_out) == expected
    assert {tuple(d) for d in train}.isdisjoint(tuple(d) for d in held_out)
    assert 12 <= len(held_out) <= 45
    assert len(manifest.train) > 1
    assert manifest.tokens("train") == sum(map(len, train))
    assert manifest.documents("held_out") == len(held_out)
    assert (manifest.dtype, manifest.context_length, manifest.tokenizer.end_of_text) == ("uint16", 32, END)
    assert manifest.tokenizer.fingerprint == tiny_backbone.tokenizer_fingerprint
    names = {file for shard in (*manifest.train, *manifest.held_out) for file in shard.files}
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json"}
    assert not (tmp_path / "tokens.partial").exists()


def test_special_tokens_are_as_asked_for(
    make: Callable[..., TokenManifest], tmp_path: Path, tiny_backbone: Backbone
) -> None:
    text = write_jsonl(tmp_path / "one.jsonl", ["abc", ""])
    abc = encode(tiny_backbone, "abc")
    for append, prepend in ((True, True), (False, False), (False, True)):
        out = tmp_path / f"{append}{prepend}"
        make([text], out=out, append_end_of_text=append, prepend_begin_of_text=prepend, held_out_fraction=0)
        assert stored(out, "train") == [[END] * prepend + abc + [END] * append]


@pytest.mark.parametrize("extra", [{}, {"rows": "documents"}, {"prepend_end_of_text": True}, {"context_length": 7}])
def test_training_rows_are_those_of_the_text(
    make: Callable[..., TokenManifest],
    corpus: list[Path],
    tmp_path: Path,
    tiny_backbone: Backbone,
    tiny_backbone_folder: Path,
    extra: dict[str, Any],
) -> None:
    make(corpus, held_out_fraction=0.2, context_length=16)
    direct_extra = {"context_length": 16, **extra}
    direct = training_rows(
        train_config(corpus, tiny_backbone_folder, held_out_fraction=0.2, **direct_extra), tiny_backbone
    )
    config = train_config([tmp_path / "tokens"], tiny_backbone_folder, **extra)
    folder = training_rows(config, tiny_backbone)
    expected = []
    while direct.epoch < 3:
        expected.append(next(direct))
    found = []
    epochs = set()
    for _ in expected:
        found.append(next(folder))
        epochs.add(folder.epoch)
    assert found == expected
    assert epochs == {0, 1, 2, 3}
    for taken in (0, 1, 50, len(expected) - 3):  # a position is restored exactly
        first, second = (training_rows(config, tiny_backbone) for _ in range(2))
        assert [next(first) for _ in range(taken)] == expected[:taken]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [next(second) for _ in expected[taken:]] == expected[taken:]


def test_training_never_sees_held_out_documents(
    make: Callable[..., TokenManifest], tmp_path: Path, tiny_backbone: Backbone, tiny_backbone_folder: Path
) -> None:
    # Every document is a row of its own letter pair, so a row tells its document.
    documents = [f"{chr(97 + i)}{chr(97 + j)}" * 8 for i in range(12) for j in range(12)]
    make([write_jsonl(tmp_path / "pairs.jsonl", documents * 2)], held_out_fraction=0.3)
    config = train_config([tmp_path / "tokens"], tiny_backbone_folder, rows="documents")
    trained = {tuple(row) for row in islice(iter(training_rows(config, tiny_backbone)), 1000)}  # type: ignore[call-overload]
    held_out = {tuple(row) for row in held_out_rows(config, tiny_backbone, 10**6)}
    assert trained.isdisjoint(held_out)
    assert trained | held_out == {tuple(encode(tiny_backbone, document)) for document in documents}
    assert 25 <= len(held_out) <= 65


def test_held_out_rows_are_a_seeded_sample(
    make: Callable[..., TokenManifest],
    corpus: list[Path],
    tmp_path: Path,
    tiny_backbone: Backbone,
    tiny_backbone_folder: Path,
) -> None:
    make(corpus, held_out_fraction=0.3)
    rows = {
        seed: list(
            held_out_rows(train_config([tmp_path / "tokens"], tiny_backbone_folder, seed=seed), tiny_backbone, 96)
        )
        for seed in (0, 1)
    }
    assert rows[0] != rows[1]
    assert [len(row) for row in rows[0]] == [32] * 3
    everything = list(held_out_rows(train_config([tmp_path / "tokens"], tiny_backbone_folder), tiny_backbone, 10**6))
    n_tokens = read_manifest(tmp_path / "tokens").tokens("held_out")
    assert n_tokens - 32 < sum(map(len, everything)) <= n_tokens


class Stop(BaseException):
    """As if the process had been killed: nothing may be tidied up for it."""


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_an_interrupted_call_goes_on_and_gives_the_same_bytes(
    make: Callable[..., TokenManifest],
    corpus: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    whole = make(corpus, out=tmp_path / "whole")
    written: list[str] = []
    write = tokenize_module.OpenShard.write

    def stopping_write(self: Any, folder: Path, name: str) -> Any:
        written.append(name)
        if len(written) == stop_at:
            (folder / f"{name}.npy").write_bytes(b"half a file")
            raise Stop
        return write(self, folder, name)

    monkeypatch.setattr(tokenize_module.OpenShard, "write", stopping_write)
    with pytest.raises(Stop):
        make(corpus)
    assert not (tmp_path / "tokens").exists()
    monkeypatch.setattr(tokenize_module.OpenShard, "write", write)
    encoded: list[str] = []
    batches = tokenize_module.encoded
    monkeypatch.setattr(
        tokenize_module,
        "encoded",
        lambda documents, *rest: batches((encoded.append(d.text) or d for d in documents), *rest),  # type: ignore[func-returns-value]
    )
    resumed = make(corpus)
    assert resumed == whole
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "tokens" / file.name).read_bytes() == file.read_bytes()
    # The first two files are the first pair of shards; what is finished is not tokenized again.
    assert len(encoded) == 140 if stop_at <= 2 else len(encoded) < 140


def test_an_unfinished_folder_of_other_settings_is_refused_until_restart(
    make: Callable[..., TokenManifest], corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = tokenize_module._put_manifest
    monkeypatch.setattr(
        tokenize_module, "_put_manifest", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space left"):
        make(corpus)
    monkeypatch.setattr(tokenize_module, "_put_manifest", put)
    with pytest.raises(ValueError, match=r"settings: held_out_fraction was 0\.02, is 0\.5; go on with .*--restart"):
        make(corpus, held_out_fraction=0.5)
    with corpus[0].open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"begun with other sources"):
        make(corpus)
    partial = tmp_path / "tokens.partial"
    shard = partial / "train-00000.npy"
    assert make(corpus, restart=True).documents("train") > 100
    assert not partial.exists()
    assert (tmp_path / "tokens" / shard.name).exists()


def test_damage_is_found(
    make: Callable[..., TokenManifest], corpus: list[Path], tmp_path: Path, tiny_backbone_folder: Path
) -> None:
    make(corpus)
    folder = tmp_path / "tokens"
    file = folder / "train-00001.npy"
    good = file.read_bytes()
    TokenFolder(folder).check_sums()
    file.write_bytes(good[:-2] + bytes([good[-2] ^ 1, good[-1]]))
    with pytest.raises(ValueError, match=r"train-00001\.npy has sha256 .*, expected .*: it was changed or damaged"):
        TokenFolder(folder).check_sums()
    file.write_bytes(good[:-2])
    with pytest.raises(ValueError, match=r"train-00001\.npy has \d+ bytes, expected \d+"):
        TokenFolder(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.npy is missing"):
        TokenFolder(folder)
    (folder / "manifest.json").write_text('{"schema_version": 2}')
    with pytest.raises(ValueError, match="is not the manifest of a token folder: schema_version"):
        read_manifest(folder)


def test_another_tokenizer_is_named_and_refused(
    make: Callable[..., TokenManifest],
    corpus: list[Path],
    tmp_path: Path,
    tiny_backbone: Backbone,
    tiny_backbone_folder: Path,
) -> None:
    make(corpus)
    path = tmp_path / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"] |= {"fingerprint": "f" * 64, "backbone": "another"}
    path.write_text(json.dumps(manifest))
    config = train_config([tmp_path / "tokens"], tiny_backbone_folder)
    message = (
        rf"tokenizer {'f' * 64} \(of backbone 'another'\), found backbone .* {tiny_backbone.tokenizer_fingerprint}"
    )
    with pytest.raises(ValueError, match=message):
        training_rows(config, tiny_backbone)
    with pytest.raises(ValueError, match=message):
        list(held_out_rows(config, tiny_backbone, 100))


def test_settings_that_do_not_fit_a_token_folder(
    make: Callable[..., TokenManifest],
    corpus: list[Path],
    tmp_path: Path,
    tiny_backbone: Backbone,
    tiny_backbone_folder: Path,
) -> None:
    folder = tmp_path / "tokens"
    make(corpus, prepend_begin_of_text=True, context_length=20)
    assert row_cutter(train_config([folder], tiny_backbone_folder), tiny_backbone).context_length == 20
    with pytest.raises(ValueError, match=r"held_out_fraction is 0\.5, but .*tokens was tokenized with 0\.02"):
        training_rows(train_config([folder], tiny_backbone_folder, held_out_fraction=0.5), tiny_backbone)
    with pytest.raises(ValueError, match="expected it alone"):
        training_rows(train_config([folder, *corpus], tiny_backbone_folder), tiny_backbone)
    with pytest.raises(ValueError, match="is a folder, expected files or a token folder"):
        training_rows(train_config([tmp_path], tiny_backbone_folder), tiny_backbone)
    both = {"rows": "documents", "prepend_end_of_text": True}
    with pytest.raises(ValueError, match="begin with that token already"):
        training_rows(train_config([folder], tiny_backbone_folder, **both), tiny_backbone)
    with pytest.raises(FileExistsError, match="exists; remove it"):
        make(corpus)
    with pytest.raises(ValueError, match="context_length is 64, the backbone reads at most 32"):
        make(corpus, out=tmp_path / "other", context_length=64)
    assert describe_data(train_config([folder], tiny_backbone_folder)).startswith("tokens (")


def test_fingerprints_follow_the_content(
    make: Callable[..., TokenManifest], corpus: list[Path], tmp_path: Path, tiny_backbone_folder: Path
) -> None:
    for name, settings in {
        "a": {},
        "b": {},
        "c": {"append_end_of_text": False},
        "d": {"held_out_fraction": 0.3},
    }.items():
        make(corpus, out=tmp_path / name, **settings)
    fingerprints = [data_fingerprint(train_config([tmp_path / name], tiny_backbone_folder)) for name in "abcd"]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_progress_ends_with_everything_read(make: Callable[..., TokenManifest], corpus: list[Path]) -> None:
    events: list[TokenizeProgress] = []
    make(corpus, events.append)
    assert (events[-1].share, events[-1].documents) == (1.0, 140)


def test_a_source_that_cannot_be_read_leaves_no_folder(make: Callable[..., TokenManifest], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "empty.jsonl").touch()
    for name, message in {"bad.jsonl": "bad.jsonl:2: `text` is int", "empty.jsonl": "no text to train on in"}.items():
        with pytest.raises(ValueError, match=message):
            make([tmp_path / name], restart=True)
        assert not (tmp_path / "tokens").exists()


def test_large_vocabularies_take_32_bits(
    make: Callable[..., TokenManifest], corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Backbone.load

    def wide(*arguments: Any, **options: Any) -> Backbone:
        backbone = load(*arguments, **options)
        backbone.vocab_size = 70_000
        return backbone

    monkeypatch.setattr(Backbone, "load", wide)
    assert make(corpus).dtype == "uint32"
    assert np.load(tmp_path / "tokens" / "train-00000.npy").dtype == np.uint32
