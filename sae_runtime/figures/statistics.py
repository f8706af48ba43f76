"""Statistics of a dictionary's latents on rows of tokens or on text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.rows import packed_passes
from sae_runtime.data.text_sample import read_sample
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.statistics import LatentStatistics, LatentStatisticsBuilder
from sae_runtime.model.backbone import Backbone
from sae_runtime.progress import ProgressMeter


@torch.no_grad()
def measure_statistics(
    backbone: Backbone,
    dictionary: Dictionary,
    rows: Iterable[Sequence[int]],
    *,
    tokens_per_pass: int = 8_192,
    progress: ProgressMeter | None = None,
) -> LatentStatistics:
    """Statistics of every latent on rows of token ids.

    Raises:
        ValueError: the dictionary's site is not known, or there are no rows.
    """
    site = dictionary.site_in(backbone)
    builder = LatentStatisticsBuilder(dictionary.n_latents)
    for packed in packed_passes(rows, tokens_per_pass):
        builder.add(dictionary.encode(backbone.forward(packed, capture=[site]).activations[site]))
        if progress is not None:
            progress.reach(builder.n_tokens)
    return builder.build()


def measure_on_text(
    backbone: Backbone,
    dictionary: Dictionary,
    texts: Sequence[str | Path],
    n_tokens: int,
    *,
    context_length: int | None = None,
    seed: int = 0,
    bad: BadDocuments | None = None,
) -> LatentStatistics:
    """Statistics of every latent on about `n_tokens` tokens of text files, a seeded mixture of their documents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the dictionary's site is not known, there is no text, or a document cannot be used and `bad` does
            not say skip.
    """
    dictionary.site_in(backbone)  # before text is read
    sample = read_sample(backbone, texts, n_tokens, context_length=context_length, seed=seed, bad=bad)
    return measure_statistics(backbone, dictionary, sample.rows)
