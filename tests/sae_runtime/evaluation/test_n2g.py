"""N2G against a slow reading of its definition: one text at a time, one token at a time."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_runtime import Backbone, Site
from sae_runtime.data.documents import Document
from sae_runtime.data.text_sample import TextSample
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.evaluation.n2g import ActivationRecorder, Explanation, Firings, explain_latents, n2g_figures
from sae_runtime.evaluation.ngram_trie import NgramTrie, Pattern
from tests.sae_runtime.evaluation.reference import FAMILIES, random_dictionary

SITE = "0.resid_post_mlp"


def matches_slowly(pattern: Pattern, ids: list[int], token: int, row_start: int) -> bool:
    if token - len(pattern) + 1 < row_start:
        return False
    return all(want is None or want == ids[token - back] for back, want in enumerate(reversed(pattern)))


def test_the_trie_finds_what_a_search_over_all_patterns_finds() -> None:
    generator = random.Random(0)
    ids = generator.choices(range(4), k=300)
    row_start = np.repeat([0, 7, 100, 220], [7, 93, 120, 80])
    found_any = 0
    for _ in range(40):
        patterns = [
            tuple(generator.choice([None, 0, 1, 2, 3]) for _ in range(generator.randint(1, 5)))
            for _ in range(generator.randint(1, 4))
        ]
        trie = NgramTrie()
        for pattern in patterns:
            trie.insert(pattern)
        expected = [any(matches_slowly(p, ids, t, row_start[t]) for p in patterns) for t in range(300)]
        assert trie.matches(np.array(ids), row_start).tolist() == expected
        found_any += 0 < sum(expected) < 300
    assert found_any > 20


def test_a_trie_without_patterns_matches_nothing() -> None:
    assert not NgramTrie().matches(np.array([1, 2]), np.zeros(2, np.int64)).any()


@pytest.fixture(scope="module")
def sample() -> TextSample:
    generator = random.Random(0)
    words = ["the cat ", "a dog = ", "7 + 9\n", "cat and ", "= dog "]
    rows = [
        [ord(c) - 32 + 1 for c in "".join(generator.choices(words, k=8))[:32].replace("\n", "~")] for _ in range(60)
    ]
    document = np.repeat(np.arange(20), [sum(map(len, rows[i : i + 3])) for i in range(0, 60, 3)])
    return TextSample(rows, [Document("", "x")] * 20, document, document % 2 == 0)


def activation(backbone: Backbone, dictionary: Dictionary, text: list[int], latent: int) -> float:
    """On the last token behind end-of-text, through the padded forward and dense latents."""
    x = backbone.activations(torch.tensor([[0, *text]]), sites=[SITE])[SITE][0, -1:]
    return float(dictionary.encode_dense(x)[0, latent])


def explain_slowly(
    backbone: Backbone, dictionary: Dictionary, sample: TextSample, dense: np.ndarray, latent: int, max_length: int
) -> tuple[set[Pattern], int]:
    """Patterns from all activations of the fit split, and how many have none."""
    patterns, unexplained = set(), 0
    ids = sample.ids.tolist()
    for token in np.flatnonzero((dense[:, latent] > 0) & sample.fit):
        value, start = dense[token, latent], int(sample.row_start[token])
        suffix = next(
            (
                ids[token + 1 - n : token + 1]
                for n in range(1, max_length + 1)
                if token + 1 - n >= start
                and activation(backbone, dictionary, ids[token + 1 - n : token + 1], latent) >= value / 2
            ),
            None,
        )
        if suffix is None:
            unexplained += 1
            continue
        pattern: list[int | None] = []
        for i, t in enumerate(suffix):
            without = activation(backbone, dictionary, [*suffix[:i], 0, *suffix[i + 1 :]], latent)
            pattern.append(None if without >= value / 2 else t)
        patterns.add(tuple(pattern))
    return patterns, unexplained


@pytest.mark.parametrize("family", FAMILIES)
def test_explanations_are_those_of_the_definition(tiny_backbone: Backbone, sample: TextSample, family: str) -> None:
    dictionary = random_dictionary(family)
    if dictionary.k is None:  # sparse enough for a slow search
        dictionary = replace(dictionary, latent_bias=dictionary.latent_bias - 0.8)
    x = torch.cat([tiny_backbone.activations(torch.tensor([row]), sites=[SITE])[SITE][0] for row in sample.rows])
    dense = dictionary.encode_dense(x).numpy()
    recorder = ActivationRecorder(48, 48, seed=0)
    for start in range(0, len(x), 500):
        recorder.add(dictionary.encode(x[start : start + 500]))
    firings = recorder.firings()
    assert sorted(f.latent for f in firings) == list(range(48))
    for f in firings:
        assert f.tokens.tolist() == np.flatnonzero(dense[:, f.latent] > 0).tolist()
        np.testing.assert_allclose(f.values, dense[f.tokens, f.latent], rtol=1e-4, atol=1e-6)

    def fires_in_both(f: Firings) -> int:
        return min(int(sample.fit[f.tokens].sum()), int((~sample.fit[f.tokens]).sum()))

    rare = sorted((f for f in firings if fires_in_both(f) >= 3), key=lambda f: len(f.tokens))[:2]
    explanations, n_eligible = explain_latents(
        tiny_backbone,
        dictionary,
        Site.parse(SITE),
        sample,
        [*rare, Firings(0, np.zeros(0, np.int64), np.zeros(0, np.float32))],  # one that never fires
        end_of_text=0,
        n_latents=3,
        n_examples=3,
        max_length=5,
        seed=0,
        tokens_per_pass=100,
    )
    assert n_eligible == len(explanations) == len(rare) == 2
    for found in explanations:
        active = dense[:, found.latent] > 0
        patterns, unexplained = explain_slowly(tiny_backbone, dictionary, sample, dense, found.latent, 5)
        # Not all activations are used, so the patterns are among those of all.
        assert set(found.patterns) <= patterns
        assert found.n_unexplained <= unexplained
        assert len(found.patterns) <= found.n_examples
        ids, start = sample.ids.tolist(), sample.row_start
        predicted = np.array(
            [any(matches_slowly(p, ids, t, start[t]) for p in found.patterns) for t in range(len(ids))]
        )
        scored = ~sample.fit
        assert found.n_predicted == (predicted & scored).sum()
        assert found.n_active == (active & scored).sum()
        assert found.n_both == (predicted & active & scored).sum()


def test_all_activations_give_all_patterns(tiny_backbone: Backbone, sample: TextSample) -> None:
    dictionary = random_dictionary("topk")
    x = torch.cat([tiny_backbone.activations(torch.tensor([row]), sites=[SITE])[SITE][0] for row in sample.rows])
    dense = dictionary.encode_dense(x).numpy()
    recorder = ActivationRecorder(48, 48, seed=0)
    recorder.add(dictionary.encode(x))

    def fires_in_both(latent: int) -> int:
        active = dense[:, latent] > 0
        return min(int((active & sample.fit).sum()), int((active & ~sample.fit).sum()))

    chosen = min((f for f in recorder.firings() if fires_in_both(f.latent) >= 3), key=lambda f: len(f.tokens))
    swapped = TextSample(sample.rows, sample.documents, sample.document, sample.fit)
    n_fit = int(swapped.fit[chosen.tokens].sum())
    n_examples = min(n_fit, len(chosen.tokens) - n_fit)
    if n_fit > n_examples:  # so that every activation of the fit split is used
        swapped = TextSample(sample.rows, sample.documents, sample.document, ~sample.fit)
    (found,), _ = explain_latents(
        tiny_backbone,
        dictionary,
        Site.parse(SITE),
        swapped,
        [chosen],
        end_of_text=0,
        n_latents=1,
        n_examples=n_examples,
        max_length=5,
        seed=0,
    )
    patterns, unexplained = explain_slowly(tiny_backbone, dictionary, swapped, dense, found.latent, 5)
    assert set(found.patterns) == patterns
    assert found.n_unexplained == unexplained
    assert found.n_examples == n_examples


def test_figures() -> None:
    def explanation(predicted: int, active: int, both: int) -> Explanation:
        return Explanation(1, ((1, None), (2,)), 10, 2, predicted, active, both, 0, 0)

    figures = n2g_figures(
        [explanation(4, 10, 2), explanation(10, 5, 5), explanation(0, 5, 0)], 6, 8, seed=0, resamples=50
    )
    assert figures["n2g_precision"] == [0.5, 0.5, None]
    assert figures["n2g_precision_mean"] == 0.5
    assert figures["n2g_recall_mean"] == pytest.approx((0.2 + 1 + 0) / 3)
    assert figures["n2g_f1_mean"] == pytest.approx((4 / 14 + 10 / 15 + 0) / 3)
    assert figures["n2g_silent_explanations"] == 1
    assert figures["n2g_eligible_fraction"] == 0.75
    assert figures["n2g_unexplained_fraction"] == 0.2
    assert figures["n2g_pattern_length_mean"] == 1.5
    assert n2g_figures([], 0, 8, seed=0, resamples=50) == {"n2g_latents": []}
