"""Rows that know their documents: the same rows as the training job's, and owners that are checked against the text."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_runtime import Backbone
from sae_runtime.data.text_sample import TextSample, read_sample
from sae_runtime.data.token_folder.tokenize import TokenizeConfig, tokenize
from sae_runtime.training.activations.run_rows import held_out_rows
from sae_runtime.training.config import TrainingConfig

END = 0  # end-of-text of the tiny backbone


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    records: list[dict[str, Any]] = []
    for i in range(60):
        text = "".join(generator.choices("abcdefgh ", k=generator.randint(1, 120)))
        record = {"kind": "book", "author": f"author {i % 3}"} if i % 2 else {"kind": "parallel", "lang": "de"}
        records.append({"text": text, "id": f"doc-{i}", "pages": 3, **record})
    path = tmp_path_factory.mktemp("corpus") / "held_out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def owned_text(backbone: Backbone, sample: TextSample, document: int) -> str:
    """What the tokens of one document say; a token is a byte here."""
    ids = [int(i) for i in sample.ids[sample.document == document] if i != END]
    return b"".join(backbone.token_bytes(i) for i in ids).decode()


@pytest.mark.parametrize("rows", ["packed", "documents"])
@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("context_length", [None, 20])
@pytest.mark.parametrize("n_tokens", [300, 100_000])
def test_rows_are_those_of_the_training_job(
    tiny_backbone: Backbone, corpus: Path, rows: Any, prepend: bool, context_length: int | None, n_tokens: int
) -> None:
    config = TrainingConfig(
        site="0.resid_pre",
        data=(corpus,),
        held_out=(corpus,),
        out=Path("unused"),
        rows=rows,
        prepend_end_of_text=prepend,
        context_length=context_length,
        seed=5,
    )
    sample = read_sample(
        tiny_backbone,
        [corpus],
        n_tokens,
        rows=rows,
        prepend_end_of_text=prepend,
        context_length=context_length,
        seed=5,
    )
    assert sample.rows == list(held_out_rows(config, tiny_backbone, n_tokens))
    assert sample.ids.tolist() == [token for row in sample.rows for token in row]
    assert sample.position.tolist() == [t for row in sample.rows for t in range(len(row))]
    assert sample.row.tolist() == [i for i, row in enumerate(sample.rows) for _ in row]

    complete = 0
    for document in sorted(set(sample.document.tolist()) - {-1}):
        found, whole = owned_text(tiny_backbone, sample, document), sample.documents[document].text
        # Cut off at the end of the sample, or a lone last character, which makes no row.
        assert whole.startswith(found)
        complete += found == whole
    assert complete >= len(set(sample.document.tolist())) - (8 if rows == "documents" else 3)
    assert (sample.document == -1).sum() == (len(sample.rows) if prepend else 0)


@pytest.mark.parametrize("rows", ["packed", "documents"])
@pytest.mark.parametrize("context_length", [None, 20])
def test_a_token_folder_gives_the_training_jobs_held_out_rows(
    tiny_backbone: Backbone,
    tiny_backbone_folder: Path,
    corpus: Path,
    tmp_path: Path,
    rows: Any,
    context_length: int | None,
) -> None:
    folder = tmp_path / "tokens"
    config = TokenizeConfig(
        sources=(str(corpus),),
        out=folder,
        backbone=str(tiny_backbone_folder),
        held_out_fraction=0.5,
        context_length=24,
    )
    manifest = tokenize(config)
    training = TrainingConfig(
        site="0.resid_pre", data=(folder,), out=Path("unused"), rows=rows, context_length=context_length, seed=5
    )
    sample = read_sample(tiny_backbone, [folder], 300, rows=rows, context_length=context_length, seed=5)
    assert sample.rows == list(held_out_rows(training, tiny_backbone, 300))
    assert max(map(len, sample.rows)) == (context_length or 24)
    assert sample.kinds == ["tokens"]
    whole = read_sample(tiny_backbone, [folder], 100_000, rows=rows, seed=5)
    assert len(set(whole.document.tolist())) == manifest.documents("held_out")
    assert whole.fit.any()
    assert not whole.fit.all()


def test_folders_that_cannot_be_read(tiny_backbone: Backbone, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, expected files or a token folder"):
        read_sample(tiny_backbone, [tmp_path], 100)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="and 1 more; expected it alone"):
        read_sample(tiny_backbone, [tmp_path, corpus], 100)
    with pytest.raises(FileNotFoundError, match=r"no text file or token folder at .*absent"):
        read_sample(tiny_backbone, [tmp_path / "absent"], 100)


def test_labels_kinds_and_splits(tiny_backbone: Backbone, corpus: Path) -> None:
    sample = read_sample(tiny_backbone, [corpus], 100_000)
    assert sample.kinds == ["book", "parallel"]
    for document in (0, 1, 30):
        labels = sample.labels(document)
        assert labels.keys() == ({"kind", "author"} if labels["kind"] == "book" else {"kind", "lang"})
        kinds = sample.kind[sample.document == document]
        assert [sample.kinds[k] for k in kinds] == [labels["kind"]] * len(kinds)
    # Whole documents, about half of those with the same labels.
    split: dict[tuple[str, ...], list[bool]] = {}
    for document in set(sample.document.tolist()):
        sides = set(sample.fit[sample.document == document].tolist())
        assert len(sides) == 1
        split.setdefault(tuple(sample.labels(document).values()), []).append(sides.pop())
    assert len(split) == 4
    for sides in split.values():
        assert abs(sum(sides) - len(sides) / 2) <= 0.5
    assert np.array_equal(sample.fit, read_sample(tiny_backbone, [corpus], 100_000).fit)


def test_one_long_document_is_split_by_rows(tiny_backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("some text " * 40)
    sample = read_sample(tiny_backbone, [path], 1000)
    assert np.array_equal(sample.fit, sample.row % 2 == 0)


def test_the_first_rows(tiny_backbone: Backbone, corpus: Path) -> None:
    sample = read_sample(tiny_backbone, [corpus], 500)
    part = sample.first(100)
    assert part.rows == sample.rows[:4]  # rows of 32 tokens
    assert np.array_equal(part.document, sample.document[:128])
    assert sample.first(10_000).rows == sample.rows


def test_what_is_wrong_with_the_text(tiny_backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("short")
    assert read_sample(tiny_backbone, [path], 100).n_tokens == 6  # less than a row: it alone
    path.write_text("")
    with pytest.raises(ValueError, match="no held-out text of two tokens"):
        read_sample(tiny_backbone, [path], 100, rows="documents")
    with pytest.raises(ValueError, match="context_length is 64, the backbone reads at most 32"):
        read_sample(tiny_backbone, [path], 100, context_length=64)
