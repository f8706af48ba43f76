"""The whole catalogue: its pages against plain counting, repeatable, and the same after a break."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_runtime import Backbone
from sae_runtime.catalogue.build import build_catalogue
from sae_runtime.catalogue.records import CatalogueInfo, FeaturePage, Label
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.progress import Progress
from tests.sae_runtime.catalogue.conftest import N_LATENTS, ReferenceToken, activations

Build = Callable[..., tuple[CatalogueInfo, list[FeaturePage]]]


@pytest.fixture
def build(tiny_backbone: Backbone, dictionary: Dictionary, settings: CatalogueSettings, tmp_path: Path) -> Build:
    def run(**arguments: Any) -> tuple[CatalogueInfo, list[FeaturePage]]:
        names = {"dictionary": dictionary, "checkpoint": tmp_path / "new.partial", "settings": settings} | arguments
        checkpoint = names.pop("checkpoint")
        checkpoint.unlink(missing_ok=True) if "checkpoint" not in arguments else None
        info, pages = build_catalogue(
            tiny_backbone, names.pop("dictionary"), names.pop("settings"), checkpoint, **names
        )
        return info, list(pages)

    return run


def without_time(built: tuple[CatalogueInfo, list[FeaturePage]]) -> tuple[CatalogueInfo, list[FeaturePage]]:
    return replace(built[0], created=""), built[1]


def test_the_pages(
    build: Build,
    dictionary: Dictionary,
    tiny_backbone: Backbone,
    reference: list[ReferenceToken],
    records: list[dict[str, Any]],
) -> None:
    other = replace(dictionary, decoder=dictionary.decoder.flip(0), name="other")
    info, pages = build(others={"other": other})
    z = activations(reference)
    assert [page.summary.feature for page in pages] == list(range(N_LATENTS))
    assert (info.n_tokens, info.n_latents) == (len(reference), N_LATENTS)
    assert info.n_documents == len({token.document for token in reference})
    assert (info.dictionary, info.sources) == ("tiny", ("corpus.jsonl",))
    assert info.backbone_fingerprint == tiny_backbone.fingerprint
    for page in pages:
        latent = page.summary.feature
        fires = z[:, latent] > 0
        assert page.n_firings == fires.sum()
        assert page.summary.firing_rate == pytest.approx(fires.mean())
        assert page.mean_active == pytest.approx(z[fires, latent].mean() if fires.any() else 0, rel=1e-4)
        assert ("dead" in page.summary.flags) == (not fires.any())
        assert ("dense" in page.summary.flags) == (fires.mean() > 0.1)
        for context in page.contexts:
            place = context.place
            record = records[place.record]
            tokenized = tiny_backbone.encode_text(record["text"])
            first = place.position - context.peak
            ids = tokenized.ids[first : first + len(context.tokens)]
            assert context.tokens == tuple(map(tiny_backbone.token_bytes, ids))
            assert place.character == tokenized.char_starts[place.position]
            assert (place.source, place.text_kind) == ("corpus.jsonl", record["kind"])
            assert place.language == record.get("lang", "")
            token = next(
                i
                for i, t in enumerate(reference)
                if (t.document, t.position_in_document) == (place.record, place.position)
            )
            exact = z[token - context.peak : token - context.peak + len(context.tokens), latent]
            assert context.activations == pytest.approx(exact.tolist(), abs=max(float(exact.max()) / 250, 1e-6))
            assert (context.activation > 0) == (context.kind != "silent")
        kinds = [context.kind for context in page.contexts]
        assert kinds == sorted(kinds, key=["strongest", "quantile", "random", "silent"].index)
        strongest = [c.activation for c in page.contexts if c.kind == "strongest"]
        assert strongest == sorted(strongest, reverse=True)
        if fires.any():
            assert strongest[0] == pytest.approx(float(z[:, latent].max()), rel=1e-4)
            assert page.output_score is not None
        counts = {figure.token: figure.count for figure in page.active_tokens}
        ids = np.array([token.id for token in reference])
        assert counts == {token: (fires & (ids == token)).sum() for token in counts}
        assert page.summary.top_tokens == tuple(figure.piece for figure in page.active_tokens[:5])
        mirror = [n for n in page.neighbors if n.dictionary == "other"]
        assert (mirror[0].feature, mirror[0].how) == (N_LATENTS - 1 - latent, "decoder")
        assert mirror[0].score == pytest.approx(1, abs=1e-5)
        assert all(n.feature != latent for n in page.neighbors if n.dictionary == "tiny")
        assert len(page.promoted) == len(page.suppressed) == 10
    live = [page for page in pages if page.n_firings]
    assert info.figures["dead"] == pytest.approx(1 - len(live) / N_LATENTS)
    for flag in ("dense", "positional", "single_token"):
        assert info.figures[flag] == pytest.approx(np.mean([flag in page.summary.flags for page in live]))
    assert info.figures["median_token_r2"] == pytest.approx(np.median([page.token_r2 for page in live]))


def test_the_same_seed_gives_the_same_pages(build: Build, settings: CatalogueSettings) -> None:
    first = without_time(build())
    assert without_time(build()) == first
    reseeded = build(settings=settings.model_copy(update={"seed": 1}))
    assert [p.contexts for p in reseeded[1]] != [p.contexts for p in first[1]]
    assert [p.histogram for p in reseeded[1]] == [p.histogram for p in first[1]]


class Killed(Exception):
    pass


@pytest.mark.parametrize("passes", [1, 7])
def test_it_goes_on_after_a_break(build: Build, settings: CatalogueSettings, tmp_path: Path, passes: int) -> None:
    """Bit for bit what a run without a break gives, and without running the model on the first part again."""
    settings = settings.model_copy(update={"checkpoint_minutes": 0.0})
    whole = without_time(build(settings=settings))
    checkpoint = tmp_path / "killed.partial"

    def kill(event: Progress) -> None:
        nonlocal passes
        passes -= event.stage == "text" and event.done > 0
        if passes < 0:
            raise Killed

    from sae_runtime import progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "INTERVAL", 0.0)
        with pytest.raises(Killed):
            build(settings=settings, checkpoint=checkpoint, progress=kill)
    assert checkpoint.exists()
    assert without_time(build(settings=settings, checkpoint=checkpoint)) == whole
    assert without_time(build(settings=settings, checkpoint=checkpoint)) == whole  # the finished one


@pytest.mark.parametrize("damage", ["settings", "text", "shorter text", "no checkpoint"])
def test_a_checkpoint_of_something_else_is_not_used(
    build: Build, settings: CatalogueSettings, tmp_path: Path, corpus: Path, damage: str
) -> None:
    checkpoint = tmp_path / "other.partial"
    build(settings=settings, checkpoint=checkpoint)
    changed = tmp_path / "corpus.jsonl"
    lines = corpus.read_text().splitlines(keepends=True)
    match damage:
        case "settings":
            settings = settings.model_copy(update={"random_contexts": 2})
        case "text":
            changed.write_text("".join([*lines[:-1], '{"text": "other text at the end"}\n']))
            settings = settings.model_copy(update={"data": (str(changed),)})
        case "shorter text":
            changed.write_text("".join(lines[:9]))
            settings = settings.model_copy(update={"data": (str(changed),)})
        case _:
            checkpoint.write_bytes(b"no checkpoint")
    expected = without_time(build(settings=settings))
    assert without_time(build(settings=settings, checkpoint=checkpoint)) == expected


def test_a_dictionary_without_statistics(build: Build, dictionary: Dictionary, settings: CatalogueSettings) -> None:
    _, pages = build(dictionary=replace(dictionary, statistics=None))
    for page in pages[:-1]:
        assert page.summary.max_activation == pytest.approx(max(c.activation for c in page.contexts), rel=1e-4)
        assert sum(page.histogram) == page.n_firings
    few = settings.model_copy(update={"statistics_tokens": 64})
    _, pages = build(dictionary=replace(dictionary, statistics=None), settings=few)
    assert all(page.summary.max_activation > 0 for page in pages if page.n_firings)


def test_labels_are_found_on_one_half_and_tested_on_the_other(build: Build, settings: CatalogueSettings) -> None:
    seen: list[tuple[int, int]] = []

    def find_label(examples: Any, vocabulary: Any, promoted: Any) -> Label | None:
        seen.append((len(examples.fit), len(examples.held_out)))
        assert set(examples.fit.document) & set(examples.held_out.document) == set()
        assert len(promoted) == 10
        assert len(vocabulary) == 257
        return Label(f"label {len(seen)}", "rule", f1=0.8) if len(seen) % 2 else None

    info, pages = build(find_label=find_label)
    live = [page for page in pages if page.n_firings]
    assert len(seen) == len(live)
    assert [page.summary.label for page in live[:2]] == ["label 1", ""]
    assert (live[0].labels[0].f1, live[0].summary.label_f1, live[0].summary.label_source) == (0.8, 0.8, "rule")
    assert info.figures["labelled"] == pytest.approx(-(-len(live) // 2) / len(live))
    info, pages = build(settings=settings.model_copy(update={"labels": False}), find_label=find_label)
    assert info.figures["labelled"] == 0
    assert not any(page.labels for page in pages)


def test_counts_of_0_leave_things_out(build: Build, dictionary: Dictionary, settings: CatalogueSettings) -> None:
    counts = [
        name for name, field in CatalogueSettings.model_fields.items() if any(_allows_0(m) for m in field.metadata)
    ]
    nothing = settings.model_copy(update=dict.fromkeys(counts, 0))
    assert {"neighbors", "together", "promoted_tokens", "effect_latents", "shown_silent"} < set(counts)
    _, pages = build(settings=nothing)
    for page in pages:
        assert page.neighbors == page.promoted == page.suppressed == page.active_tokens == ()
        assert (page.ablation_kl, page.output_score) == (None, None)
        assert {context.kind for context in page.contexts} <= {"strongest"}
        assert all(len(context.tokens) == 1 for context in page.contexts)
    transcoder = replace(dictionary, transcoder=True)
    _, pages = build(dictionary=transcoder)
    assert all(page.promoted == () and page.output_score is None for page in pages)
    _, pages = build(settings=settings.model_copy(update={"promoted_tokens": 0}))
    assert all(page.output_score is None for page in pages)
    assert any(page.ablation_kl is not None for page in pages)


def _allows_0(constraint: Any) -> bool:
    return getattr(constraint, "ge", None) == 0


def test_what_cannot_be_done(build: Build, dictionary: Dictionary, settings: CatalogueSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which site"):
        build(dictionary=replace(dictionary, site=None))
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        build(settings=settings.model_copy(update={"data": (str(tmp_path / "nothing.txt"),)}))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"no text of two tokens or more in .*empty\.txt"):
        build(settings=settings.model_copy(update={"data": (str(tmp_path / "empty.txt"),)}))
    eye = torch.eye(8)
    narrow = Dictionary(
        encoder=eye, decoder=eye, pre_bias=torch.zeros(8), latent_bias=torch.zeros(8), activation="relu", name="narrow"
    )
    with pytest.raises(ValueError, match="'narrow' has rows of 8, dictionary 'tiny' of 16"):
        build(others={"narrow": narrow})
