"""AblateFeatures: what taking features away, one at a time, does to the predictions on texts."""

from __future__ import annotations

from collections.abc import Sequence

from sae_runtime.causal.report import Ablation, EffectFigures, FeatureEffect, FeatureId, RankBy
from sae_runtime.dictionary.ranking import Ranking
from service.engine.measure_work import AblateWork
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import edits_pb2
from service.rpc.array_inputs import read_ranking
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.errors import out_of_range
from service.rpc.labels import by_dictionary, dictionary_labels
from service.rpc.model import ModelRpc
from service.rpc.text_inputs import TokenRow

_ABLATIONS: dict[int, Ablation] = {
    edits_pb2.ABLATION_UNSPECIFIED: "zero",
    edits_pb2.ABLATION_ZERO: "zero",
    edits_pb2.ABLATION_MEAN: "mean",
}
_ABLATION_VALUES = {"zero": edits_pb2.ABLATION_ZERO, "mean": edits_pb2.ABLATION_MEAN}
_RANKINGS: dict[int, RankBy] = {
    pb.ABLATION_RANKING_UNSPECIFIED: "kl",
    pb.ABLATION_RANKING_KL: "kl",
    pb.ABLATION_RANKING_LOSS: "loss",
    pb.ABLATION_RANKING_ACCURACY: "accuracy",
    pb.ABLATION_RANKING_LOGIT: "logit",
}


class AblateRpc(ModelRpc):
    """The handler of AblateFeatures."""

    async def AblateFeatures(self, request: pb.AblateFeaturesRequest, call: Call) -> pb.AblateFeaturesResponse:
        rows, work = await self._read(request)
        call.submit()
        with out_of_range("inputs"):
            result = await self.engine.ablate(work)
        report = result.report
        features = [effect.feature for effect in report.effects]
        names = work.dictionaries or dict.fromkeys(feature.dictionary for feature in features)
        labels = await dictionary_labels(self.model, by_dictionary(names, features), request.include_labels)
        return pb.AblateFeaturesResponse(
            request_id=call.request_id,
            n_texts=report.n_texts,
            n_targets=report.n_targets,
            loss=report.loss,
            accuracy=report.accuracy,
            effects=[_feature_effect(effect) for effect in report.effects],
            logit_token_ids=work.logit_tokens,
            truncated_tokens=[row.truncated for row in rows],
            n_variants=result.n_variants,
            labels=labels,
            timing=call.timing(result.timing),
        )

    async def _read(self, request: pb.AblateFeaturesRequest) -> tuple[list[TokenRow], AblateWork]:
        violations = Violations(self.limits)
        features: tuple[FeatureId, ...] = ()
        dictionaries: tuple[str, ...] = ()
        strongest_by: Ranking = "activation"
        if request.HasField("strongest"):
            dictionaries, count = tuple(request.strongest.dictionaries), request.strongest.count
            self._check_strongest(request, violations)
            strongest_by = read_ranking(request.strongest.rank_by, "strongest.rank_by", violations)
        else:
            features = _read_features(request.features, violations)
            count = len(features)
        ablations = _read_ablations(request.ablations, violations)
        violations.check_enum("rank_by", request.rank_by, _RANKINGS)
        logit_tokens = self.reader.read_logit_tokens(request.logit_tokens, violations)
        rows = await self.reader.read_inputs(request.inputs, request.overflow, violations, least=2)
        n_tokens = sum(len(row.ids) for row in rows)
        product = (
            f"have {n_tokens} tokens, and times {count} features, {len(ablations)} ablations and "
            f"(1 + {request.single_tokens}) that is {{}}"
        )
        variant_tokens = n_tokens * count * len(ablations) * (1 + request.single_tokens)
        violations.check_limit("inputs", variant_tokens, "max_variant_tokens", product)
        violations.raise_if_any()
        names = dictionaries or tuple(dict.fromkeys(feature.dictionary for feature in features))
        self.model.require_ablatable(names, "features")
        self.model.require_features(features)
        self.model.require_rankable(dictionaries, strongest_by, "strongest.rank_by")
        if "mean" in ablations:
            self.model.require_statistics(names, "ABLATION_MEAN", "ablations")
        return rows, AblateWork(
            rows=tuple(row.ids for row in rows),
            features=features,
            strongest=count if dictionaries else 0,
            strongest_by=strongest_by,
            dictionaries=dictionaries,
            ablations=ablations,
            logit_tokens=logit_tokens,
            single_tokens=request.single_tokens,
            rank_by=_RANKINGS[request.rank_by],
        )

    def _check_strongest(self, request: pb.AblateFeaturesRequest, violations: Violations) -> None:
        count, most = request.strongest.count, self.limits.max_ablated_features
        violations.check_dictionary_names(request.strongest.dictionaries, "strongest.dictionaries")
        if not 1 <= count <= most:
            violations.add("strongest.count", f"is {count}, expected 1 to max_ablated_features = {most}")
        if request.features:
            violations.add("strongest", "excludes features; set one of the two")


def _read_features(messages: Sequence[pb.FeatureKey], violations: Violations) -> tuple[FeatureId, ...]:
    if not messages:
        violations.add("features", "is empty; name features, or set strongest")
    elif violations.check_at_most("features", len(messages), "max_ablated_features"):
        features = tuple(FeatureId(message.dictionary, message.feature) for message in messages)
        for place, feature in enumerate(features):
            violations.check_dictionary_name(feature.dictionary, f"features[{place}].dictionary")
        violations.check_distinct("features", features, lambda feature: f"feature {feature.feature}")
        return features
    return ()


def _read_ablations(numbers: Sequence[int], violations: Violations) -> tuple[Ablation, ...]:
    for place, number in enumerate(numbers):
        violations.check_enum(f"ablations[{place}]", number, _ABLATIONS)
    ablations = tuple(_ABLATIONS.get(number, "zero") for number in numbers)
    violations.check_distinct("ablations", ablations, lambda ablation: f"the ablation to {ablation}")
    return ablations or ("zero",)


def _feature_effect(effect: FeatureEffect) -> pb.FeatureEffect:
    low, high = effect.delta_loss_interval
    return pb.FeatureEffect(
        feature=pb.FeatureKey(**effect.feature._asdict()),
        ablation=_ABLATION_VALUES[effect.ablation],
        active_tokens=effect.active_tokens,
        active_texts=effect.active_texts,
        mean_activation=effect.mean_activation,
        everywhere=_figures(effect.everywhere),
        at_active=_figures(effect.at_active),
        delta_loss_low=low,
        delta_loss_high=high,
        text_delta_loss=effect.text_delta_loss,
        text_kl=effect.text_kl,
        by_distance=[
            pb.DistanceEffect(first=distance.first, last=distance.last, figures=_figures(distance.figures))
            for distance in effect.by_distance
        ],
    )


def _figures(figures: EffectFigures) -> pb.EffectFigures:
    return pb.EffectFigures(**vars(figures))
