"""Scores against Hugging Face's GPT-2 with forward hooks, in float64."""

from __future__ import annotations

import pytest
import torch

from sae_runtime import Backbone, Dictionary, Edit
from sae_runtime.causal import predictions
from sae_runtime.causal.score import ScoredRow, score_rows
from tests.sae_runtime.causal.conftest import HookedModel

TOKENS = [7, 100, 3]


def test_scores_of_a_mixed_batch_equal_the_hooked_model(
    backbone64: Backbone,
    dictionaries64: dict[str, Dictionary],
    hooked: HookedModel,
    rows: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predictions, "CACHED_ENTRIES", 2 * 257)
    monkeypatch.setattr(predictions, "LOGIT_ENTRIES", 7 * 257)  # tiles that do not end with rows
    edits = {
        0: [Edit("stream", 3, "set", value=2.0), Edit("attention", 5, "ablate_zero", positions=(1, 4))],
        1: [Edit("neurons", 2, "add", value=1.5)],
        3: [Edit("attention", 1, "ablate_mean")],
    }
    mean = float(dictionaries64["attention"].statistics.mean[1])
    hooks = {
        0: [
            ("stream", 3, lambda z, p: torch.full_like(z, 2.0)),
            ("attention", 5, lambda z, p: torch.where((p == 1) | (p == 4), 0.0, z)),
        ],
        1: [("neurons", 2, lambda z, p: z + 1.5)],
        3: [("attention", 1, lambda z, p: torch.full_like(z, mean))],
    }
    scored = [ScoredRow(row, edits.get(i, ()), TOKENS if i != 1 else [100]) for i, row in enumerate(rows)]
    scores = score_rows(backbone64, scored, dictionaries64)
    for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
        plain, _ = hooked.logits(row)
        tokens = scored[i].logit_tokens
        _same(score.unedited, plain, row, tokens)
        if i not in edits:
            assert score.edited is None
            assert score.kl is None
            continue
        changed, _ = hooked.logits(row, hooks[i])
        _same(score.edited, changed, row, tokens)
        p, q = plain.log_softmax(-1), changed.log_softmax(-1)
        torch.testing.assert_close(score.kl, (p.exp() * (p - q)).sum(-1), atol=1e-9, rtol=1e-7)
        assert float(score.kl.max()) > 1e-4


def _same(scores: predictions.Predictions, logits: torch.Tensor, row: list[int], tokens: list[int]) -> None:
    targets = torch.tensor(row[1:])
    loss = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none")
    torch.testing.assert_close(scores.loss[:-1], loss, atol=1e-9, rtol=0)
    assert scores.loss[-1] == 0
    assert scores.correct[:-1].tolist() == (logits[:-1].argmax(-1) == targets).tolist()
    assert not scores.correct[-1]
    torch.testing.assert_close(
        scores.target_logit[:-1], logits[:-1].gather(1, targets[:, None])[:, 0], atol=1e-9, rtol=0
    )
    torch.testing.assert_close(scores.token_logits, logits[:, tokens], atol=1e-9, rtol=0)


def test_edits_that_cover_no_token_change_nothing(
    tiny_backbone: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]
) -> None:
    dictionaries = {name: dictionary.to(dtype=torch.float32) for name, dictionary in dictionaries64.items()}
    edit = Edit("stream", 3, "set", value=9.0, positions="generated")
    (score,) = score_rows(tiny_backbone, [ScoredRow(rows[0], [edit])], dictionaries)
    assert torch.equal(score.edited.loss, score.unedited.loss)
    assert score.kl.abs().max() == 0
