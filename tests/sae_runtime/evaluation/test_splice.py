"""Cross-entropy, divergence and reconstruction against float64 sums over Hugging Face's own model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runtime import Backbone, Site
from sae_runtime.data.documents import Document
from sae_runtime.data.text_sample import TextSample
from sae_runtime.evaluation.baselines import Moments, to_inner
from sae_runtime.evaluation.splice import (
    baseline_figures,
    choose_windows,
    kind_figures,
    overall_figures,
    position_figures,
    splice_single_tokens,
)
from sae_runtime.figures.held_out import splice_tokens
from tests.sae_runtime.evaluation.reference import (
    FAMILIES,
    MODULES,
    HookedModel,
    random_dictionary,
    random_rows,
    reconstruct,
)

ROWS = random_rows(32, 20, 7, 32, 2)
KINDS = ["prose", "code", "prose"]  # of the three documents


def sample_of_rows() -> TextSample:
    """Three documents over the rows, which begin and end within them."""
    n = sum(map(len, ROWS))
    document = np.repeat([0, 1, 2], [25, 30, n - 55])
    return TextSample(ROWS, [Document("", kind) for kind in KINDS], document, np.zeros(n, bool))


def halved(x: Tensor, _: object) -> Tensor:
    """A baseline with an exact meaning for the reference to repeat."""
    return x / 2


def splice(backbone: Backbone, dictionary: Any, site: str, tokens_per_pass: int) -> Any:
    return splice_rows(backbone, dictionary, site, ROWS, tokens_per_pass)


def splice_rows(backbone: Backbone, dictionary: Any, site: str, rows: list[list[int]], tokens_per_pass: int) -> Any:
    parsed = Site.parse(site)
    raw, inner = Moments(dictionary.d_in), Moments(dictionary.d_in)
    for row in rows:
        x = backbone.activations(torch.tensor([row]), sites=[site])[site][0]
        raw.add(x)
        inner.add(to_inner(x, dictionary.encode(x).input_statistics))
    return splice_tokens(
        backbone,
        dictionary,
        parsed,
        rows,
        mean=raw.mean,
        inner_mean=inner.mean,
        baselines={"halved": halved},
        baseline_rows=2,
        tokens_per_pass=tokens_per_pass,
    )


def reference_figures(folder: Path, dictionary: Any, site: str, kept: list[tuple[int, int]]) -> dict[str, float]:
    """The figures of the given (row, position)s, by the definitions."""
    model = HookedModel(folder, site)
    everything, xs, ys, sums, predictions = [], [], [], dict.fromkeys(("clean", "spliced", "zero", "kl"), 0.0), 0
    for number, row in enumerate(ROWS):
        clean, x = model(row)
        y = reconstruct(dictionary, x)
        spliced, _ = model(row, lambda _, y=y: y)
        zero, _ = model(row, torch.zeros_like)
        everything.append(x)
        for t in range(len(row)):
            if (number, t) not in kept:
                continue
            xs.append(x[t])
            ys.append(y[t])
            if t + 1 == len(row):
                continue
            predictions += 1
            p, q = clean[t].softmax(0), spliced[t].softmax(0)
            sums["clean"] -= math.log(p[row[t + 1]])
            sums["spliced"] -= math.log(q[row[t + 1]])
            sums["zero"] -= math.log(zero[t].softmax(0)[row[t + 1]])
            sums["kl"] += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    mean = torch.cat(everything).mean(0)
    x, y = torch.stack(xs), torch.stack(ys)
    ce = {name: total / predictions for name, total in sums.items()}
    return {
        "nmse": float((y - x).square().sum() / (x - mean).square().sum()),
        "variance_explained": 1 - float((y - x).var(0, correction=0).sum() / x.var(0, correction=0).sum()),
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_ablated": ce["zero"],
        "delta_ce": ce["spliced"] - ce["clean"],
        "loss_recovered": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "kl": ce["kl"],
    }


ALL = [(number, t) for number, row in enumerate(ROWS) for t in range(len(row))]


@pytest.mark.parametrize("site", MODULES)
@pytest.mark.parametrize("normalization", ["none", "centred", "layer_norm", "constant_norm"])
def test_overall_figures(tiny_backbone_folder: Path, tiny_backbone: Backbone, site: str, normalization: str) -> None:
    dictionary = random_dictionary("topk", site, normalization)
    tokens = splice(tiny_backbone, dictionary, site, 60)
    figures = overall_figures(tokens, sample_of_rows(), seed=0, resamples=50)
    expected = reference_figures(tiny_backbone_folder, dictionary, site, ALL)
    for name, value in expected.items():
        tolerance = {"loss_recovered": 1e-2, "delta_ce": 1e-3}.get(
            name, 1e-4
        )  # these divide by, are, small differences
        assert figures[name] == pytest.approx(value, rel=tolerance), name
        if name in ("nmse", "kl", "delta_ce"):
            assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
    assert figures["l0"] == pytest.approx(6, abs=0.5)
    assert figures["dead_fraction"] >= 8 / 48


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_at_one_site(tiny_backbone_folder: Path, tiny_backbone: Backbone, family: str) -> None:
    dictionary = random_dictionary(family)
    figures = overall_figures(
        splice(tiny_backbone, dictionary, "0.resid_post_mlp", 1000), sample_of_rows(), seed=0, resamples=10
    )
    expected = reference_figures(tiny_backbone_folder, dictionary, "0.resid_post_mlp", ALL)
    assert {k: figures[k] for k in ("nmse", "ce_spliced", "kl")} == pytest.approx(
        {k: expected[k] for k in ("nmse", "ce_spliced", "kl")}, rel=1e-4
    )


def test_by_position_and_by_kind(tiny_backbone_folder: Path, tiny_backbone: Backbone) -> None:
    site, dictionary, sample = "0.resid_post_mlp", random_dictionary(), sample_of_rows()
    tokens = splice(tiny_backbone, dictionary, site, 60)
    figures = position_figures(tokens, sample)
    assert figures["position_start"] == [0, 1, 2, 4, 8, 16]
    assert figures["position_end"] == [1, 2, 4, 8, 16, 32]
    for i, (start, end) in enumerate(zip(figures["position_start"], figures["position_end"], strict=True)):
        kept = [(row, t) for row, t in ALL if start <= t < end]
        expected = reference_figures(tiny_backbone_folder, dictionary, site, kept)
        for name in ("nmse", "ce_clean", "ce_spliced", "kl"):
            assert figures[f"position_{name}"][i] == pytest.approx(expected[name], rel=1e-4), (name, start)

    figures = kind_figures(tokens, sample)
    assert figures["kinds"] == ["code", "prose"]
    for kind in figures["kinds"]:
        kept = [place for place, d in zip(ALL, sample.document, strict=True) if KINDS[d] == kind]
        expected = reference_figures(tiny_backbone_folder, dictionary, site, kept)
        assert figures[f"kind_{kind}_n_tokens"] == len(kept)
        for name in ("nmse", "ce_clean", "ce_spliced", "kl"):
            assert figures[f"kind_{kind}_{name}"] == pytest.approx(expected[name], rel=1e-4), (name, kind)


def test_a_baseline_is_measured_on_the_first_rows_only(tiny_backbone_folder: Path, tiny_backbone: Backbone) -> None:
    site = "0.resid_post_mlp"
    tokens = splice(tiny_backbone, random_dictionary(), site, 52)  # a pass ends with the second row
    measured = ~np.isnan(tokens.error["halved"])
    assert np.flatnonzero(measured).tolist() == list(range(52))
    model = HookedModel(tiny_backbone_folder, site)
    error = kl = 0.0
    for row in ROWS[:2]:
        clean, x = model(row)
        halved_logits, _ = model(row, lambda x: x / 2)
        error += float((x / 2).square().sum())
        p, q = clean[:-1].log_softmax(1), halved_logits[:-1].log_softmax(1)
        kl += float((p.exp() * (p - q)).sum())
    figures = baseline_figures(tokens, ["halved"])
    assert figures["baseline_n_tokens"] == 52
    assert figures["baseline_halved_nmse"] == pytest.approx(error / tokens.deviation[:52].sum(), rel=1e-4)
    assert figures["baseline_halved_kl"] == pytest.approx(kl / 50, rel=1e-4)
    assert "baseline_dictionary_loss_recovered" in figures


LOG_PROBABILITY_ROUNDING = 2.0**-21
"""A float32 between -4 and -8, as log-probabilities over 257 tokens are, is off by half of this; KL sums p - q."""


@pytest.mark.parametrize("tokens_per_pass", [20, 1000])
def test_one_token_alone(tiny_backbone_folder: Path, tiny_backbone: Backbone, tokens_per_pass: int) -> None:
    site, dictionary, position = "0.resid_post_mlp", random_dictionary(), 11
    windows = random_rows(16, 16, 16, seed=3)
    found = splice_single_tokens(
        tiny_backbone, dictionary, Site.parse(site), windows, position, tokens_per_pass=tokens_per_pass
    )
    model = HookedModel(tiny_backbone_folder, site)
    for i, row in enumerate(windows):

        def one(x: Tensor) -> Tensor:
            new = x.clone()
            new[position] = reconstruct(dictionary, x[position][None])[0]
            return new

        p, q = model(row)[0].log_softmax(1), model(row, one)[0].log_softmax(1)
        target = row[position + 1]
        kl = (p.exp() * (p - q)).sum(1)
        assert float(kl[:position].abs().max()) < 1e-12  # causal: nothing before it changes
        assert found.delta_ce[i] == pytest.approx(float(p[position, target] - q[position, target]), abs=1e-5)
        rounding = {"rel": 1e-3, "abs": LOG_PROBABILITY_ROUNDING}
        assert found.divergence[i] == pytest.approx(float(kl[position]), **rounding)
        later = float(kl[position + 1 :].mean())
        assert found.later_divergence[i] == pytest.approx(later, **rounding)
        assert later > 20 * LOG_PROBABILITY_ROUNDING  # so that the comparison says something


def test_windows_are_beginnings_of_long_enough_rows() -> None:
    rows = random_rows(5, 9, 8, 3, 20)
    assert choose_windows(rows, 8, 10, 0, "test") == [rows[1][:8], rows[2], rows[4][:8]]
    assert len(choose_windows(rows, 8, 2, 0, "test")) == 2
    assert choose_windows(rows, 21, 2, 0, "test") == []


def test_intervals_resample_documents(tiny_backbone: Backbone) -> None:
    """Every document twice, as rows of its own: no narrower than once, where rows would claim half the variance."""
    rows = random_rows(*[12] * 40, seed=8)
    tokens = splice_rows(
        tiny_backbone, random_dictionary(), "0.resid_post_mlp", [row for row in rows for _ in range(2)], 96
    )
    n = 40 * 24

    def width(document: np.ndarray) -> float:
        sample = TextSample(
            [row for row in rows for _ in range(2)], [Document("", "x")] * 80, document, np.zeros(n, bool)
        )
        figures = overall_figures(tokens, sample, seed=0, resamples=2000)
        return float(figures["kl_high"] - figures["kl_low"])

    whole, halves = width(np.repeat(np.arange(40), 24)), width(np.repeat(np.arange(80), 12))
    assert whole / halves == pytest.approx(2**0.5, rel=0.1)
