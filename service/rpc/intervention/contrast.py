"""ContrastFeatures: which features tell two sets of texts apart, and an edit made of them."""

from __future__ import annotations

from typing import Literal

from sae_runtime.causal.report import FeatureContrast, SetScore, SuggestionTrial
from service.edits.messages import edit_message
from service.engine.measure_work import ContrastWork
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import feature_service_pb2
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.errors import out_of_range
from service.rpc.labels import by_dictionary, dictionary_labels
from service.rpc.model import ModelRpc
from service.rpc.text_inputs import TokenRow

DEFAULT_COUNT = 20
"""Default number of features."""
_AGGREGATIONS: dict[int, Literal["max", "mean"]] = {
    feature_service_pb2.AGGREGATION_UNSPECIFIED: "max",
    feature_service_pb2.AGGREGATION_MAX: "max",
    feature_service_pb2.AGGREGATION_MEAN: "mean",
}


class ContrastRpc(ModelRpc):
    """The handler of ContrastFeatures."""

    async def ContrastFeatures(self, request: pb.ContrastFeaturesRequest, call: Call) -> pb.ContrastFeaturesResponse:
        rows, work = await self._read(request)
        call.submit()
        with out_of_range("a"):
            result = await self.engine.contrast(work)
        rate = request.false_discovery_rate
        listed = [feature for feature in result.features if not rate or feature.q_value <= rate]
        listed = listed[: request.count or DEFAULT_COUNT]
        features = by_dictionary(work.dictionaries, (contrast.feature for contrast in listed))
        return pb.ContrastFeaturesResponse(
            request_id=call.request_id,
            features=[_contrast(feature) for feature in listed],
            n_tested=len(result.features),
            n_found=sum(feature.q_value <= 0.05 for feature in result.features),
            suggestion=[edit_message(edit) for edit in result.suggestion],
            trials=[_trial(trial) for trial in result.trials],
            truncated_tokens=[row.truncated for row in rows],
            labels=await dictionary_labels(self.model, features, request.include_labels),
            timing=call.timing(result.timing),
        )

    async def _read(self, request: pb.ContrastFeaturesRequest) -> tuple[list[TokenRow], ContrastWork]:
        violations = Violations(self.limits)
        violations.check_dictionary_names(request.dictionaries)
        if request.aggregation not in _AGGREGATIONS:
            violations.add("aggregation", "must be AGGREGATION_MAX or AGGREGATION_MEAN")
        violations.check_range("false_discovery_rate", request.false_discovery_rate, 1)
        violations.check_limit("count", request.count, "max_selected_features")
        violations.check_limit("suggest", request.suggest, "max_edits")
        if request.validate and not request.suggest:
            violations.add("validate", "needs suggest, which is 0")
        a, b = await self._read_set(request, "a", violations), await self._read_set(request, "b", violations)
        total = sum(len(row.ids) for row in a + b)
        violations.check_limit("a", total, "max_contrast_tokens", "and b have {} tokens together")
        if request.validate and not violations:
            for field, rows in (("a", a), ("b", b)):
                if all(len(row.ids) < 2 for row in rows):
                    violations.add(field, "has no text of two tokens, which scoring needs")
        violations.raise_if_any()
        self.model.require_ablatable(request.dictionaries, "dictionaries")
        return a + b, ContrastWork(
            a=tuple(row.ids for row in a),
            b=tuple(row.ids for row in b),
            dictionaries=tuple(request.dictionaries),
            aggregation=_AGGREGATIONS[request.aggregation],
            suggest=request.suggest,
            validate=request.validate,
        )

    async def _read_set(
        self, request: pb.ContrastFeaturesRequest, field: Literal["a", "b"], violations: Violations
    ) -> list[TokenRow]:
        texts = request.a if field == "a" else request.b
        if len(texts) == 1:
            violations.add(field, "has one text; at least two are needed")
        if not violations.check_count(field, len(texts), "max_contrast_texts"):
            return []
        return await self.reader.read_list(texts, field, request.overflow, violations)


def _contrast(contrast: FeatureContrast) -> pb.FeatureContrast:
    return pb.FeatureContrast(**vars(contrast) | {"feature": pb.FeatureKey(**contrast.feature._asdict())})


def _trial(trial: SuggestionTrial) -> pb.SuggestionTrial:
    return pb.SuggestionTrial(
        edits=[edit_message(edit) for edit in trial.edits],
        a=_set_score(trial.a),
        b=_set_score(trial.b),
        shift=trial.shift,
    )


def _set_score(score: SetScore) -> pb.SetScore:
    low, high = score.interval
    return pb.SetScore(delta_loss=score.delta_loss, delta_loss_low=low, delta_loss_high=high, kl=score.kl)
