"""Rows hold exactly the text's tokens, mixed over files, and continue exactly where a state was saved."""

import json
from itertools import islice
from pathlib import Path

import pytest

from sae_runtime.data.documents import Document
from sae_runtime.data.rows import (
    CutterState,
    RowCutter,
    TrainingRows,
    encode_texts,
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
