"""The published form: there and back, atomic, verified, and tied to its backbone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_runtime import (
    Backbone,
    Dictionary,
    DictionaryFormatError,
    FingerprintMismatch,
    LatentStatistics,
    UnknownDictionary,
    atomic,
    list_builtin_dictionaries,
    load_dictionary,
    save_dictionary,
)
from sae_runtime.dictionary.formats import published
from sae_runtime.dictionary.manifest import BackboneReference, Provenance

D_IN, N_LATENTS = 16, 48


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.random(n_layers=2, d_model=D_IN, n_heads=2, context_length=32, vocab_size=60, seed=3)


def make_dictionary(*, tied: bool = False, **fields: Any) -> Dictionary:
    generator = torch.Generator().manual_seed(11)
    encoder = torch.randn(N_LATENTS, D_IN, generator=generator)
    statistics = LatentStatistics(
        firing_rate=torch.rand(N_LATENTS, generator=generator),
        mean=torch.rand(N_LATENTS, generator=generator),
        mean_square=torch.rand(N_LATENTS, generator=generator),
        max=torch.rand(N_LATENTS, generator=generator) + 1,
        quantiles=torch.rand(N_LATENTS, 3, generator=generator),
        quantile_levels=torch.tensor([0.1, 0.5, 0.9]),
        n_tokens=1234,
    )
    fields = {"activation": "topk", "k": 6, "normalization": "layer_norm", "site": "1.resid_post_mlp"} | fields
    return Dictionary(
        encoder=encoder,
        decoder=encoder if tied else torch.randn(N_LATENTS, D_IN, generator=generator),
        pre_bias=torch.randn(D_IN, generator=generator),
        latent_bias=torch.randn(N_LATENTS, generator=generator),
        name="example",
        statistics=statistics,
        **fields,
    )


def publish(path: Path, dictionary: Dictionary | None = None, **options: Any) -> Path:
    options = {"backbone": BackboneReference("tiny", "f" * 64), "dtype": "float32"} | options
    save_dictionary(dictionary or make_dictionary(), path, **options)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"normalization": "centred"},
        {"tied": True},
        {"activation": "relu", "k": None, "normalization": "none"},
        {"postact": "identity"},
    ],
    ids=["topk", "centred", "tied", "relu", "identity"],
)
def test_there_and_back(fields: dict[str, Any], tmp_path: Path) -> None:
    dictionary = make_dictionary(**fields)
    provenance = Provenance("0.1.0", {"lr": 0.001}, 5, 1000, "some text", "2026-01-01T00:00:00Z")
    publish(tmp_path / "d", dictionary, provenance=provenance, evaluation={"nmse": 0.1}, card="# Card\n")
    loaded = load_dictionary(tmp_path / "d")
    for name in ("encoder", "decoder", "pre_bias", "latent_bias"):
        assert torch.equal(getattr(loaded, name), getattr(dictionary, name))
    for name in ("activation", "k", "normalization", "postact", "site", "name", "tied"):
        assert getattr(loaded, name) == getattr(dictionary, name)
    assert loaded.statistics is not None
    assert dictionary.statistics is not None
    for name, tensor in dictionary.statistics.to_tensors().items():
        assert torch.equal(loaded.statistics.to_tensors()[name], tensor)
    assert loaded.manifest is not None
    assert loaded.manifest.provenance == provenance
    assert loaded.manifest.evaluation == {"nmse": 0.1}
    assert {path.name for path in (tmp_path / "d").iterdir()} == {
        "dictionary.json",
        "weights.safetensors",
        "stats.safetensors",
        "CARD.md",
    }
    assert ("decoder" in load_file(tmp_path / "d" / "weights.safetensors")) != dictionary.tied


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_load_as_asked(dtype: str, tmp_path: Path) -> None:
    dictionary = make_dictionary()
    publish(tmp_path / "d", dictionary, dtype=dtype)
    loaded = load_dictionary(tmp_path / "d")
    stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.encoder, dictionary.encoder.to(stored).float())
    assert torch.equal(loaded.pre_bias, dictionary.pre_bias)  # biases stay float32 on disk
    assert load_dictionary(tmp_path / "d", dtype=torch.bfloat16).decoder.dtype == torch.bfloat16


def test_publishing_needs_site_and_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say which site it reads"):
        publish(tmp_path / "d", replace(make_dictionary(), site=None))
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float16"):
        publish(tmp_path / "d", dtype="int8")
    large = make_dictionary()
    with pytest.raises(ValueError, match=r"encoder holds values that are not finite in torch\.float16"):
        publish(tmp_path / "d", replace(large, encoder=large.encoder * 1e6), dtype="float16")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_on_purpose(tmp_path: Path) -> None:
    publish(tmp_path / "d", name="first")
    with pytest.raises(FileExistsError, match="overwrite it on purpose"):
        publish(tmp_path / "d", name="second")
    assert load_dictionary(tmp_path / "d").name == "first"
    publish(tmp_path / "d", name="second", overwrite=True)
    assert load_dictionary(tmp_path / "d").name == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("step", ["_flush", "_put_in_place"])
def test_a_failure_while_writing_leaves_the_old_folder(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "d", name="first")

    def fail(*arguments: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic, step, fail)
    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "d", name="second", overwrite=True)
    assert load_dictionary(tmp_path / "d").name == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("file", ["weights.safetensors", "stats.safetensors"])
def test_truncated_or_changed_data_fails_its_checksum(file: str, tmp_path: Path) -> None:
    path = publish(tmp_path / "d") / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DictionaryFormatError, match=rf"{file}: found sha256 \w+ \({len(whole) - 100} bytes\)"):
        load_dictionary(tmp_path / "d")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DictionaryFormatError, match="the manifest expects"):
        load_dictionary(tmp_path / "d")
    path.unlink()
    with pytest.raises(DictionaryFormatError, match=f"{file}: cannot be read, but the manifest lists it"):
        load_dictionary(tmp_path / "d")


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change keys of the manifest and make its checksums right again."""
    path = folder / "dictionary.json"
    raw = json.loads(path.read_text()) | {
        "files": {file: published._sha256(folder / file) for file in ("weights.safetensors", "stats.safetensors")}
    }
    path.write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 9}, "schema_version is 9, this saeserve reads up to 1"),
        ({"colour": "red"}, r"dictionary\.json: manifest: unknown keys \['colour'\]"),
        ({"n_latents": 49}, r"encoder has shape \[48, 16\], expected \[49, 16\]"),
        ({"d_in": 17}, r"encoder has shape \[48, 16\], expected \[48, 17\]"),
        ({"tied": True}, r"unknown tensors \['decoder'\]"),
        ({"k": 49}, r"k is 49, expected 1 to n_latents = 48"),
        ({"k": "6"}, r"manifest\.k is '6', expected"),
        ({"site": "1.attic"}, r"dictionary\.json: manifest\.site: unknown location 'attic'"),
        ({"context_length": 0}, r"manifest\.context_length is 0, expected a positive integer"),
        ({"normalization": ["none"]}, r"manifest\.normalization is \['none'\], expected"),
        ({"evaluation": {"nmse": float("nan")}}, "NaN is not JSON"),
        ({"files": {}}, r"no checksum of weights\.safetensors"),
    ],
)
def test_manifest_and_data_must_agree(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    edit_manifest(publish(tmp_path / "d"), **changes)
    with pytest.raises(DictionaryFormatError, match=message):
        load_dictionary(tmp_path / "d")


def test_checksums_name_files_in_the_folder_only(tmp_path: Path) -> None:
    publish(tmp_path / "d")
    raw = json.loads((tmp_path / "d" / "dictionary.json").read_text())
    edit_manifest(tmp_path / "d", files=raw["files"] | {"../secret": "00"})
    with pytest.raises(DictionaryFormatError, match=r"files names '\.\./secret', expected names in the folder"):
        load_dictionary(tmp_path / "d")


def test_damaged_data_with_a_right_checksum_is_still_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path / "d")
    weights = load_file(folder / "weights.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "decoder"}, folder / "weights.safetensors")
    edit_manifest(folder)
    with pytest.raises(DictionaryFormatError, match="missing decoder; found"):
        load_dictionary(folder)
    (folder / "weights.safetensors").write_bytes(b"not safetensors")
    edit_manifest(folder)
    with pytest.raises(DictionaryFormatError, match="cannot be read as safetensors"):
        load_dictionary(folder)


def test_statistics_are_optional_and_always_verified(tmp_path: Path) -> None:
    folder = publish(tmp_path / "without", replace(make_dictionary(), statistics=None))
    assert not (folder / "stats.safetensors").exists()
    assert load_dictionary(folder).statistics is None
    given = make_dictionary().statistics
    assert load_dictionary(publish(tmp_path / "with", statistics=given)).statistics is not None
    # A file that the manifest does not vouch for is not read.
    (folder / "stats.safetensors").write_bytes((tmp_path / "with" / "stats.safetensors").read_bytes())
    with pytest.raises(DictionaryFormatError, match=r"no checksum of stats\.safetensors under files"):
        load_dictionary(folder)
    assert given is not None
    with pytest.raises(ValueError, match="statistics are of 47 latents, expected 48"):
        publish(tmp_path / "d", replace(make_dictionary(), statistics=None), statistics=given[slice(47)])


@pytest.mark.parametrize(
    ("architecture", "missing"),
    [("jumprelu", "threshold"), ("gated", "magnitude_scale"), ("gated", "magnitude_bias")],
)
def test_every_architecture_needs_its_tensors(architecture: Any, missing: str, tmp_path: Path) -> None:
    tensor_names = {"jumprelu": ["threshold"], "gated": ["magnitude_scale", "magnitude_bias"]}[architecture]
    tensors = dict.fromkeys(tensor_names, torch.rand(N_LATENTS))
    folder = publish(tmp_path / "d", make_dictionary(activation=architecture, k=None, **tensors))
    weights = load_file(folder / "weights.safetensors")
    del weights[missing]
    save_file(weights, folder / "weights.safetensors")
    edit_manifest(folder)
    with pytest.raises(DictionaryFormatError, match=f"missing {missing}; found"):
        load_dictionary(folder)


def test_wrong_statistics_are_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path / "d")
    statistics = load_file(folder / "stats.safetensors")
    save_file(statistics | {"mean": torch.zeros(47)}, folder / "stats.safetensors")
    edit_manifest(folder)
    with pytest.raises(DictionaryFormatError, match=r"mean has shape \[47\], expected \[48\]"):
        load_dictionary(folder)
    for name, wrong, message in (
        ("max", torch.full((48,), torch.nan), "max holds NaN or infinite values"),
        ("firing_rate", torch.full((48,), 1.5), "firing_rate is not between 0 and 1"),
        ("firing_rate", torch.zeros(48, 2), r"firing_rate has shape \[48, 2\]"),
        ("n_tokens", torch.tensor([1, 2]), r"n_tokens is torch\.int64 \[2\], expected one int64"),
        ("n_tokens", torch.tensor([0]), "n_tokens is 0, expected 1 or more"),
    ):
        save_file(statistics | {name: wrong}, folder / "stats.safetensors")
        edit_manifest(folder)
        with pytest.raises(DictionaryFormatError, match=rf"stats\.safetensors: statistics: {message}"):
            load_dictionary(folder)
    save_file({name: t[:47] if t.shape[0] == 48 else t for name, t in statistics.items()}, folder / "stats.safetensors")
    edit_manifest(folder)
    with pytest.raises(DictionaryFormatError, match="statistics are of 47 latents, expected 48"):
        load_dictionary(folder)
    del statistics["max"]
    save_file(statistics, folder / "stats.safetensors")
    edit_manifest(folder)
    with pytest.raises(DictionaryFormatError, match=r"found tensors .* expected"):
        load_dictionary(folder)


def test_missing_and_unknown_sources_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DictionaryFormatError, match="no such file or folder; expected a published dictionary"):
        load_dictionary(tmp_path / "nowhere")
    with pytest.raises(DictionaryFormatError, match="no such file or folder"):
        load_dictionary("nowhere.pt")
    with pytest.raises(UnknownDictionary, match=r"no builtin dictionary 'nowhere'.*builtin dictionaries: "):
        load_dictionary("builtin/nowhere")
    with pytest.raises(UnknownDictionary, match="no builtin dictionary 'nowhere'"):
        load_dictionary("nowhere")
    with pytest.raises(DictionaryFormatError, match=r"found nothing; expected a published dictionary"):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(DictionaryFormatError, match=r"found cfg\.json; expected a published dictionary"):
        load_dictionary(tmp_path)


def test_builtin_dictionaries_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_runtime.dictionary.formats.DICTIONARIES", tmp_path)
    assert list_builtin_dictionaries() == []
    publish(tmp_path / "some-name")
    assert list_builtin_dictionaries() == ["some-name"]
    assert load_dictionary("some-name").n_latents == load_dictionary("builtin/some-name").n_latents == N_LATENTS


def test_dictionary_must_belong_to_the_backbone(backbone: Backbone, tmp_path: Path) -> None:
    right = BackboneReference(backbone.name, backbone.fingerprint)
    publish(tmp_path / "right", backbone=right)
    assert load_dictionary(tmp_path / "right", backbone=backbone).d_in == D_IN
    publish(tmp_path / "other", backbone=BackboneReference("elsewhere", "0" * 64))
    with pytest.raises(
        FingerprintMismatch, match=f"'elsewhere' with weights {'0' * 64}, found.*{backbone.fingerprint}"
    ):
        load_dictionary(tmp_path / "other", backbone=backbone)
    publish(tmp_path / "late", replace(make_dictionary(), site="7.resid_pre"), backbone=right)
    with pytest.raises(DictionaryFormatError, match="layers 0 to 1"):
        load_dictionary(tmp_path / "late", backbone=backbone)
    publish(tmp_path / "wide", replace(make_dictionary(), site="0.mlp_post_act"), backbone=right)
    with pytest.raises(DictionaryFormatError, match=r"reads 16 values per token, site 0\.mlp_post_act .* has 64"):
        load_dictionary(tmp_path / "wide", backbone=backbone)
