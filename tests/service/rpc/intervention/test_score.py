"""Score equals the hooked model; an edit out of range fails alone."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
import torch

from sae_runtime import Edit
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import edits_pb2
from tests.builders import edited_model
from tests.service.conftest import Served
from tests.service.rpc.intervention.texts import TEXTS, ids, inputs
from tests.service.rpc.reading import failure


async def test_scores_equal_the_hooked_model(served: Served) -> None:
    reference = edited_model(served.backbone, served.dictionaries)
    messages = [
        edits_pb2.Edit(dictionary="mid", feature=3, set=edits_pb2.Amount(value=6.0)),
        edits_pb2.Edit(
            dictionary="wide",
            feature=5,
            ablate=edits_pb2.ABLATION_MEAN,
            positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_LAST),
        ),
    ]
    choices = [pb.TokenChoice(text="e"), pb.TokenChoice(id=9)]
    plain, edited = await asyncio.gather(
        served.interventions.Score(pb.ScoreRequest(inputs=inputs(), logit_tokens=choices, include_tokens=True)),
        served.interventions.Score(
            pb.ScoreRequest(request_id="s-1", inputs=inputs(), edits=messages, logit_tokens=choices)
        ),
    )
    assert edited.request_id == "s-1"
    assert list(plain.logit_token_ids) == [ids(served, "e")[0], 9]
    for text, without, both in zip(TEXTS, plain.results, edited.results, strict=True):
        row = ids(served, text)
        assert b"".join(without.tokens.pieces).decode() == text
        assert without.n_tokens == both.n_tokens == len(row)
        assert not without.HasField("edited")
        edits = [
            Edit("mid", 3, "set", value=6.0),
            Edit("wide", 5, "ablate_mean", positions=(len(row) - 1,)),
        ]
        before = torch.stack([reference.next_logits(row[: i + 1], len(row), []) for i in range(len(row))])
        after = torch.stack([reference.next_logits(row[: i + 1], len(row), edits) for i in range(len(row))])
        for scores, logits in ((without.unedited, before), (both.unedited, before), (both.edited, after)):
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none")
            np.testing.assert_allclose(scores.loss, loss, atol=1e-4)
            assert scores.mean_loss == pytest.approx(float(loss.mean()), abs=1e-4)
            right = (logits[:-1].argmax(-1) == torch.tensor(row[1:])).tolist()
            assert list(scores.correct) == right
            assert scores.accuracy == pytest.approx(np.mean(right))
            wanted = logits[:, list(plain.logit_token_ids)]
            np.testing.assert_allclose(np.array(scores.token_logits).reshape(-1, 2), wanted, atol=1e-3)
            targets = logits[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            np.testing.assert_allclose(scores.target_logits, targets, atol=1e-3)
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        np.testing.assert_allclose(both.kl, (p.exp() * (p - q)).sum(-1), atol=1e-4)
    assert max(edited.results[0].kl) > 1e-3
    assert edited.timing.total_ms >= edited.timing.compute_ms > 0


async def test_an_edit_out_of_range_fails_alone(served: Served) -> None:
    wild = edits_pb2.Edit(dictionary="plain", feature=1, set=edits_pb2.Amount(value=3e38))
    fine = edits_pb2.Edit(dictionary="plain", feature=1, set=edits_pb2.Amount(value=1.0))
    calls = [served.interventions.Score(pb.ScoreRequest(inputs=inputs(), edits=[e])) for e in (fine, wild, fine)]
    first, bad, last = await asyncio.gather(calls[0], failure(calls[1]), calls[2])
    assert (bad.code, bad.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["edits"])
    np.testing.assert_allclose(first.results[0].edited.loss, last.results[0].edited.loss, atol=1e-5)
    assert np.isfinite(first.results[0].edited.loss).all()
