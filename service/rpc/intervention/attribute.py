"""AttributeFeatures: which features on which tokens drive a logit."""

from __future__ import annotations

from sae_runtime.causal.report import FeatureAttribution
from service.engine.measure_work import AttributeWork
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.rpc.array_inputs import read_ranking
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.errors import out_of_range
from service.rpc.labels import by_dictionary, dictionary_labels
from service.rpc.model import ModelRpc
from service.rpc.text_inputs import TokenRow

DEFAULT_COUNT = 20
"""Default number of attributions."""


class AttributeRpc(ModelRpc):
    """The handler of AttributeFeatures."""

    async def AttributeFeatures(self, request: pb.AttributeFeaturesRequest, call: Call) -> pb.AttributeFeaturesResponse:
        row, work = await self._read(request)
        call.submit()
        with out_of_range("input"):
            result = await self.engine.attribute(work)
        report = result.report
        features = by_dictionary(work.dictionaries, (pair.feature for pair in report.attributions))
        reply = pb.AttributeFeaturesResponse(
            request_id=call.request_id,
            metric=report.metric,
            attributions=[_attribution(attribution) for attribution in report.attributions],
            n_active=report.n_active,
            totals=report.totals,
            pearson=report.pearson,
            spearman=report.spearman,
            target_id=result.target,
            foil_id=work.foil,
            position=len(work.row) - 1,
            truncated_tokens=row.truncated,
            labels=await dictionary_labels(self.model, features, request.include_labels),
            timing=call.timing(result.timing),
        )
        if request.include_tokens:
            reply.tokens.CopyFrom(self.reader.tokens(TokenRow(work.row, 0, None)))
        return reply

    async def _read(self, request: pb.AttributeFeaturesRequest) -> tuple[TokenRow, AttributeWork]:
        limits, reader, violations = self.limits, self.reader, Violations(self.limits)
        violations.check_dictionary_names(request.dictionaries)
        count = request.count or min(DEFAULT_COUNT, limits.max_attributions)
        violations.check_limit("count", count, "max_attributions")
        target = reader.read_token(request.target, "target", violations) if request.HasField("target") else None
        foil = reader.read_token(request.foil, "foil", violations) if request.HasField("foil") else None
        if foil is not None and foil == target:
            violations.add("foil", "is the target itself")
        rank_by = read_ranking(request.rank_by, "rank_by", violations)
        reader.check_include_tokens(request.include_tokens, violations)
        row = await reader.read_one(
            request.input if request.HasField("input") else None,
            "input",
            request.overflow,
            limits.max_tokens_per_input,
            "max_tokens_per_input",
            "start",
            violations,
        )
        position = 0
        if row is not None:
            position = request.position if request.HasField("position") else len(row.ids) - 1
            if position >= len(row.ids):
                violations.add("position", f"is {position}, but the text has {len(row.ids)} tokens")
        violations.raise_if_any()
        assert row is not None, "a text that cannot be read is a violation"
        self.model.require_ablatable(request.dictionaries, "dictionaries")
        self.model.require_rankable(request.dictionaries, rank_by, "rank_by")
        work = AttributeWork(
            row.ids[: position + 1],
            tuple(request.dictionaries),
            target=target,
            foil=foil,
            count=count,
            rank_by=rank_by,
        )
        return row, work


def _attribution(attribution: FeatureAttribution) -> pb.FeatureAttribution:
    feature = pb.FeatureKey(**attribution.feature._asdict())
    return pb.FeatureAttribution(**vars(attribution) | {"feature": feature})
