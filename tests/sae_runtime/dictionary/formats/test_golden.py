"""Every golden case: numbers that other projects' own code gave for files of their formats. See tests/data/golden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_runtime import Dictionary, LatentStatistics, load_dictionary, save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference
from tests import golden

GOLDEN = golden.FOLDER
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json") if path.parent.name != "hooks_gpt2_tiny")


def read_case(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((GOLDEN / name / "case.json").read_text())
    return case


def source(name: str) -> Path:
    """What a user would name: the folder, or OpenAI's file."""
    folder = GOLDEN / name
    return folder / "autoencoder.pt" if name.startswith("openai") else folder


def assert_as_expected(name: str, dictionary: Dictionary, *, factor: float = 1) -> None:
    """Dense and sparse latents and reconstruction within the case's tolerance, times `factor`."""
    case, expected = read_case(name), load_file(GOLDEN / name / "expected.safetensors")
    keep = torch.ones(len(expected["x"]), dtype=torch.bool)
    keep[case["non_finite_rows"]] = False
    features = dictionary.encode(expected["x"])
    actual = {"acts": features.to_dense(), "recon": dictionary.decode(features)}

    def check(tensor: str, values: Tensor) -> None:
        tolerance = {key: factor * value for key, value in case["tolerance"][tensor].items()}
        torch.testing.assert_close(values[keep], expected[tensor][keep], **tolerance, msg=lambda m: f"{tensor}: {m}")

    for tensor, values in actual.items():
        check(tensor, values)
    check("acts", dictionary.encode_dense(expected["x"]))
    latents = torch.tensor([95, 0, 7, 8, 41])
    torch.testing.assert_close(
        dictionary.encode_features(expected["x"], latents), actual["acts"][:, latents], rtol=1e-5, atol=1e-4
    )


def statistics_of(n_latents: int) -> LatentStatistics:
    return LatentStatistics(*(torch.rand(n_latents) for _ in range(4)), torch.rand(n_latents, 2), torch.rand(2), 100)


def test_all_formats_have_cases() -> None:
    formats = {read_case(name)["format"] for name in CASES}
    assert formats == {"openai", "saelens", "sparsify", "dictionary_learning"}
    assert len(CASES) == 57


@pytest.mark.parametrize("name", CASES)
def test_latents_and_reconstructions_are_those_of_the_project(name: str) -> None:
    dictionary = load_dictionary(source(name))
    sizes = read_case(name)["sizes"]
    assert (dictionary.d_in, dictionary.n_latents) == (sizes["d_in"], sizes["n_latents"])
    assert_as_expected(name, dictionary)


@pytest.mark.parametrize("name", CASES)
def test_published_form_keeps_the_numbers(name: str, tmp_path: Path) -> None:
    """There and back through the project's own form, every field of every family."""
    dictionary = load_dictionary(source(name))
    placed = Dictionary(**{**vars(dictionary), "site": dictionary.site or "1.resid_pre"})
    statistics = statistics_of(placed.n_latents) if name.endswith("sub") else None
    save_dictionary(
        placed, tmp_path / "d", backbone=BackboneReference("b", "0" * 64), dtype="float32", statistics=statistics
    )
    loaded = load_dictionary(tmp_path / "d")
    assert (loaded.statistics is None) == (statistics is None)
    outside_weights = {"manifest", "origin", "statistics", "folder"}
    for field, value in vars(placed).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(loaded, field), value), field
        elif field not in outside_weights:
            assert getattr(loaded, field) == value, field
    assert_as_expected(name, loaded)


@pytest.mark.parametrize("name", [name for name in CASES if "load_dictionary" in read_case(name)["extras"]])
def test_dictionary_learning_rescales_when_it_loads_and_we_do_not(name: str) -> None:
    """Their load_dictionary makes decoder columns unit norm; latents differ by that norm, reconstructions do not."""
    dictionary = load_dictionary(source(name))
    expected, tolerance = load_file(GOLDEN / name / "expected.safetensors"), read_case(name)["tolerance"]
    norms = dictionary.decoder.norm(dim=1)
    acts = dictionary.encode_dense(expected["x"]) * norms
    torch.testing.assert_close(acts, expected["acts_load_dictionary"], **tolerance["acts_load_dictionary"])
    torch.testing.assert_close(
        dictionary.decode(dictionary.encode(expected["x"])),
        expected["recon_load_dictionary"],
        **tolerance["recon_load_dictionary"],
    )


@pytest.mark.parametrize("name", [name for name in CASES if "skip" in name])
def test_the_skip_connection_is_apart_from_the_latents(name: str) -> None:
    dictionary = load_dictionary(source(name))
    expected, tolerance = load_file(GOLDEN / name / "expected.safetensors"), read_case(name)["tolerance"]
    assert dictionary.skip is not None
    without = dictionary.decode(dictionary.encode(expected["x"])) - expected["x"] @ dictionary.skip.T
    torch.testing.assert_close(without, expected["recon_without_skip"], **tolerance["recon_without_skip"])
