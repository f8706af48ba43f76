"""Documents by the name of where they are: files, folders of files, data sets on disk and on the hub."""

import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.sources import find_sources

pytestmark = pytest.mark.any_cpu

TEXTS = [f"document {i}, é\n" * (i % 3 + 1) for i in range(30)]


def write_jsonl(path: Path, open_file: Callable[..., Any] = open) -> Path:
    with open_file(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return path


def read(name: str | Path, **options: Any) -> list[str]:
    """The texts of what a name stands for."""
    (source,) = find_sources([str(name)], **options)
    texts = [document.text for document in source]
    assert source.share_read() == 1.0
    return texts


def test_files_of_every_form_give_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for suffix, open_file in {"": open, ".gz": gzip.open, ".xz": lzma.open, ".zst": zstandard.open}.items():
        assert read(write_jsonl(tmp_path / f"a.jsonl{suffix}", open_file)) == TEXTS, suffix
    table = arrow.table({"text": TEXTS, "other": list(range(30))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert read(tmp_path / "a.parquet") == TEXTS


def test_folders_give_the_files_in_them_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "README.rst").write_text("not read")
    write_jsonl(tmp_path / "deep" / "part.jsonl")
    assert read(tmp_path) == TEXTS


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(str(tmp_path / "one"))
    splits = {"train": dataset, "test": dataset.select([0])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "one") == read(tmp_path / "splits") == TEXTS
    assert read(tmp_path / "splits", split="test") == TEXTS[:1]
    with pytest.raises(ValueError, match="has splits train, test; expected 'validation'"):
        read(tmp_path / "splits", split="validation")


def test_a_damaged_data_set_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read as a saved data set: "):
        read(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read as a saved data set: "):
        read(tmp_path)


def test_rows_of_data_sets_without_text_are_named_or_skipped(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["good", None, "good"]}).save_to_disk(str(tmp_path / "nulls"))
    with pytest.raises(ValueError, match="data set nulls, row 2: `text` is NoneType, expected a string"):
        read(tmp_path / "nulls")
    bad = BadDocuments("skip")
    assert read(tmp_path / "nulls", bad=bad) == ["good"] * 2
    assert list(bad.reasons) == ["data set nulls, row 2"]


def test_a_connection_that_is_lost_on_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "good"}
        raise RuntimeError("connection lost")

    streamed = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    with pytest.raises(ValueError, match="data set owner/name, row 2: cannot be read: connection lost"):
        read("owner/name", bad=BadDocuments("skip"))  # what follows is not known, so nothing can be skipped


def test_hub_names_are_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load_dataset(name: str, configuration: str | None, **options: Any) -> Any:
        calls.append((name, configuration, options))
        if name == "owner/absent":
            raise ConnectionError("no route")
        return datasets.Dataset.from_dict({"content": TEXTS[:5]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (source,) = find_sources(["owner/name@en"], text_field="content", split="validation")
    assert calls == [("owner/name", "en", {"split": "validation", "streaming": True})]
    assert [document.text for document in source] == TEXTS[:5]
    assert source.identity["name"] == "owner/name@en"
    with pytest.raises(FileNotFoundError, match=r"owner/absent.*cannot be read from the hub: no route"):
        find_sources(["owner/absent"])


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    cases: dict[str, tuple[type[Exception], str]] = {}

    def case(name: str, content: bytes, error: type[Exception], message: str) -> None:
        (tmp_path / name).write_bytes(content)
        cases[name] = (error, message)

    case("bad.jsonl", b'{"text": "a"}\n{"text": 3}\n', ValueError, r"bad\.jsonl:2: `text` is int, expected a string")
    case("field.jsonl", b'{"txt": "a"}\n', ValueError, r"field\.jsonl:1: expected a JSON object with a string `text`")
    case("bad.parquet", b"PAR0", ValueError, r"bad\.parquet is not a parquet file")
    case("data.csv", b"a,b", ValueError, r"expected \.txt, .* found 'data\.csv'")
    (tmp_path / "nothing").mkdir()
    cases["nothing"] = (ValueError, "no file in it ends in")
    cases["missing.jsonl"] = (FileNotFoundError, "no file, folder or data set")
    parquet.write_table(arrow.table({"body": ["a"]}), tmp_path / "columns.parquet")
    cases["columns.parquet"] = (ValueError, "has columns body; expected a column `text`")
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "module", "package"),
    [
        ("a.jsonl.zst", "zstandard", "zstandard"),
        ("a.parquet", "pyarrow.parquet", "pyarrow"),
        ("owner/name", "datasets", "datasets"),
    ],
)
def test_an_absent_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    source = file if "/" in file else str(tmp_path / file)
    if "/" not in file:
        Path(source).write_bytes(b"anything")
    with pytest.raises(ModuleNotFoundError, match=rf"needs the package {package}, .*pip install 'saeserve\[train\]'"):
        read(source)
