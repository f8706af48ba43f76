"""`saeserve catalogue build`: settings, files and messages; the rest is tested in tests/sae_runtime/catalogue."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_runtime import Backbone
from sae_runtime.catalogue.label_store import LabelStore
from sae_runtime.catalogue.read import Catalogue
from sae_runtime.catalogue.records import Label
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.dictionary.fingerprint import fingerprint_of
from sae_runtime.dictionary.formats import load_dictionary
from sae_runtime.dictionary.formats.published import save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference
from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)
from tests.sae_runtime.evaluation.reference import random_dictionary

Saeserve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def published(tmp_path: Path, tiny_backbone_folder: Path) -> Path:  # noqa: F811
    fingerprint = Backbone.load(tiny_backbone_folder).fingerprint
    save_dictionary(
        random_dictionary(),
        tmp_path / "tiny",
        backbone=BackboneReference(str(tiny_backbone_folder), fingerprint),
        name="tiny",
        dtype="float32",
    )
    return tmp_path / "tiny"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [{"text": f"Some text = {i}, and then some more.", "kind": "maths", "lang": "en"} for i in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_writes_the_catalogue_into_the_dictionary_s_folder(saeserve: Saeserve, published: Path, text: Path):
    arguments = ("catalogue", "build", str(published), "--data", str(text))
    code, out, err = saeserve(*arguments, "--neighbor-dictionaries", str(published))
    assert (code, out) == (1, "")
    assert "two dictionaries are called 'tiny'" in err
    code, out, err = saeserve(*arguments, "--random-contexts", "2")
    assert code == 0, err
    path = published / "features.sqlite"
    assert f"Everything is in {path}" in out
    assert "median token r2" in out
    assert "text 1,040 of 1,040 tokens" in err
    assert sorted(file.name for file in published.iterdir() if "features" in file.name) == ["features.sqlite"]
    dictionary = load_dictionary(published)
    catalogue = Catalogue.open(path, fingerprint=fingerprint_of(dictionary))
    assert catalogue.info.settings["random_contexts"] == 2
    page = catalogue.page(3)
    assert page.contexts[0].place.source == "corpus.jsonl"
    assert page.rate_by_kind.keys() == {"maths"}


def test_settings_of_a_file(saeserve: Saeserve, published: Path, text: Path, tmp_path: Path):
    (tmp_path / "settings.yaml").write_text(f"data: [{text}]\nseed: 7\ntokens: 200\nout: {tmp_path / 'there.sqlite'}\n")
    config = ("--config", str(tmp_path / "settings.yaml"), "--tokens", "300", "--json")  # flags win over the file
    code, out, err = saeserve("catalogue", "build", str(published), *config)
    assert code == 0, err
    info = json.loads(out)
    assert (info["path"], info["seed"]) == (str(tmp_path / "there.sqlite"), 7)
    assert 300 <= info["n_tokens"] < 332
    assert Catalogue.open(tmp_path / "there.sqlite").info.n_tokens == info["n_tokens"]


def test_every_setting_has_a_flag(saeserve: Saeserve):
    out = saeserve("catalogue", "--help")[1]
    for name in CatalogueSettings.model_fields:
        assert f"--{name.replace('_', '-')} " in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-dictionary", "--data", "{file}"], 1, "no-such-dictionary"),
        (["{tiny}", "--data", "{file}", "{file}.txt"], 1, "no file, folder or data set '{file}.txt'"),
        (["{tiny}", "--tokens", "many"], 2, "tokens: Input should be a valid integer"),
        (["{tiny}", "--shown-random", "99"], 2, "shown_random is 99, more than are kept of both halves (48)"),
        (["{tiny}/weights.safetensors/nothing"], 1, "no such file or folder"),
        (["{tiny}", "--backbone", "builtin", "--data", "{file}"], 1, "was made for backbone"),
    ],
)
def test_what_is_wrong(saeserve: Saeserve, published: Path, text: Path, arguments: list[str], code: int, message: str):
    def filled(value: str) -> str:
        return value.replace("{file}", str(text)).replace("{tiny}", str(published))

    exit_code, out, err = saeserve("catalogue", "build", *map(filled, arguments))
    assert (exit_code, out) == (code, "")
    assert filled(message) in err


def test_a_bad_document_stops_or_is_skipped(saeserve: Saeserve, published: Path, text: Path):
    text.write_text(text.read_text() + "no JSON\n")
    arguments = ("catalogue", "build", str(published), "--data", str(text))
    code, _, err = saeserve(*arguments)
    assert code == 1
    assert f"{text}:31" in err
    assert not (published / "features.sqlite").exists()
    with pytest.warns(UserWarning, match=rf"skipped 1 document .*{text.name}:31"):
        code, _, err = saeserve(*arguments, "--bad-documents", "skip")
    assert code == 0, err
    assert (published / "features.sqlite").exists()


# Labels in and out


@pytest.fixture
def labelled(published: Path) -> Path:
    """A dictionary with labels of a person and of a model, and no catalogue."""
    dictionary = load_dictionary(published)
    store = LabelStore(published / "labels.sqlite", dictionary.name, dictionary.fingerprint)
    store.write(3, Label("Python keywords", "person", author="Ada"))
    store.write(3, Label("def, class", "some-model", f1=0.75, precision=1.0, recall=0.6, n_positive=10, n_negative=10))
    store.write(5, Label('quotes, "commas" and =cells', "person"))
    store.close()
    return published


@pytest.mark.parametrize("name", ["labels.csv", "labels.json"])
def test_labels_go_out_and_in_again(saeserve: Saeserve, labelled: Path, tmp_path: Path, name: str):
    file = tmp_path / name
    code, out, err = saeserve("catalogue", "export", str(labelled), "--file", str(file))
    assert (code, err) == (0, "")
    assert f"wrote 3 labels to {file}" in out.replace("\n", " ")
    elsewhere = ("--labels-dir", str(tmp_path / "elsewhere"))
    code, out, err = saeserve("catalogue", "import", str(labelled), "--file", str(file), *elsewhere)
    assert (code, err) == (0, "")
    assert "read 3 labels, of which 0 replaced others" in out
    dictionary = load_dictionary(labelled)
    stores = [
        LabelStore(folder / "labels.sqlite", "tiny", dictionary.fingerprint)
        for folder in (labelled, tmp_path / "elsewhere")
    ]
    before, after = (store.labels_of(range(10)) for store in stores)
    assert before == after
    assert {feature: len(labels) for feature, labels in after.items()} == {3: 2, 5: 1}
    assert "of which 3 replaced others" in saeserve("catalogue", "import", str(labelled), "--file", str(file))[1]


def test_labels_of_rules_go_out_and_are_left_out_on_the_way_in(
    saeserve: Saeserve, published: Path, text: Path, tmp_path: Path
):
    """A catalogue makes its own, and knows what they were tested on."""
    assert saeserve("catalogue", "build", str(published), "--data", str(text))[0] == 0
    dictionary = load_dictionary(published)
    catalogue = Catalogue.open(published / "features.sqlite", fingerprint_of(dictionary))
    rules = sum(len(catalogue.page(feature).labels) for feature in range(dictionary.n_latents))
    file = tmp_path / "labels.json"
    assert saeserve("catalogue", "export", str(published), "--file", str(file))[0] == 0
    assert len(json.loads(file.read_text())) == rules
    out = saeserve("catalogue", "import", str(published), "--file", str(file))[1]
    assert f"read 0 labels, of which 0 replaced others; {rules} of rules" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.txt", "", "ends in .csv or .json"),
        ("absent.json", None, "No such file"),
        ("labels.json", "{", "the file is not JSON"),
        ("labels.json", '[{"index": 3}]', "label 1: `description`"),
        ("labels.json", '[{"index": 999999, "description": "x"}]', "999999"),
        ("labels.csv", "a,b\n1,2\n", "lacks the columns"),
        ("labels.json", b"\xff\xfe\x00", "labels.json"),
    ],
)
def test_files_that_are_no_labels(
    saeserve: Saeserve, published: Path, tmp_path: Path, name: str, content: str | bytes | None, message: str
):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    code, _, err = saeserve("catalogue", "import", str(published), "--file", str(file))
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err


def test_flags_of_another_action(saeserve: Saeserve, published: Path):
    assert saeserve("catalogue", "export", str(published))[0] == 2
    code, _, err = saeserve("catalogue", "build", str(published), "--file", "labels.csv")
    assert (code, "--file belongs to export and import" in err) == (2, True)
