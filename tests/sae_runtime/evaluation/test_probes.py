"""Probe tasks from labels and rules, averaged examples, and the choice of a latent, against dense computations."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from sae_runtime.data.documents import Document
from sae_runtime.data.text_sample import TextSample
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.evaluation.probe_tasks import TOKEN_RULES, Task, chunk_tasks, cut_chunks, token_tasks
from sae_runtime.evaluation.probes import ExampleBuilder, probe_figures
from tests.sae_runtime.evaluation.reference import fit_slowly

LABELS = [
    {"kind": "book", "author": "Jane Doe"},
    {"kind": "book", "author": "Émile Zola"},
    {"kind": "book", "author": "Plato"},
    {"kind": "parallel", "lang": "de"},
    {"kind": "parallel", "lang": "fr"},
    {"kind": "code", "author": "Plato"},
    {"kind": "code", "author": "Python"},
]
TEXTS = ["", " the", "The", "=", " 42", "\n", "ß", ".", "x", " Paris", "==", "?!", "\n\n", "a7"]


@pytest.fixture(scope="module")
def sample() -> TextSample:
    """Documents of 200 tokens with each combination of labels, eight each, in rows of 50 tokens."""
    documents = [Document("", each["kind"], {k: v for k, v in each.items() if k != "kind"}) for each in LABELS * 8]
    document = np.repeat(np.arange(len(documents)), 200)
    document[:3] = -1
    ids = random.Random(0).choices(range(len(TEXTS)), k=len(document))
    rows = [ids[start : start + 50] for start in range(0, len(ids), 50)]
    return TextSample(rows, documents, document, (document // len(LABELS)) % 2 == 0)


def test_chunks_lie_in_one_document_and_one_row(sample: TextSample) -> None:
    chunks = cut_chunks(sample, 20)
    sizes = np.bincount(chunks.of_token[chunks.of_token >= 0])
    assert set(sizes) == {20}
    assert len(chunks) == len(sizes) == 2 * len(sample.rows)  # 20 of 50 twice; 10 are left over
    for number in range(len(chunks)):
        tokens = np.flatnonzero(chunks.of_token == number)
        assert set(sample.document[tokens]) == {chunks.document[number]}
        assert len(set(sample.row[tokens])) == 1
        assert set(sample.fit[tokens]) == {chunks.fit[number]}


def test_text_level_tasks(sample: TextSample) -> None:
    chunks = cut_chunks(sample, 20)
    tasks = {task.name: task for task in chunk_tasks(sample, chunks, 15 * 4, seed=0)}
    assert sorted(tasks) == [
        "author_code_plato",  # one of two authors of the code; the other would be the same task
        "author_emile_zola",
        "author_jane_doe",
        "author_plato",
        "kind_book",
        "kind_code",
        "kind_parallel",
        "lang_de",
    ]
    for task in tasks.values():
        for examples, labels, fit in ((task.fit, task.fit_labels, True), (task.score, task.score_labels, False)):
            assert labels.sum() * 2 == len(labels) <= 120
            assert len(set(examples.tolist())) == len(examples)
            assert all(chunks.fit[examples] == fit)
    of = [sample.labels(int(d)) for d in chunks.document]
    zola = tasks["author_emile_zola"]
    for example, label in zip(zola.score, zola.score_labels, strict=True):
        assert of[example]["kind"] == "book"  # against other authors of the same kind of text
        assert (of[example]["author"] == "Émile Zola") == label
    german = tasks["lang_de"]
    assert {of[e]["lang"] for e, label in zip(german.fit, german.fit_labels, strict=True) if not label} == {"fr"}
    kind = tasks["kind_code"]
    assert {of[e]["kind"] for e, label in zip(kind.fit, kind.fit_labels, strict=True) if label} == {"code"}
    assert {of[e]["kind"] for e, label in zip(kind.fit, kind.fit_labels, strict=True) if not label} == {
        "book",
        "parallel",
    }


def test_token_level_tasks(sample: TextSample) -> None:
    tasks, tokens = token_tasks(sample, TEXTS.__getitem__, 100, seed=0)
    assert {task.name for task in tasks} == {f"token_{name}" for name in TOKEN_RULES}
    positives = {
        "token_equals_sign": {"=", "=="},
        "token_digit": {" 42", "a7"},
        "token_capital": {"The", " Paris"},
        "token_newline": {"\n", "\n\n"},
        "token_punctuation": {".", "?!"},
        "token_not_ascii": {"ß"},
        "token_word_start": {" the", " Paris"},
    }
    for task in tasks:
        for examples, labels, fit in ((task.fit, task.fit_labels, True), (task.score, task.score_labels, False)):
            assert set(sample.fit[tokens[examples]]) == {fit}
            texts = [TEXTS[i] for i in sample.ids[tokens[examples]]]
            assert "" not in texts
            assert [text in positives[task.name] for text in texts] == labels.tolist()
            assert -1 not in sample.document[tokens[examples]]


def test_too_few_examples_make_no_task(sample: TextSample) -> None:
    few = TextSample(sample.rows[:8], sample.documents, sample.document[:400], sample.fit[:400])
    assert chunk_tasks(few, cut_chunks(few, 20), 100, seed=0) == []


def features_of(dense: np.ndarray) -> SparseFeatures:
    order = np.argsort(-dense, axis=1)
    values = np.take_along_axis(dense, order, axis=1)
    return SparseFeatures(
        torch.from_numpy(np.where(values > 0, order, -1)), torch.from_numpy(values.clip(0)), dense.shape[1]
    )


def test_examples_are_means_over_their_tokens() -> None:
    rng = np.random.default_rng(0)
    dense = rng.exponential(1, (60, 9)) * (rng.random((60, 9)) < 0.3)
    example = np.repeat([0, -1, 1, 2, -1, 3], 10)
    builder, of_dense = ExampleBuilder(5, 9, 10), ExampleBuilder(5, 9, 10)
    for start in (0, 20, 30):
        part = slice(start, {0: 20, 20: 30, 30: 60}[start])
        builder.add(features_of(dense[part]), torch.from_numpy(example[part]))
        of_dense.add_dense(torch.from_numpy(dense[part]), torch.from_numpy(example[part]))
    expected = np.stack([dense[example == i].sum(0) / 10 for i in range(5)])
    for built in (builder.build(), of_dense.build()):
        found = np.stack([built.of_column(c) for c in range(9)], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_best_latent_is_chosen_on_one_split_and_scored_on_the_other() -> None:
    rng = np.random.default_rng(1)
    n = 240
    labels = np.arange(n) % 2 == 0
    dense = rng.exponential(1, (n, 6)) * (rng.random((n, 6)) < 0.4)
    dense[:, 3] = 2.0 * labels * (rng.random(n) < 0.8) + 0.5 * (rng.random(n) < 0.1)
    builder = ExampleBuilder(n, 6, 1)
    builder.add(features_of(dense), torch.arange(n))
    examples = builder.build()
    split = rng.permutation(n)
    task = Task("made", "token", split[:120], labels[split[:120]], split[120:], labels[split[120:]])
    figures: dict[str, Any] = probe_figures([task], {"latent": {"token": examples}, "neuron": {"token": examples}})

    losses = []
    for column in range(6):
        w, b, fit_loss = fit_slowly(dense[task.fit, column], task.fit_labels)
        logit = w * dense[task.score, column] + b
        losses.append([fit_loss, float(np.mean(np.log1p(np.exp(logit)) - task.score_labels * logit))])
    best = min(range(6), key=lambda c: losses[c][0])
    assert best == 3
    assert figures["probe_made_latent"] == 3
    assert figures["probe_made_fit_loss"] == pytest.approx(losses[3][0], rel=1e-3)
    assert figures["probe_made_loss"] == pytest.approx(losses[3][1], rel=1e-3)
    assert figures["probe_loss_mean"] == figures["probe_made_loss"] < math.log(2) / 2
    assert figures["probe_made_n_examples"] == 120
