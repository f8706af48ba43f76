"""`saeserve catalogue build`: settings, files and messages; the rest is tested in tests/sae_runtime/catalogue."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_runtime import Backbone
from sae_runtime.catalogue.read import Catalogue
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
