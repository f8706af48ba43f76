"""Rows hold exactly the text's tokens, mixed over files, and continue exactly where a state was saved."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from sae_runtime import Backbone
from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.documents import Document
from sae_runtime.data.rows import (
    CutterState,
    RowCutter,
    TrainingRows,
    encode_texts,
    encoded,
    is_held_out,
    mixed_documents,
    packed_passes,
    shuffled_held_out,
    take_tokens,
)

END = 0


def encode(texts: list[str]) -> list[list[int]]:
    """One token a character."""
    return [[ord(c) for c in text] for text in texts]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    small = [f"small document {i}." for i in range(40)]
    large = [f"a larger document, number {i}, " + "with more text " * 20 for i in range(20)]
    return [jsonl(tmp_path / "small.jsonl", small), jsonl(tmp_path / "large.jsonl", large)]


def test_packed_rows_join_documents_by_end_of_text() -> None:
    state = CutterState()
    rows = list(RowCutter(encode, END, 4).cut([Document("abc", ""), Document("defgh", "")], state))
    assert rows == [[97, 98, 99, END], [100, 101, 102, 103]]
    assert state.remainder == [104, END]
    assert state.documents == 2


def test_document_rows_belong_to_one_document_and_may_begin_with_end_of_text() -> None:
    documents = [Document("abcdef", ""), Document("", ""), Document("gh", "")]
    rows = list(RowCutter(encode, END, 4, "documents", prepend_end_of_text=True).cut(documents, CutterState()))
    assert rows == [[END, 97, 98, 99], [END, 100, 101, 102], [END, 103, 104]]


def test_a_row_of_one_token_is_left_out() -> None:
    rows = list(RowCutter(encode, END, 4, "documents").cut([Document("abcde", "")], CutterState()))
    assert rows == [[97, 98, 99, 100]]


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_rows_continue_exactly_from_every_state(files: list[Path], mode: str) -> None:
    cutter = RowCutter(encode, END, 16, mode)  # type: ignore[arg-type]
    rows = TrainingRows(files, cutter, held_out_fraction=0.2)
    uninterrupted = list(islice(rows, 1200))  # more than two epochs
    for taken in (0, 1, 7, 300, 601, 1000):
        first = TrainingRows(files, cutter, held_out_fraction=0.2)
        assert list(islice(first, taken)) == uninterrupted[:taken]
        second = TrainingRows(files, cutter, held_out_fraction=0.2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert list(islice(second, 1200 - taken)) == uninterrupted[taken:]


def test_files_are_read_in_proportion_to_their_size(files: list[Path]) -> None:
    kinds = [d.kind for d in mixed_documents(files)]
    assert kinds.count("small") == 40
    assert kinds.count("large") == 20
    # Neither is read first: when half of the large ones are read, so is a good part of the small ones.
    half = [i for i, kind in enumerate(kinds) if kind == "large"][9]
    assert 10 <= kinds[:half].count("small") <= 30


def test_held_out_documents_are_never_trained_on(files: list[Path]) -> None:
    documents = list(mixed_documents(files))
    held_out = [d for d in documents if is_held_out(d, 0.25)]
    assert 5 <= len(held_out) <= 25
    assert [d for d in documents if is_held_out(d, 0.0)] == []
    cutter = RowCutter(encode, END, 512, "documents")
    trained = {tuple(row) for row in islice(TrainingRows(files, cutter, 0.25), 100)}
    assert trained.isdisjoint(tuple(encode([d.text])[0]) for d in held_out)
    assert len(trained) == len(documents) - len(held_out)


def test_held_out_documents_are_shuffled_by_the_seed_and_bounded() -> None:
    documents = [Document(f"{i:04}", "") for i in range(100)]
    chosen = shuffled_held_out(documents, max_characters=200, seed=1)
    assert sorted(d.text for d in chosen) == [f"{i:04}" for i in range(50)]
    assert chosen == shuffled_held_out(documents, max_characters=200, seed=1)
    assert chosen != shuffled_held_out(documents, max_characters=200, seed=2)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    empty = jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"no text to train on in .*empty\.jsonl"):
        next(TrainingRows([empty], RowCutter(encode, END, 8)))


def test_text_shorter_than_a_row_is_repeated(tmp_path: Path) -> None:
    short = jsonl(tmp_path / "short.jsonl", ["ab"])
    assert next(TrainingRows([short], RowCutter(encode, END, 7))) == [97, 98, END, 97, 98, END, 97]


def test_the_backbones_tokenizer(tiny_backbone) -> None:  # type: ignore[no-untyped-def]
    encoder, end_of_text = encode_texts(tiny_backbone)
    assert end_of_text == 0
    assert encoder(["ab", "é"]) == [tiny_backbone.tokenizer.encode(text) for text in ("ab", "é")]


def test_passes_hold_whole_rows_within_the_bound() -> None:
    rows = [[1] * n for n in (5, 5, 30, 2, 2)]
    assert [p.lengths for p in packed_passes(rows, 12)] == [(5, 5), (30,), (2, 2)]
    assert [len(row) for row in take_tokens(rows, 11)] == [5, 5, 30]


@pytest.fixture
def with_tokenizer(tiny_backbone_folder: Path, tmp_path: Path) -> Callable[[Callable[[Tokenizer], None]], Backbone]:
    def load(change: Callable[[Tokenizer], None]) -> Backbone:
        folder = shutil.copytree(tiny_backbone_folder, tmp_path / "changed")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
        return Backbone.load(folder)

    return load


def test_a_text_that_spells_a_token_without_an_embedding_is_named_or_skipped(with_tokenizer: Any) -> None:
    encoder, _ = encode_texts(with_tokenizer(lambda tokenizer: tokenizer.add_tokens(["<extra>"])))
    documents = [Document("ab", ""), Document("a<extra>b", "", place="a.jsonl:2"), Document("c", "")]
    with pytest.raises(ValueError, match=r"^a\.jsonl:2: holds '<extra>', token id 257 .*vocabulary of 257$"):
        list(encoded(documents, encoder))
    bad = BadDocuments("skip")
    assert [(d.text, len(ids)) for d, ids in encoded(documents, encoder, bad)] == [
        ("ab", 2),
        ("a<extra>b", 0),
        ("c", 1),
    ]
    assert list(bad.reasons) == ["a.jsonl:2"]


def test_a_tokenizer_that_changes_text_is_refused_before_any_text_is_read(with_tokenizer: Any) -> None:
    backbone = with_tokenizer(lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()))
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        encode_texts(backbone)


def test_half_of_a_surrogate_pair_in_a_document_of_the_caller_is_refused(tiny_backbone: Backbone) -> None:
    encoder, _ = encode_texts(tiny_backbone)
    with pytest.raises(ValueError, match="a text: holds half of a surrogate pair"):
        list(encoded([Document("a\ud83d", "")], encoder))


BAD_AT = 350
"""Line of the bad document: what is tokenized at a time ends before it."""


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[list[Path], list[list[int]], dict[str, Any]]:
    """Two files of which one has a bad line, the rows before it, and the state after the last of them."""
    files = [
        jsonl(tmp_path / "bad.jsonl", [f"{i} " + "long document " * 70 for i in range(400)]),
        jsonl(tmp_path / "small.jsonl", [f"small {i}" for i in range(40)]),
    ]
    lines = files[0].read_text().splitlines()
    lines[BAD_AT - 1] = '{"text": "cut'
    files[0].write_text("\n".join(lines))
    rows, given, state = TrainingRows(files, RowCutter(encode, END, 512)), [], {}
    with pytest.raises(ValueError, match=rf"bad\.jsonl:{BAD_AT}: expected a JSON object"):  # noqa: PT012
        for row in rows:
            given.append(row)
            state = json.loads(json.dumps(rows.state_dict()))
    assert len(given) > 400
    return files, given, state


def rows_from(files: list[Path], state: dict[str, Any], n: int = 1000) -> list[list[int]]:
    rows = TrainingRows(files, RowCutter(encode, END, 512, bad=BadDocuments("skip")))
    rows.load_state_dict(state)
    return list(islice(rows, n))


def test_rows_go_on_when_a_bad_line_is_skipped(stopped: Any) -> None:
    files, given, state = stopped
    assert given + rows_from(files, state) == rows_from(files, {}, len(given) + 1000)


def test_rows_go_on_when_a_bad_line_was_mended(stopped: Any) -> None:
    files, given, state = stopped
    mended = json.dumps({"text": "mended " * 1000})  # another size than before, so another share of the mixture
    files[0].write_text(files[0].read_text().replace('{"text": "cut', mended))
    whole = rows_from(files, {"sizes": state["sizes"]}, len(given) + 1000)
    assert given + rows_from(files, state) == whole
    assert "mended mended" in "".join(chr(token) for row in whole for token in row)


def test_a_file_that_vanishes_between_epochs_is_named(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "vanished.jsonl", ["one text", "another"])
    rows = TrainingRows([file], RowCutter(encode, END, 8))
    next(rows)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"vanished\.jsonl"):
        list(islice(rows, 10))


def test_a_file_that_is_cut_between_epochs_gives_what_is_left(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "cut.jsonl", ["abcdefgh", "ijklmnop"])
    rows = TrainingRows([file], RowCutter(encode, END, 9))
    assert len(list(islice(rows, 2))) == 2
    jsonl(file, ["abcdefgh"])
    assert next(rows) == next(rows) == [*map(ord, "abcdefgh"), END]


def test_rows_do_not_go_on_from_other_text(stopped: Any) -> None:
    files, _, state = stopped
    files[0].write_text(files[0].read_text().replace("3 long document", "3 brief document", 1))
    with pytest.raises(ValueError, match=r"documents that were read before have changed in .*bad\.jsonl, .*small"):
        rows_from(files, state)


def test_rows_go_on_from_a_state_of_an_older_version(stopped: Any) -> None:
    files, given, state = stopped
    del state["sizes"], state["text_hash"]
    assert given + rows_from(files, state) == rows_from(files, {}, len(given) + 1000)
