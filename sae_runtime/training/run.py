"""One training run from text files to a published dictionary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sae_runtime.autoencoder import Dictionary
from sae_runtime.backbone import Backbone
from sae_runtime.evaluation.dictionary_evaluation import (
    DictionaryEvaluation,
    evaluate_dictionary,
    packed_passes,
    take_tokens,
)
from sae_runtime.evaluation.latent_statistics import LatentStatisticsBuilder
from sae_runtime.formats.manifest import BackboneReference, Manifest, Provenance
from sae_runtime.formats.published import save_dictionary
from sae_runtime.sites import Site
from sae_runtime.statistics import LatentStatistics
from sae_runtime.training.activation_stream import activation_chunks
from sae_runtime.training.card import render_card
from sae_runtime.training.checkpoint import load_checkpoint, save_checkpoint
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.initialisation import MEDIAN_SAMPLES
from sae_runtime.training.progress import ProgressCallback, ProgressMeter
from sae_runtime.training.shuffle_buffer import ShuffleBuffer
from sae_runtime.training.text import Document
from sae_runtime.training.token_rows import (
    CutterState,
    RowCutter,
    TrainingRows,
    encode_texts,
    is_held_out,
    mixed_documents,
    shuffled_held_out,
)
from sae_runtime.training.topk_trainer import TopKTrainer

_HELD_OUT_CHARACTERS_PER_TOKEN = 16  # read so much held-out text per token wanted, so that the choice is a fair sample

PROGRESS_INTERVAL = 0.5
"""Least seconds between two progress events of a stage."""

# Settings that may differ between a run and its continuation: they do not change the weights.
_FREE_ON_RESUME = {
    "out",
    "name",
    "checkpoint",
    "checkpoint_interval",
    "threads",
    "storage_dtype",
    "evaluation_tokens",
    "statistics_tokens",
}


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves behind."""

    path: Path
    """Folder of the published dictionary."""
    manifest: Manifest
    evaluation: DictionaryEvaluation
    dictionary: Dictionary
    """As published: float32 tensors with the values of the stored dtype, statistics attached."""


def run_training(config: TrainingConfig, progress: ProgressCallback | None = None) -> TrainingResult:
    """Trains, measures and publishes the dictionary that `config` describes.

    Continues from its checkpoint if there is one; that is removed once the dictionary is published. On
    KeyboardInterrupt a checkpoint is written first.

    Raises:
        FileExistsError: `config.out` exists.
        FileNotFoundError: a text file does not exist.
        ValueError: the site, the text, or the checkpoint does not fit; says what was found and what was expected.
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
    """
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; remove it or choose another `out`")
    for path in (*config.data, *config.held_out):
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
    previous_threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        meter = ProgressMeter(progress, PROGRESS_INTERVAL)
        weights = _train(config, meter)
        return _publish(config, weights, meter)
    finally:
        torch.set_num_threads(previous_threads)


class _Run:
    """Everything that a checkpoint holds, and the loop over it."""

    def __init__(self, config: TrainingConfig, backbone: Backbone) -> None:
        self.config = config
        self.backbone = backbone
        site = backbone.check_site(config.site)
        cutter = row_cutter(config, backbone)
        self.rows = TrainingRows(config.data, cutter, 0.0 if config.held_out else config.held_out_fraction)
        stream = activation_chunks(
            backbone,
            site,
            self.rows,
            tokens_per_pass=config.backbone_tokens,
            context_length=cutter.context_length,
            skip_first=config.prepend_end_of_text,
        )
        self.buffer = ShuffleBuffer(stream, config.buffer_tokens, seed=config.seed)
        self.identity = {
            "settings": config.model_dump(mode="json", exclude=_FREE_ON_RESUME),
            "backbone": backbone.fingerprint,
        }
        if config.checkpoint_path.exists():
            self.trainer = self._resume()
        else:
            sample = self.buffer.peek(min(MEDIAN_SAMPLES, config.buffer_tokens))
            self.trainer = TopKTrainer(config, backbone.site_width(site), sample)

    def save(self) -> None:
        state = {
            "identity": self.identity,
            "rows": self.rows.state_dict(),
            "buffer": self.buffer.state_dict(),
            "trainer": self.trainer.state_dict(),
        }
        save_checkpoint(state, self.config.checkpoint_path)

    def _resume(self) -> TopKTrainer:
        path = self.config.checkpoint_path
        state = load_checkpoint(path)
        found = state.get("identity", {})
        if found != self.identity:
            raise ValueError(
                f"{path} belongs to another run: {_difference(found, self.identity)}; "
                "restore the settings, or remove the checkpoint to start anew"
            )
        self.rows.load_state_dict(state["rows"])
        self.buffer.load_state_dict(state["buffer"])
        return TopKTrainer.from_state(self.config, state["trainer"])


def row_cutter(config: TrainingConfig, backbone: Backbone) -> RowCutter:
    """How this run cuts text into rows.

    Raises:
        ValueError: the context length is over the backbone's, or the backbone has no tokenizer.
    """
    context_length = config.context_length or backbone.context_length
    if context_length > backbone.context_length:
        raise ValueError(f"context_length is {context_length}, the backbone reads at most {backbone.context_length}")
    encode, end_of_text = encode_texts(backbone)
    return RowCutter(encode, end_of_text, context_length, config.rows, config.prepend_end_of_text)


def held_out_rows(config: TrainingConfig, backbone: Backbone, n_tokens: int) -> Iterator[list[int]]:
    """Rows of held-out text, at least `n_tokens` tokens together or all there is; a seeded mixture of all documents.

    Raises:
        ValueError: there is not enough held-out text for one row.
    """
    documents: Iterator[Document]
    if config.held_out:
        documents = mixed_documents(config.held_out)
    else:
        documents = (d for d in mixed_documents(config.data) if is_held_out(d, config.held_out_fraction))
    chosen = shuffled_held_out(documents, n_tokens * _HELD_OUT_CHARACTERS_PER_TOKEN, config.seed)
    cutter, state = row_cutter(config, backbone), CutterState()
    empty = True
    for row in take_tokens(cutter.cut(chosen, state), n_tokens):
        empty = False
        yield row
    if empty and len(state.remainder) > 1:
        empty = False
        yield state.remainder
    if empty:
        raise ValueError(
            f"no held-out text ({len(chosen)} documents): give held_out files or a larger held_out_fraction"
        )


def _train(config: TrainingConfig, meter: ProgressMeter) -> dict[str, torch.Tensor]:
    meter.begin("prepare", config.buffer_tokens)
    backbone = Backbone.load(config.backbone, dtype=config.backbone_dtype, device=config.device)
    run = _Run(config, backbone)
    saved_at = time.monotonic()
    meter.begin("train", config.n_steps * config.batch_tokens, done=run.trainer.step_count * config.batch_tokens)
    try:
        while run.trainer.step_count < config.n_steps:
            metrics = run.trainer.step(run.buffer.next_batch(config.batch_tokens))
            meter.advance(config.batch_tokens, metrics)
            if config.checkpoint_interval and time.monotonic() - saved_at >= config.checkpoint_interval:
                run.save()
                saved_at = time.monotonic()
    except KeyboardInterrupt:
        if config.checkpoint_interval:
            run.save()
        raise
    if config.checkpoint_interval:
        run.save()  # evaluation or publication may still fail
    return run.trainer.weights()


def _publish(config: TrainingConfig, weights: dict[str, torch.Tensor], meter: ProgressMeter) -> TrainingResult:
    backbone = Backbone.load(config.backbone, device=config.device)
    stored = getattr(torch, config.storage_dtype)
    dictionary = Dictionary(
        # The figures are those of what is stored.
        encoder=weights["encoder"].to(stored).float(),
        decoder=weights["decoder"].to(stored).float(),
        pre_bias=weights["pre_bias"],
        latent_bias=weights["latent_bias"],
        activation="topk",
        k=config.k,
        normalize=config.normalize,
        site=config.site,
        name=config.published_name,
    )
    meter.begin("statistics", config.statistics_tokens)
    statistics = measure_statistics(
        backbone, dictionary, held_out_rows(config, backbone, config.statistics_tokens), progress=meter
    )
    meter.begin("evaluate", config.evaluation_tokens)
    evaluation = evaluate_dictionary(
        backbone, dictionary, held_out_rows(config, backbone, config.evaluation_tokens), progress=meter.reach
    )
    meter.begin("publish", 1)
    dictionary = replace(dictionary, statistics=statistics)
    provenance = Provenance(
        code_version=_code_version(),
        config=config.provenance(),
        seed=config.seed,
        tokens=config.n_steps * config.batch_tokens,
        data=", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in config.data),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    manifest = save_dictionary(
        dictionary,
        config.out,
        backbone=BackboneReference(config.backbone, backbone.fingerprint, backbone.tokenizer_fingerprint),
        dtype=config.storage_dtype,
        context_length=config.context_length or backbone.context_length,
        provenance=provenance,
        evaluation=evaluation.figures(),
        card=render_card(dictionary, evaluation, statistics, provenance, config.backbone),
    )
    config.checkpoint_path.unlink(missing_ok=True)
    meter.reach(1)
    return TrainingResult(config.out, manifest, evaluation, replace(dictionary, manifest=manifest))


@torch.no_grad()
def measure_statistics(
    backbone: Backbone,
    dictionary: Dictionary,
    rows: Iterator[list[int]],
    *,
    tokens_per_pass: int = 8_192,
    progress: ProgressMeter | None = None,
) -> LatentStatistics:
    """Per-latent statistics of a dictionary on rows of tokens."""
    assert dictionary.site is not None
    site = Site.parse(dictionary.site)
    builder = LatentStatisticsBuilder(dictionary.n_latents)
    for packed in packed_passes(rows, tokens_per_pass):
        builder.add(dictionary.encode(backbone.forward(packed, capture=[site]).activations[site]))
        if progress is not None:
            progress.reach(builder.n_tokens)
    return builder.build()


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first settings that differ."""
    if found.get("backbone") != expected["backbone"]:
        return f"its backbone has fingerprint {found.get('backbone')}, this one {expected['backbone']}"
    theirs, ours = found.get("settings", {}), expected["settings"]
    names = [name for name in ours if theirs.get(name) != ours[name]]
    return ", ".join(f"{name} was {theirs.get(name)!r}, is {ours[name]!r}" for name in names[:3]) or "unknown settings"


def _code_version() -> str:
    try:
        return f"saeserve {metadata.version('saeserve')}"
    except metadata.PackageNotFoundError:
        return "saeserve (not installed)"
