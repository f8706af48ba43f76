"""Whole evaluations of every family on a tiny backbone: complete, documented, reproducible, and clear about errors."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_runtime import Backbone
from sae_runtime.data.text_sample import read_sample
from sae_runtime.dictionary.manifest import BackboneReference, Manifest, Provenance
from sae_runtime.evaluation.evaluate import complete_settings, evaluate
from sae_runtime.evaluation.figure_names import DESCRIPTIONS, describe
from sae_runtime.evaluation.plots import MissingPlotLibrary
from sae_runtime.evaluation.report import EvaluationReport
from sae_runtime.evaluation.settings import EvaluationSettings
from sae_runtime.figures.held_out import held_out_figures
from sae_runtime.progress import Progress
from tests.sae_runtime.evaluation.reference import FAMILIES, random_dictionary

README = Path(__file__).parents[3] / "sae_runtime" / "evaluation" / "README.md"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSettings:
    generator = random.Random(0)
    words = {
        "book": ["The cat", "sat on", "a mat.", "Then she", "said no!"],
        "maths": ["3 + 4 = 7", "x = 12", "9 - 2 = 7", "10 = 5 * 2"],
    }
    languages = {"de": ["ein Hund", "läuft über", "die Straße"], "fr": ["un chien", "là où", "été"]}
    records: list[dict[str, str]] = []
    for i in range(60):
        kind = ("book", "maths", "parallel")[i % 3]
        lang = ("de", "fr")[i % 2]
        text = " ".join(generator.choices(words.get(kind) or languages[lang], k=generator.randint(8, 16)))
        record = {"text": text + "\n", "kind": kind} | ({"lang": lang} if kind == "parallel" else {})
        records.append(record | ({"author": f"A{i % 2}"} if kind == "book" else {}))
    path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return EvaluationSettings(
        data=(path,),
        seed=0,
        tokens=2_000,
        baseline_tokens=600,
        feature_tokens=4_000,
        tokens_per_pass=256,
        probe_chunk=8,
        probe_examples=40,
        n2g_latents=6,
        n2g_examples=5,
        n2g_max_length=4,
        ablation_positions=4,
        ablation_latents=3,
        ablation_window=16,
        ablation_horizon=4,
        single_splice_positions=6,
        geometry_latents=20,
        resamples=50,
    )


@pytest.fixture(scope="module")
def report(tiny_backbone: Backbone, settings: EvaluationSettings) -> EvaluationReport:
    return evaluate(tiny_backbone, random_dictionary("topk"), settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    tiny_backbone: Backbone, settings: EvaluationSettings, family: str, tmp_path: Path, report: EvaluationReport
) -> None:
    normalization = {"relu": "none", "jumprelu": "constant_norm"}.get(family, "layer_norm")
    dictionary = random_dictionary(family, "1.mlp_post_act", normalization)
    found = evaluate(tiny_backbone, dictionary, settings)
    assert set(found.figures) == set(report.figures)
    found.write(tmp_path / "out")
    read = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert read == found.figures
    assert (read["activation"], read["normalization"]) == (family, normalization)
    assert not any(isinstance(value, dict) for value in read.values())
    # The short evaluation of the training job, by other code.
    rows = read_sample(tiny_backbone, settings.data, settings.tokens, seed=0).rows
    short = held_out_figures(tiny_backbone, dictionary, rows)
    for name, value in short.items():
        assert read[name] == pytest.approx(value, rel=1e-2 if name == "loss_recovered" else 1e-4), name


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    tiny_backbone: Backbone, settings: EvaluationSettings, report: EvaluationReport
) -> None:
    again = evaluate(tiny_backbone, random_dictionary("topk"), settings)
    assert again.to_json() == report.to_json()
    assert again.explanations_json() == report.explanations_json()
    other = evaluate(tiny_backbone, random_dictionary("topk"), settings.model_copy(update={"seed": 1}))
    assert other.figures["nmse"] != report.figures["nmse"]
    assert other.figures["n2g_latents"] != report.figures["n2g_latents"]


def test_every_figure_is_documented_and_every_documented_figure_exists(report: EvaluationReport) -> None:
    for name in report.figures:
        assert describe(name)
    for names in DESCRIPTIONS:
        for name in names.split(", "):
            pattern = re.compile(re.sub(r"<\w+>", r"\\w+", name))
            assert any(pattern.fullmatch(found) for found in report.figures), name
    with pytest.raises(KeyError):
        describe("nmsee")
    readme = README.read_text()
    for names, meaning in DESCRIPTIONS.items():
        assert f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {meaning} |" in readme, names


def test_figures_have_plausible_relations(report: EvaluationReport) -> None:
    f = report.figures
    assert f["n_tokens"] >= 2_000
    assert 600 <= f["baseline_n_tokens"] < 600 + 256 + 32  # whole rows, whole passes
    assert f["feature_tokens"] > f["n_tokens"]
    assert f["nmse_low"] <= f["nmse"] <= f["nmse_high"]
    assert f["variance_explained"] >= 1 - f["nmse"]
    assert f["baseline_mean_nmse"] == pytest.approx(1, abs=0.05)
    assert f["baseline_pca_components"] == 6
    assert f["baseline_pca_nmse"] < f["baseline_random_nmse"]
    assert sum(f[f"kind_{kind}_n_tokens"] for kind in f["kinds"]) == f["n_tokens"]
    assert set(f["probe_tasks"]) >= {"kind_maths", "lang_de", "author_a0", "token_equals_sign", "token_digit"}
    # The equals sign is one token here, so some latent or coordinate tells it nearly surely.
    assert min(f["probe_token_equals_sign_loss"], f["probe_token_equals_sign_neuron_loss"]) < math.log(2) / 2
    assert len(f["n2g_latents"]) == len(report.explanations) > 0
    assert f["setting_data"] == ["held_out.jsonl"]
    assert not any("/" in str(value) for name, value in f.items() if name != "backbone")  # files by their names


def test_what_is_left_out(tiny_backbone: Backbone, settings: EvaluationSettings) -> None:
    nothing = dict.fromkeys(
        ("baseline_tokens", "probe_examples", "n2g_latents", "ablation_positions", "single_splice_positions"), 0
    )
    f = evaluate(
        tiny_backbone, random_dictionary(), settings.model_copy(update=nothing | {"geometry_latents": 0})
    ).figures
    prefixes = {name.split("_")[0] for name in f if not name.startswith("setting_")}
    assert not prefixes & {"baseline", "probe", "n2g", "single", "geometry"}
    assert "ablation_latent_sparsity_mean" not in f
    assert "nmse" in f


def test_files_and_card(report: EvaluationReport, tmp_path: Path) -> None:
    provenance = Provenance(code_version="saeserve 9", config={"k": 6, "data": ["a", "b"]}, seed=1, tokens=1234)
    report.write(tmp_path / "out", provenance)
    report.write(tmp_path / "out", provenance)  # replaces the first
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [
        "CARD.md",
        "evaluation.json",
        "explanations.json",
        "plots/interpretability.png",
        "plots/latents.png",
        "plots/reconstruction.png",
    ]
    card = (tmp_path / "out" / "CARD.md").read_text()
    f = report.figures
    assert "# random-topk\n\nTopK (k = 6) dictionary of 48 latents for site `0.resid_post_mlp` (16 wide)" in card
    assert f"| NMSE | {f['nmse']:.4f} ({f['nmse_low']:.4f} to {f['nmse_high']:.4f}) |" in card
    for section in ("Baselines", "By kind of text", "Single tokens", "Probes", "N2G", "Decoder geometry", "Densities"):
        assert f"## {section}" in card
    assert "1,234 tokens" in card
    assert "| data | a, b |" in card
    for line in card.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "out" / line.split("(")[1].rstrip(")")).read_bytes().startswith(b"\x89PNG")
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in tables)
    explanations = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert [e["latent"] for e in explanations] == f["n2g_latents"]


def test_without_matplotlib_the_rest_is_written(
    report: EvaluationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingPlotLibrary, match=re.escape("pip install 'saeserve[evaluate]'")):
        report.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report.figures
    assert "## Probes" in (tmp_path / "out" / "CARD.md").read_text()
    assert "![" not in (tmp_path / "out" / "CARD.md").read_text()
    assert not (tmp_path / "out" / "plots").exists()


def test_progress_of_every_stage_ends_at_its_total(tiny_backbone: Backbone, settings: EvaluationSettings) -> None:
    events: list[Progress] = []
    evaluate(tiny_backbone, random_dictionary(), settings, events.append)
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["baselines", "splice", "features", "probes", "n2g", "ablation", "single splice", "geometry"]
    for stage in stages:
        of_stage = [event for event in events if event.stage == stage]
        assert of_stage[0].done == 0
        assert of_stage[-1].done == of_stage[-1].total
        assert [e.done for e in of_stage] == sorted(e.done for e in of_stage)


def test_rows_are_cut_as_in_training_unless_told_otherwise() -> None:
    config = {"seed": 7, "context_length": 16, "rows": "documents", "prepend_end_of_text": True}
    manifest = Manifest(
        name="d",
        backbone=BackboneReference("b", "f"),
        site="0.resid_post_mlp",
        architecture="topk",
        d_in=16,
        n_latents=48,
        k=6,
        normalization="layer_norm",
        tied=False,
        dtype="float32",
        provenance=Provenance(config=config),
    )
    dictionary = replace(random_dictionary(), manifest=manifest)
    filled = complete_settings(EvaluationSettings(rows="packed"), dictionary)
    assert (filled.context_length, filled.rows, filled.prepend_end_of_text) == (16, "packed", True)
    assert filled.seed == 7
    assert complete_settings(EvaluationSettings(), random_dictionary()).seed == 0
    assert filled.site == "0.resid_post_mlp"
    assert [path.name for path in filled.data] == ["heldout.jsonl.xz"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"site": None}, {}, "does not say which site"),
        ({"transcoder": True}, {}, "is a transcoder"),
        ({}, {"site": "1.mlp_post_act"}, "reads 16 values per token, site 1.mlp_post_act of .* has 64"),
        ({}, {"site": "7.resid_pre"}, "has layers 0 to 1"),
        ({}, {"context_length": 999}, "context_length is 999, the backbone reads at most 32"),
    ],
)
def test_what_cannot_be_measured(
    tiny_backbone: Backbone,
    settings: EvaluationSettings,
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    dictionary = replace(random_dictionary(), **changes)
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_backbone, dictionary, settings.model_copy(update=options))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokns": 3}, "Extra inputs are not permitted"),
        ({"ablation_horizon": 64}, "ablation_horizon is 64, expected less than"),
        ({"baseline_tokens": 200_000}, "more than tokens = 131072"),
        ({"site": "nowhere"}, "not of the form"),
        ({"probe_chunk": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**values)


def test_settings_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("tokens: 4000\nbaseline_tokens: 1000\nseed: 3\n")
    read = EvaluationSettings.from_yaml(path, seed=4)
    assert (read.tokens, read.seed) == (4000, 4)
    path.write_text("- a list")
    with pytest.raises(ValueError, match="expected a mapping of settings"):
        EvaluationSettings.from_yaml(path)
    for field in EvaluationSettings.model_fields.values():
        assert field.description
        assert field.description.endswith(".")
