"""InterventionService: scores, ablations, attributions and contrasts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sae_runtime.causal.report import Ablation, FeatureId, RankBy
from service.edits.messages import edit_message
from service.engine.errors import NonFiniteActivations
from service.engine.measure_work import AblateWork, AttributeWork, ContrastWork, ScoreWork
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import common_pb2, edits_pb2, feature_service_pb2
from service.rpc import causal_replies as replies
from service.rpc.call import Call
from service.rpc.checks import Violations, check_dictionary_names, first_repeated
from service.rpc.edits import LACKS_STATISTICS, EditReader
from service.rpc.errors import Violation, failed_precondition, features_not_found, invalid_argument, shown
from service.rpc.limits import Limits
from service.rpc.served import ServedModel
from service.rpc.text_inputs import TextInputReader, TokenRow

if TYPE_CHECKING:
    from service.engine.engine import Engine

DEFAULT_COUNT = 20
"""Attributions or contrasted features, where the request does not say."""
IS_TRANSCODER = "TRANSCODER"
"""Type of the PreconditionFailure violations of dictionaries that decode to another site than they read."""

_ABLATIONS: dict[int, Ablation] = {
    edits_pb2.ABLATION_UNSPECIFIED: "zero",
    edits_pb2.ABLATION_ZERO: "zero",
    edits_pb2.ABLATION_MEAN: "mean",
}
_RANKINGS: dict[int, RankBy] = {
    pb.ABLATION_RANKING_UNSPECIFIED: "kl",
    pb.ABLATION_RANKING_KL: "kl",
    pb.ABLATION_RANKING_LOSS: "loss",
    pb.ABLATION_RANKING_ACCURACY: "accuracy",
    pb.ABLATION_RANKING_LOGIT: "logit",
}
_AGGREGATIONS: dict[int, Literal["max", "mean"]] = {
    feature_service_pb2.AGGREGATION_UNSPECIFIED: "max",
    feature_service_pb2.AGGREGATION_MAX: "max",
    feature_service_pb2.AGGREGATION_MEAN: "mean",
}


class CausalRpc:
    """Handlers of InterventionService's measurements."""

    def __init__(self, engine: Engine, served: ServedModel, limits: Limits, reader: TextInputReader) -> None:
        self._engine = engine
        self._served = served
        self._limits = limits
        self._reader = reader

    # Score

    async def Score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        violations = Violations()
        edit_reader = EditReader(self._served, self._limits, self._engine, self._reader, violations)
        has_edits = bool(edit_reader.read(request.edits, request.presets))
        tokens = self._read_tokens(request.logit_tokens, "logit_tokens", violations)
        self._check_include_tokens(request.include_tokens, violations)
        rows = await self._read_texts(request.inputs, "inputs", request.overflow, violations)
        if not rows or not has_edits:
            violations.raise_if_any()
        edits = [await edit_reader.finish(len(row.ids)) for row in rows] if has_edits else []
        work = ScoreWork(
            rows=tuple(row.ids for row in rows),
            edits=tuple(edits),
            logit_tokens=tokens,
            max_relative_change=self._limits.max_relative_change or math.inf,
        )
        submitted = time.perf_counter()
        try:
            result = await self._engine.score(work)
        except NonFiniteActivations as error:
            raise _out_of_range("edits" if has_edits else "inputs", error) from error
        reply = pb.ScoreResponse(request_id=call.request_id, logit_token_ids=tokens)
        for row, score in zip(rows, result.rows, strict=True):
            entry = replies.input_score(score)
            entry.n_tokens, entry.truncated_tokens = len(row.ids), row.truncated
            if request.include_tokens:
                entry.tokens.CopyFrom(replies.tokens(self._reader, row))
            reply.results.append(entry)
        reply.timing.CopyFrom(call.timing(result.timing, submitted))
        return reply

    # AblateFeatures

    async def AblateFeatures(self, request: pb.AblateFeaturesRequest, call: Call) -> pb.AblateFeaturesResponse:
        violations = Violations()
        rows, work = await self._read_ablation(request, violations)
        submitted = time.perf_counter()
        try:
            result = await self._engine.ablate(work)
        except NonFiniteActivations as error:
            raise _out_of_range("inputs", error) from error
        report = result.report
        return pb.AblateFeaturesResponse(
            request_id=call.request_id,
            n_texts=report.n_texts,
            n_targets=report.n_targets,
            loss=report.loss,
            accuracy=report.accuracy,
            effects=[replies.feature_effect(effect) for effect in report.effects],
            logit_token_ids=work.logit_tokens,
            truncated_tokens=[row.truncated for row in rows],
            n_variants=result.n_variants,
            timing=call.timing(result.timing, submitted),
        )

    async def _read_ablation(
        self, request: pb.AblateFeaturesRequest, violations: Violations
    ) -> tuple[list[TokenRow], AblateWork]:
        limits = self._limits
        features: tuple[FeatureId, ...] = ()
        dictionaries: tuple[str, ...] = ()
        count = 0
        if request.HasField("strongest"):
            dictionaries, count = tuple(request.strongest.dictionaries), request.strongest.count
            check_dictionary_names(dictionaries, limits, violations, "strongest.dictionaries")
            if not 1 <= count <= limits.max_ablated_features:
                bounds = f"1 to max_ablated_features = {limits.max_ablated_features}"
                violations.add("strongest.count", f"is {count}, expected {bounds}")
            if request.features:
                violations.add("strongest", "excludes features; set one of the two")
        else:
            features = self._read_features(request.features, violations)
            count = len(features)
        for place, ablation in enumerate(request.ablations):
            violations.check_enum(f"ablations[{place}]", ablation, edits_pb2.Ablation.values())
        ablations = tuple(_ABLATIONS.get(number, "zero") for number in request.ablations) or ("zero",)
        repeated = first_repeated(ablations)
        if repeated is not None:
            violations.add(f"ablations[{repeated}]", "is named twice")
        violations.check_enum("rank_by", request.rank_by, _RANKINGS)
        tokens = self._read_tokens(request.logit_tokens, "logit_tokens", violations)
        rows = await self._read_texts(request.inputs, "inputs", request.overflow, violations)
        n_tokens = sum(len(row.ids) for row in rows)
        variants = n_tokens * count * len(ablations) * (1 + request.single_tokens)
        if variants > limits.max_variant_tokens:
            violations.add(
                "inputs",
                f"have {n_tokens} tokens, and times {count} features, {len(ablations)} ablations and "
                f"(1 + {request.single_tokens}) that is {variants}, more than "
                f"max_variant_tokens = {limits.max_variant_tokens}",
            )
        violations.raise_if_any()
        self._require(dictionaries or tuple(dict.fromkeys(feature.dictionary for feature in features)), "features")
        self._require_features(features)
        if "mean" in ablations:
            self._require_statistics(dictionaries or [feature.dictionary for feature in features])
        return rows, AblateWork(
            rows=tuple(row.ids for row in rows),
            features=features,
            strongest=count if dictionaries else 0,
            dictionaries=dictionaries,
            ablations=ablations,
            logit_tokens=tokens,
            single_tokens=request.single_tokens,
            rank_by=_RANKINGS[request.rank_by],
        )

    def _read_features(self, messages: Sequence[pb.FeatureKey], violations: Violations) -> tuple[FeatureId, ...]:
        if not messages:
            violations.add("features", "is empty; name features, or set strongest")
            return ()
        limits = self._limits
        if not violations.check_count("features", len(messages), limits.max_ablated_features, "max_ablated_features"):
            return ()
        features = tuple(FeatureId(message.dictionary, message.feature) for message in messages)
        for place, feature in enumerate(features):
            if not feature.dictionary:
                violations.add(f"features[{place}].dictionary", "is empty, expected a dictionary's name")
        repeated = first_repeated(features)
        if repeated is not None:
            violations.add(f"features[{repeated}]", f"feature {features[repeated].feature} is named twice")
        return features

    # AttributeFeatures

    async def AttributeFeatures(self, request: pb.AttributeFeaturesRequest, call: Call) -> pb.AttributeFeaturesResponse:
        limits, violations = self._limits, Violations()
        check_dictionary_names(request.dictionaries, limits, violations)
        count = request.count or min(DEFAULT_COUNT, limits.max_attributions)
        if count > limits.max_attributions:
            violations.add("count", f"is {count}, more than max_attributions = {limits.max_attributions}")
        target = self._read_token(request.target, "target", violations) if request.HasField("target") else None
        foil = self._read_token(request.foil, "foil", violations) if request.HasField("foil") else None
        if foil is not None and foil == target:
            violations.add("foil", "is the target itself")
        self._check_include_tokens(request.include_tokens, violations)
        if not request.HasField("input"):
            violations.add("input", "is not set")
        row = await self._read_prompt(request, violations)
        position = 0
        if row is not None:
            position = request.position if request.HasField("position") else len(row.ids) - 1
            if position >= len(row.ids):
                violations.add("position", f"is {position}, but the text has {len(row.ids)} tokens")
        violations.raise_if_any()
        assert row is not None, "a text that cannot be read is a violation"
        self._require(request.dictionaries, "dictionaries")
        ids = row.ids[: position + 1]
        submitted = time.perf_counter()
        try:
            result = await self._engine.attribute(
                AttributeWork(ids, tuple(request.dictionaries), target=target, foil=foil, count=count)
            )
        except NonFiniteActivations as error:
            raise _out_of_range("input", error) from error
        report = result.report
        reply = pb.AttributeFeaturesResponse(
            request_id=call.request_id,
            metric=report.metric,
            attributions=[replies.attribution(each) for each in report.attributions],
            n_active=report.n_active,
            totals=report.totals,
            pearson=report.pearson,
            spearman=report.spearman,
            target_id=result.target,
            foil_id=foil,
            position=position,
            truncated_tokens=row.truncated,
            timing=call.timing(result.timing, submitted),
        )
        if request.include_tokens:
            reply.tokens.CopyFrom(replies.tokens(self._reader, TokenRow(ids, 0, None)))
        return reply

    async def _read_prompt(self, request: pb.AttributeFeaturesRequest, violations: Violations) -> TokenRow | None:
        if not request.HasField("input"):
            violations.check_enum("overflow", request.overflow, common_pb2.Overflow.values())
            return None
        rows = await self._reader.read(
            [request.input],
            ["input"],
            request.overflow,
            self._limits.max_tokens_per_input,
            "max_tokens_per_input",
            "start",
            violations,
        )
        return rows[0] if rows else None

    # ContrastFeatures

    async def ContrastFeatures(self, request: pb.ContrastFeaturesRequest, call: Call) -> pb.ContrastFeaturesResponse:
        limits, violations = self._limits, Violations()
        check_dictionary_names(request.dictionaries, limits, violations)
        if request.aggregation not in _AGGREGATIONS:
            violations.add("aggregation", "must be AGGREGATION_MAX or AGGREGATION_MEAN")
        rate = request.false_discovery_rate
        if not (math.isfinite(rate) and 0 <= rate <= 1):
            violations.add("false_discovery_rate", f"is {rate}, expected a number in 0..1")
        for field in ("count", "suggest"):
            most = limits.max_selected_features if field == "count" else limits.max_edits
            name = "max_selected_features" if field == "count" else "max_edits"
            if getattr(request, field) > most:
                violations.add(field, f"is {getattr(request, field)}, more than {name} = {most}")
        if request.validate and not request.suggest:
            violations.add("validate", "needs suggest, which is 0")
        sets: list[list[TokenRow]] = []
        for name, inputs in (("a", request.a), ("b", request.b)):
            if len(inputs) == 1:
                violations.add(name, "has one text; at least two are needed")
            sets.append(await self._read_texts(inputs, name, request.overflow, violations, least=1, of_contrast=True))
        a, b = sets
        total = sum(len(row.ids) for row in a + b)
        if total > limits.max_contrast_tokens:
            most_tokens = f"max_contrast_tokens = {limits.max_contrast_tokens}"
            violations.add("a", f"and b have {total} tokens together, more than {most_tokens}")
        if request.validate and not violations:
            for name, rows in (("a", a), ("b", b)):
                if all(len(row.ids) < 2 for row in rows):
                    violations.add(name, "has no text of two tokens, which scoring needs")
        violations.raise_if_any()
        self._require(request.dictionaries, "dictionaries")
        work = ContrastWork(
            a=tuple(row.ids for row in a),
            b=tuple(row.ids for row in b),
            dictionaries=tuple(request.dictionaries),
            aggregation=_AGGREGATIONS[request.aggregation],
            suggest=request.suggest,
            validate=request.validate,
        )
        submitted = time.perf_counter()
        try:
            result = await self._engine.contrast(work)
        except NonFiniteActivations as error:
            raise _out_of_range("a", error) from error
        listed = [each for each in result.features if not rate or each.q_value <= rate]
        return pb.ContrastFeaturesResponse(
            request_id=call.request_id,
            features=[replies.contrast(each) for each in listed[: request.count or DEFAULT_COUNT]],
            n_tested=len(result.features),
            n_found=sum(each.q_value <= 0.05 for each in result.features),
            suggestion=[edit_message(edit) for edit in result.suggestion],
            trials=[replies.trial(each) for each in result.trials],
            truncated_tokens=[row.truncated for row in a + b],
            timing=call.timing(result.timing, submitted),
        )

    # What they share

    async def _read_texts(
        self,
        inputs: Sequence[common_pb2.TextInput],
        field: str,
        overflow: int,
        violations: Violations,
        *,
        least: int = 2,
        of_contrast: bool = False,
    ) -> list[TokenRow]:
        """Rows of at least `least` tokens; can be used if there were no violations."""
        limits = self._limits
        most, name = limits.max_inputs, "max_inputs"
        if of_contrast:
            most, name = limits.max_contrast_texts, "max_contrast_texts"
        if not violations.check_count(field, len(inputs), most, name):
            return []
        rows = await self._reader.read(
            inputs,
            [f"{field}[{place}]" for place in range(len(inputs))],
            overflow,
            limits.max_tokens_per_input,
            "max_tokens_per_input",
            "end",
            violations,
        )
        if len(rows) == len(inputs):
            for place, row in enumerate(rows):
                if len(row.ids) < least:
                    violations.add(f"{field}[{place}]", f"has {len(row.ids)} token, expected at least {least}")
        tokens = sum(len(row.ids) for row in rows)
        if not of_contrast and tokens > limits.max_tokens_per_request:
            most_tokens = f"max_tokens_per_request = {limits.max_tokens_per_request}"
            violations.add(field, f"have {tokens} tokens together, more than {most_tokens}")
        return rows

    def _read_tokens(self, messages: Sequence[pb.TokenChoice], field: str, violations: Violations) -> tuple[int, ...]:
        most = self._limits.max_logit_tokens
        if len(messages) > most:
            violations.add(field, f"has {len(messages)} entries, more than max_logit_tokens = {most}")
            return ()
        tokens = [self._read_token(message, f"{field}[{place}]", violations) for place, message in enumerate(messages)]
        repeated = first_repeated(tokens)
        if repeated is not None and not violations:
            violations.add(f"{field}[{repeated}]", f"token {tokens[repeated]} is named twice")
        return tuple(tokens)

    def _read_token(self, message: pb.TokenChoice, field: str, violations: Violations) -> int:
        """The token's id; can be used if there were no violations."""
        kind = message.WhichOneof("token")
        if kind == "id":
            vocabulary = self._served.backbone.vocab_size
            if message.id >= vocabulary:
                violations.add(f"{field}.id", f"token id {message.id} is outside the vocabulary of {vocabulary}")
            return message.id
        if kind is None:
            violations.add(field, "is empty; set id or text")
        elif not self._reader.has_tokenizer:
            violations.add(f"{field}.text", "the backbone has no tokenizer; set id")
        elif len(message.text.encode()) > self._limits.max_stop_bytes:
            violations.add(f"{field}.text", f"has more bytes than max_stop_bytes = {self._limits.max_stop_bytes}")
        else:
            ids = self._served.backbone.encode_text(message.text).ids
            if len(ids) == 1:
                return ids[0]
            violations.add(f"{field}.text", f"{shown(message.text)} is {len(ids)} tokens, expected exactly one")
        return 0

    def _check_include_tokens(self, asked: bool, violations: Violations) -> None:
        if asked and not self._reader.has_tokenizer:
            violations.add("include_tokens", "the backbone has no tokenizer")

    def _require(self, names: Sequence[str], field: str) -> None:
        """RpcError NOT_FOUND for dictionaries that are not loaded, FAILED_PRECONDITION for transcoders."""
        self._served.require(names)
        transcoders = [name for name in names if self._served.dictionaries[name].transcoder]
        if transcoders:
            said = "is a transcoder: it decodes to another site than it reads, so that features cannot be taken away"
            raise failed_precondition(
                [Violation(field, f"dictionary {shown(name)} {said}") for name in transcoders], IS_TRANSCODER
            )

    def _require_features(self, features: Sequence[FeatureId]) -> None:
        """RpcError NOT_FOUND for features that their dictionary does not have."""
        dictionaries = self._served.dictionaries
        unknown = [each for each in features if each.feature >= dictionaries[each.dictionary].n_latents]
        if unknown:
            raise features_not_found(
                [(each.dictionary, each.feature, dictionaries[each.dictionary].n_latents) for each in unknown]
            )

    def _require_statistics(self, names: Sequence[str]) -> None:
        lacking = [name for name in dict.fromkeys(names) if self._served.dictionaries[name].statistics is None]
        if lacking:
            raise failed_precondition(
                [
                    Violation("ablations", f"ABLATION_MEAN needs statistics, which dictionary {shown(name)} lacks")
                    for name in lacking
                ],
                LACKS_STATISTICS,
            )


def _out_of_range(field: str, error: NonFiniteActivations) -> Exception:
    return invalid_argument([Violation(field, str(error))])
