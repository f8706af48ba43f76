"""From trained weights to published dictionaries: stored precision, statistics, held-out figures, card, manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.manifest import Manifest, Provenance
from sae_runtime.dictionary.publish import publish
from sae_runtime.figures.card import density_figures_of, describe_dictionary, render_card
from sae_runtime.figures.held_out import held_out_figures
from sae_runtime.figures.statistics import measure_statistics
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressMeter
from sae_runtime.training.activations.run_rows import describe_data, held_out_rows
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.identity import recorded_settings
from sae_runtime.version import code_version


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run at one site."""

    path: Path
    """Folder of the published dictionary."""
    manifest: Manifest
    """Describes the dictionary; its held-out figures are `manifest.evaluation`."""
    dictionary: Dictionary
    """As published: float32 tensors with the values of the stored dtype, statistics attached."""


def publish_run(
    config: TrainingConfig, exports: Mapping[Site, Mapping[str, Any]], meter: ProgressMeter, bad: BadDocuments
) -> tuple[TrainingResult, ...]:
    """Measures and publishes the dictionaries of a run, in the order of its sites; all appear together.

    Args:
        exports: what `Trainer.export` gives, by site.
        bad: takes note of held-out documents that are skipped.

    Raises:
        FileExistsError: `config.out` exists.
        OSError: it cannot be written.
        ValueError: there is no held-out text.
    """
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; remove it or choose another `out`")
    backbone = Backbone.load(config.backbone, device=config.device)
    folder = config.out
    if config.sites:  # several folders appear at once, too
        folder = config.out.with_name(config.out.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    results = []
    for site, fields in exports.items():
        path = folder / str(site) if config.sites else folder
        result = _publish_one(config, backbone, site, fields, path, meter, bad)
        results.append(replace(result, path=config.out_of(str(site))))
    if config.sites:
        folder.rename(config.out)
    return tuple(results)


def dictionary_of(config: TrainingConfig, site: Site, fields: Mapping[str, Any]) -> Dictionary:
    """The dictionary that is published of what a trainer exports: large matrices rounded to the stored dtype."""
    stored = getattr(torch, config.storage_dtype)
    rounded = {name: fields[name].to(stored).float() for name in ("encoder", "decoder")}
    return Dictionary(
        **{**fields, **rounded},
        normalization="layer_norm" if config.normalize else "none",
        site=str(site),
        name=config.name_of(str(site)),
    )


def _publish_one(
    config: TrainingConfig,
    backbone: Backbone,
    site: Site,
    fields: Mapping[str, Any],
    path: Path,
    meter: ProgressMeter,
    bad: BadDocuments,
) -> TrainingResult:
    dictionary = dictionary_of(config, site, fields).to(config.device)  # the figures are those of what is stored
    meter.begin("statistics", config.statistics_tokens)
    rows = held_out_rows(config, backbone, config.statistics_tokens, bad)
    statistics = measure_statistics(backbone, dictionary, rows, progress=meter)
    meter.begin("evaluate", config.evaluation_tokens)
    rows = held_out_rows(config, backbone, config.evaluation_tokens, bad)
    figures = held_out_figures(backbone, dictionary, rows, progress=meter)
    meter.begin("publish", 1, "dictionary")
    dictionary = replace(dictionary.to("cpu"), statistics=statistics)
    provenance = Provenance(
        code_version=code_version(),
        config=recorded_settings(config),
        seed=config.seed,
        tokens=config.n_steps * config.batch_tokens,
        data=describe_data(config),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    described = describe_dictionary(dictionary, backbone.name) | figures | density_figures_of(statistics)
    manifest = publish(
        dictionary,
        path,
        backbone,
        dtype=config.storage_dtype,
        context_length=config.context_length or backbone.context_length,
        provenance=provenance,
        evaluation=figures,
        card=render_card(described, provenance=provenance),
    )
    meter.reach(1)
    return TrainingResult(path, manifest, replace(dictionary, manifest=manifest))
