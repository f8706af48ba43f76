"""From a dictionary of any format to the published form, checked against its backbone and measured on text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sae_runtime.data.text_sample import read_sample
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import check_backbone
from sae_runtime.dictionary.formats.published import save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference, Manifest, Provenance
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.evaluation.dictionary_evaluation import packed_passes
from sae_runtime.evaluation.latent_statistics import LatentStatisticsBuilder
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.version import code_version

_TOKENS_PER_PASS = 8_192


def publish(
    dictionary: Dictionary,
    path: str | os.PathLike[str],
    backbone: Backbone,
    *,
    name: str | None = None,
    dtype: str = "float32",
    context_length: int | None = None,
    statistics: LatentStatistics | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a dictionary, loaded from any format, as a published folder for a backbone; returns its manifest.

    `name` and `context_length` are what the file says unless given. The manifest records where the dictionary
    came from: the provenance of one that was published before, else the configuration of its file. Statistics are the
    given ones, else the dictionary's own, else none.

    ValueError: no site is known, or what `save_dictionary` refuses. DictionaryFormatError: the dictionary does not fit
    the backbone. FingerprintMismatch: it was published for another one. FileExistsError.
    """
    if dictionary.site is None:
        hook = dictionary.origin.hook if dictionary.origin is not None else None
        called = f" (the file calls it {hook!r})" if hook else ""
        raise ValueError(f"the dictionary does not say which site it reads{called}; give one, such as 8.resid_post_mlp")
    check_backbone(dictionary, backbone)
    manifest, origin = dictionary.manifest, dictionary.origin
    recorded = manifest.context_length if manifest else origin.context_length if origin else None
    return save_dictionary(
        dictionary,
        path,
        backbone=BackboneReference(backbone.name, backbone.fingerprint, backbone.tokenizer_fingerprint),
        statistics=statistics,
        name=name,
        dtype=dtype,
        context_length=context_length or recorded,
        provenance=manifest.provenance if manifest else _converted(dictionary),
        evaluation=manifest.evaluation if manifest else None,
        overwrite=overwrite,
    )


def measure_on_text(
    dictionary: Dictionary,
    backbone: Backbone,
    texts: Sequence[str | Path],
    n_tokens: int,
    *,
    context_length: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LatentStatistics:
    """Statistics of every latent on about `n_tokens` tokens of text files, a seeded mixture of their documents.

    progress: called with the number of tokens done. ValueError: no site, or no text.
    """
    if dictionary.site is None:
        raise ValueError("the dictionary does not say which site it reads")
    site = backbone.check_site(Site.parse(dictionary.site))
    sample = read_sample(backbone, texts, n_tokens, context_length=context_length, seed=seed)
    builder = LatentStatisticsBuilder(dictionary.n_latents)
    for packed in packed_passes(sample.rows, _TOKENS_PER_PASS):
        builder.add(dictionary.encode(backbone.forward(packed, capture=[site]).activations[site]))
        if progress is not None:
            progress(builder.n_tokens)
    return builder.build()


@dataclass(frozen=True)
class Fit:
    """How well a dictionary reconstructs the activations of a backbone."""

    nmse: float
    """Mean squared error over that of always predicting the mean activation."""
    l0: float
    """Active latents per token."""
    n_tokens: int


@torch.no_grad()
def measure_fit(
    dictionary: Dictionary,
    backbone: Backbone,
    texts: Sequence[str | Path],
    n_tokens: int,
    *,
    context_length: int | None = None,
) -> Fit:
    """Reconstruction on about `n_tokens` tokens of text files, in rows of at most the backbone's context length.

    ValueError: no site, no text of two tokens, or a backbone without a tokenizer.
    """
    if dictionary.site is None:
        raise ValueError("the dictionary does not say which site it reads")
    site = backbone.check_site(Site.parse(dictionary.site))
    length = min(context_length or backbone.context_length, backbone.context_length)
    sample = read_sample(backbone, texts, n_tokens, context_length=length)
    total = torch.zeros(dictionary.d_in, dtype=torch.float64)
    squares = error = 0.0
    n_active = n_read = 0
    for packed in packed_passes(sample.rows, _TOKENS_PER_PASS):
        x = backbone.forward(packed, capture=[site]).activations[site].float()
        features = dictionary.encode(x)
        wide = x.double().cpu()
        total += wide.sum(0)
        squares += float(wide.square().sum())
        error += float((dictionary.decode(features).double().cpu() - wide).square().sum())
        n_active += int((features.indices >= 0).sum())
        n_read += len(x)
    # Σ‖x − mean‖² = Σ‖x‖² − ‖Σx‖² / n
    variation = squares - float(total.square().sum()) / n_read
    return Fit(error / variation if variation > 0 else math.inf, n_active / n_read, n_read)


def _converted(dictionary: Dictionary) -> Provenance:
    config: dict[str, Any] = {}
    if (origin := dictionary.origin) is not None:
        config = {"converted_from": origin.format, "hook": origin.hook, "model": origin.model, **origin.config}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Provenance(code_version=code_version(), config=config, created=created)
