"""N2G explanations (Foote et al. 2023, as used by Gao et al. 2024, section 4.3): n-grams with wildcards for a latent.

For some tokens on which a latent fires: the shortest suffix of the text before (and with) the token that keeps at least
half of the activation; every token of it whose replacement keeps at least half becomes a wildcard. All patterns of a
latent are its explanation, which predicts whether it fires on a token. Suffixes are read behind an end-of-text token,
and a token is replaced by end-of-text, the only special token that a GPT-2 has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_runtime.data.rows import packed_passes
from sae_runtime.data.text_sample import TextSample
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.evaluation.intervals import generator, with_interval
from sae_runtime.evaluation.ngram_trie import NgramTrie, Pattern
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressMeter

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

KEPT = 0.5
"""Share of the activation that a suffix or a replacement must keep."""
CANDIDATES_PER_LATENT = 8
"""Latents recorded for each latent to explain; not all of them fire often enough."""


class ActivationRecorder:
    """Records where randomly drawn latents fire. Memory grows with the number of their activations."""

    def __init__(self, n_latents: int, n_wanted: int, seed: int) -> None:
        order = generator(seed, "n2g latents").permutation(n_latents)
        self._order = order[: CANDIDATES_PER_LATENT * n_wanted]
        self._is_candidate = torch.zeros(n_latents, dtype=torch.bool)
        self._is_candidate[torch.from_numpy(self._order)] = True
        self._n_tokens = 0
        self._tokens: list[Integers] = []
        self._latents: list[Integers] = []
        self._values: list[npt.NDArray[np.float32]] = []

    def add(self, features: SparseFeatures) -> None:
        indices, values = features.indices.cpu(), features.values.float().cpu()
        kept = (indices >= 0) & self._is_candidate[indices.clamp_min(0)] & (values > 0)
        tokens, _ = kept.nonzero(as_tuple=True)
        self._tokens.append(tokens.numpy() + self._n_tokens)
        self._latents.append(indices[kept].numpy())
        self._values.append(values[kept].numpy())
        self._n_tokens += len(features)

    def firings(self) -> list[Firings]:
        """The candidates in their random order, those that never fired included."""
        tokens, latents = np.concatenate(self._tokens), np.concatenate(self._latents)
        values = np.concatenate(self._values)
        order = np.argsort(latents, kind="stable")
        tokens, latents, values = tokens[order], latents[order], values[order]
        bounds = np.searchsorted(latents, np.stack([self._order, self._order + 1]))
        return [
            Firings(int(latent), tokens[a:b], values[a:b]) for latent, a, b in zip(self._order, *bounds, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Firings:
    """Where one latent fires."""

    latent: int
    tokens: Integers
    """Tokens of the sample, ascending."""
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """The patterns of one latent, and how well they predict its activations on text they were not built from."""

    latent: int
    patterns: tuple[Pattern, ...]
    """Distinct, in order of discovery."""
    n_examples: int
    """Activations searched for patterns."""
    n_unexplained: int
    """Examples in which no suffix up to the maximum length keeps half of the activation."""
    n_predicted: int
    n_active: int
    n_both: int
    """Tokens of the scoring split: predicted, active, and both."""
    n_unigram_predicted: int
    n_unigram_both: int
    """The same for the simplest explanation: the tokens of the examples, without context."""

    @property
    def precision(self) -> float | None:
        """Share of the predicted tokens that are active; None where nothing is predicted."""
        return self.n_both / self.n_predicted if self.n_predicted else None

    @property
    def recall(self) -> float:
        """Share of the active tokens that are predicted."""
        return self.n_both / self.n_active


@dataclass
class _Example:
    """One activation on its way to a pattern."""

    latent: int
    value: float
    context: list[int]
    """The token that fires and those before it in its row, up to the maximum length."""
    length: int | None = None
    """Length of the shortest suffix that keeps half of the activation."""


@torch.no_grad()
def explain_latents(
    backbone: Backbone,
    dictionary: Dictionary,
    site: Site,
    sample: TextSample,
    firings: Sequence[Firings],
    *,
    end_of_text: int,
    n_latents: int,
    n_examples: int,
    max_length: int,
    seed: int,
    tokens_per_pass: int = 8_192,
    progress: ProgressMeter | None = None,
) -> tuple[list[Explanation], int]:
    """Explains the first `n_latents` of the candidates that fire at least `n_examples` times in each split.

    Returns:
        The explanations, and how many of the candidates fire often enough.
    """
    eligible = [f for f in firings if min(_split_counts(f, sample)) >= n_examples]
    chosen = eligible[:n_latents]
    length = min(max_length, backbone.context_length - 1)  # the end-of-text token takes a place
    read = _Reader(backbone, dictionary, site, end_of_text, tokens_per_pass)
    examples = [_examples(f, sample, n_examples, length, seed) for f in chosen]
    flat = [example for of_latent in examples for example in of_latent]
    _find_shortest_suffixes(read, flat, length, progress)
    generalised = _generalise(read, [example for example in flat if example.length is not None])
    patterns: dict[int, list[Pattern]] = {f.latent: [] for f in chosen}
    for latent, pattern in generalised:
        if pattern not in patterns[latent]:
            patterns[latent].append(pattern)
    scored = ~sample.fit & (sample.document >= 0)
    return [
        _score(f, tuple(patterns[f.latent]), of_latent, sample, scored)
        for f, of_latent in zip(chosen, examples, strict=True)
    ], len(eligible)


def n2g_figures(
    explanations: Sequence[Explanation], n_eligible: int, n_candidates: int, *, seed: int, resamples: int
) -> dict[str, Any]:
    """Means over latents with intervals, and each latent's figures as lists."""
    if not explanations:
        return {"n2g_latents": []}
    known = [e for e in explanations if e.precision is not None]
    examples = sum(e.n_examples for e in explanations)
    recorded: dict[str, list[float]] = {
        "n2g_precision_mean": [e.precision for e in known if e.precision is not None],
        "n2g_recall_mean": [e.recall for e in explanations],
        "n2g_f1_mean": [2 * e.n_both / (e.n_predicted + e.n_active) for e in explanations],
        "n2g_unigram_precision_mean": [
            e.n_unigram_both / e.n_unigram_predicted for e in explanations if e.n_unigram_predicted
        ],
        "n2g_unigram_recall_mean": [e.n_unigram_both / e.n_active for e in explanations],
        "n2g_unigram_f1_mean": [2 * e.n_unigram_both / (e.n_unigram_predicted + e.n_active) for e in explanations],
    }
    means: dict[str, Any] = {}
    for name, values in recorded.items():
        means |= with_interval(name, values, seed=seed, resamples=resamples)
    lengths = [len(pattern) for e in explanations for pattern in e.patterns]
    return {
        **means,
        "n2g_eligible_fraction": n_eligible / n_candidates,
        "n2g_silent_explanations": len(explanations) - len(known),
        "n2g_unexplained_fraction": sum(e.n_unexplained for e in explanations) / examples,
        "n2g_pattern_length_mean": float(np.mean(lengths)) if lengths else None,
        "n2g_patterns_mean": len(lengths) / len(explanations),
        "n2g_latents": [e.latent for e in explanations],
        "n2g_precision": [e.precision for e in explanations],
        "n2g_recall": [e.recall for e in explanations],
    }


class _Reader:
    """Reads one latent's activation on the last token of each text, with end-of-text put before the text."""

    def __init__(
        self, backbone: Backbone, dictionary: Dictionary, site: Site, end_of_text: int, tokens_per_pass: int
    ) -> None:
        self._backbone, self._dictionary, self._site = backbone, dictionary, site
        self.end_of_text, self._tokens_per_pass = end_of_text, tokens_per_pass

    def __call__(self, texts: Sequence[Sequence[int]], latents: Sequence[int]) -> npt.NDArray[np.float32]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of like length attend faster
        rows = [[self.end_of_text, *texts[i]] for i in order]
        ordered_latents = torch.tensor([latents[i] for i in order])
        values = np.zeros(len(texts), np.float32)
        done = 0
        for packed in packed_passes(rows, self._tokens_per_pass):
            x = self._backbone.forward(packed, capture=[self._site]).activations[self._site]
            features = self._dictionary.encode(x[packed.row_ends.to(x.device)].float())
            pass_rows = slice(done, done + len(packed.lengths))
            is_latent = features.indices == ordered_latents[pass_rows, None].to(features.indices.device)
            values[order[pass_rows]] = (features.values.float() * is_latent).sum(1).cpu().numpy()
            done = pass_rows.stop
        return values


def _split_counts(firings: Firings, sample: TextSample) -> tuple[int, int]:
    real = sample.document[firings.tokens] >= 0
    in_fit = sample.fit[firings.tokens]
    return int((in_fit & real).sum()), int((~in_fit & real).sum())


def _examples(firings: Firings, sample: TextSample, n_examples: int, length: int, seed: int) -> list[_Example]:
    fit = np.flatnonzero(sample.fit[firings.tokens] & (sample.document[firings.tokens] >= 0))
    drawn = np.sort(generator(seed, f"n2g {firings.latent}").permutation(fit)[:n_examples])
    examples = []
    for i in drawn:
        token = int(firings.tokens[i])
        start = max(int(sample.row_start[token]), token + 1 - length)
        context = sample.ids[start : token + 1].tolist()
        examples.append(_Example(firings.latent, float(firings.values[i]), context))
    return examples


def _find_shortest_suffixes(
    read: _Reader, examples: Sequence[_Example], max_length: int, progress: ProgressMeter | None
) -> None:
    open_ = list(examples)
    for length in range(1, max_length + 1):
        open_ = [e for e in open_ if e.length is None and len(e.context) >= length]
        if not open_:
            break
        values = read([e.context[-length:] for e in open_], [e.latent for e in open_])
        for example, value in zip(open_, values, strict=True):
            if value >= KEPT * example.value:
                example.length = length
        if progress is not None:
            progress.reach(length)
    if progress is not None:
        progress.reach(max_length)


def _generalise(read: _Reader, examples: Sequence[_Example]) -> list[tuple[int, Pattern]]:
    """Latent and pattern of each example whose shortest suffix is known."""
    texts, latents = [], []
    for example in examples:
        suffix = example.context[-(example.length or 0) :]
        for place in range(len(suffix)):
            texts.append([*suffix[:place], read.end_of_text, *suffix[place + 1 :]])
            latents.append(example.latent)
    values = iter(read(texts, latents))
    patterns = []
    for example in examples:
        suffix = example.context[-(example.length or 0) :]
        kept = [bool(next(values) >= KEPT * example.value) for _ in suffix]
        patterns.append((example.latent, tuple(None if k else t for k, t in zip(kept, suffix, strict=True))))
    return patterns


def _score(
    firings: Firings, patterns: tuple[Pattern, ...], examples: Sequence[_Example], sample: TextSample, scored: Mask
) -> Explanation:
    trie, unigrams = NgramTrie(), NgramTrie()
    for pattern in patterns:
        trie.insert(pattern)
    for example in examples:
        unigrams.insert((example.context[-1],))
    active = np.zeros(sample.n_tokens, bool)
    active[firings.tokens] = True
    predicted = trie.matches(sample.ids, sample.row_start) & scored
    by_token = unigrams.matches(sample.ids, sample.row_start) & scored
    return Explanation(
        latent=firings.latent,
        patterns=patterns,
        n_examples=len(examples),
        n_unexplained=sum(example.length is None for example in examples),
        n_predicted=int(predicted.sum()),
        n_active=int((active & scored).sum()),
        n_both=int((predicted & active).sum()),
        n_unigram_predicted=int(by_token.sum()),
        n_unigram_both=int((by_token & active).sum()),
    )
