"""Score: how likely texts are, unedited and edited."""

from __future__ import annotations

import math

from sae_runtime.causal.report import TextScore, TokenScores
from service.engine.measure_work import ScoreResult, ScoreWork
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.edits import EditReader
from service.rpc.errors import out_of_range
from service.rpc.model import ModelRpc
from service.rpc.text_inputs import TokenRow


class ScoreRpc(ModelRpc):
    """The handler of Score."""

    async def Score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        rows, work = await self._read(request)
        call.submit()
        with out_of_range("edits" if work.edits else "inputs"):
            result = await self.engine.score(work)
        reply = pb.ScoreResponse(request_id=call.request_id, logit_token_ids=work.logit_tokens)
        reply.results.extend(self._pack(request, rows, result))
        reply.timing.CopyFrom(call.timing(result.timing))
        return reply

    async def _read(self, request: pb.ScoreRequest) -> tuple[list[TokenRow], ScoreWork]:
        violations = Violations(self.limits)
        edit_reader = EditReader(self, violations)
        has_edits = edit_reader.read(request.edits, request.presets)
        logit_tokens = self.reader.read_logit_tokens(request.logit_tokens, violations)
        self.reader.check_include_tokens(request.include_tokens, violations)
        rows = await self.reader.read_inputs(request.inputs, request.overflow, violations, least=2)
        if not rows or not has_edits:
            violations.raise_if_any()
        return rows, ScoreWork(
            rows=tuple(row.ids for row in rows),
            edits=tuple([await edit_reader.finish(len(row.ids)) for row in rows]) if has_edits else (),
            logit_tokens=logit_tokens,
            max_relative_change=self.limits.max_relative_change or math.inf,
        )

    def _pack(self, request: pb.ScoreRequest, rows: list[TokenRow], result: ScoreResult) -> list[pb.InputScore]:
        scores = []
        for row, score in zip(rows, result.rows, strict=True):
            message = _input_score(score)
            message.n_tokens, message.truncated_tokens = len(row.ids), row.truncated
            if request.include_tokens:
                message.tokens.CopyFrom(self.reader.tokens(row))
            scores.append(message)
        return scores


def _input_score(score: TextScore) -> pb.InputScore:
    """Without the fields about the input itself."""
    return pb.InputScore(
        unedited=_token_scores(score.unedited),
        edited=None if score.edited is None else _token_scores(score.edited),
        kl=None if score.kl is None else score.kl.tolist(),
    )


def _token_scores(scores: TokenScores) -> pb.TokenScores:
    return pb.TokenScores(
        loss=scores.loss.tolist(),
        correct=scores.correct.tolist(),
        target_logits=scores.target_logits.tolist(),
        token_logits=scores.token_logits.ravel().tolist(),
        mean_loss=scores.mean_loss,
        accuracy=scores.accuracy,
    )
