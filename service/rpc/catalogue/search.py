"""SearchFeatures: features by words, or by texts that they fire on and texts that they do not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from sae_runtime.catalogue.records import FeatureSummary
from sae_runtime.dictionary.ranking import ranking_table
from service.engine.work import DictionaryRows, ExtractWork
from service.feature_messages import summary_message
from service.pb.saeserve.v1 import catalogue_pb2 as pb
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.errors import failed_precondition, out_of_range
from service.rpc.model import LACKS_CATALOGUE, ModelRpc, lacks_catalogue
from service.rpc.text_inputs import TokenRow

DEFAULT_LIMIT = 20
MAX_LIMIT = 1_000


class SearchRpc(ModelRpc):
    """The handler of SearchFeatures."""

    async def SearchFeatures(self, request: pb.SearchFeaturesRequest, call: Call) -> pb.SearchFeaturesResponse:
        fires, silent = await self._read(request)
        names = list(request.dictionaries) or list(self.model.dictionaries)
        limit = min(request.limit or DEFAULT_LIMIT, MAX_LIMIT)
        reply = pb.SearchFeaturesResponse(request_id=call.request_id)
        if fires:
            call.submit()
            hits = await self._by_texts(names, fires, silent, limit)
        else:
            reply.without_catalogue.extend(name for name in names if self.model.annotations[name].catalogue is None)
            hits = await asyncio.to_thread(self._by_words, names, request.query, limit)
            if not hits and len(reply.without_catalogue) == len(names) > 0:
                raise failed_precondition(
                    [lacks_catalogue(name, self.model.annotations[name].problem) for name in names], LACKS_CATALOGUE
                )
        hits.sort(key=lambda hit: (-hit.score, hit.dictionary, hit.summary.feature))
        reply.hits.extend(hits[:limit])
        return reply

    async def _read(self, request: pb.SearchFeaturesRequest) -> tuple[list[TokenRow], list[TokenRow]]:
        """The rows of fires_on and silent_on; none if words are searched for."""
        violations = Violations(self.limits)
        violations.check_limit("query", len(request.query.encode()), "max_text_bytes", "has {} bytes")
        if request.dictionaries:
            violations.check_dictionary_names(request.dictionaries)
        fires: list[TokenRow] = []
        silent: list[TokenRow] = []
        if not request.query and not request.fires_on:
            violations.add("query", "is empty; give words, or texts in fires_on")
        if request.query and (request.fires_on or request.silent_on):
            violations.add("query", "excludes fires_on and silent_on; set one of the two")
        elif violations.check_at_most("fires_on", len(request.fires_on) + len(request.silent_on), "max_inputs"):
            fires = await self.reader.read_list(request.fires_on, "fires_on", request.overflow, violations)
            silent = await self.reader.read_list(request.silent_on, "silent_on", request.overflow, violations)
            tokens = sum(len(row.ids) for row in fires + silent)
            violations.check_limit(
                "fires_on", tokens, "max_tokens_per_request", "and silent_on have {} tokens together"
            )
        violations.raise_if_any()
        self.model.require(request.dictionaries)
        return fires, silent

    def _by_words(self, names: Sequence[str], query: str, limit: int) -> list[pb.FeatureHit]:
        return [
            self._hit(name, hit.summary, hit.score)
            for name in names
            for hit in self.model.annotations[name].search(query, limit)
        ]

    async def _by_texts(
        self, names: Sequence[str], fires: list[TokenRow], silent: list[TokenRow], limit: int
    ) -> list[pb.FeatureHit]:
        work = ExtractWork(rows=tuple(row.ids for row in fires + silent), dictionaries=tuple(names), aggregation="max")
        with out_of_range("fires_on"):
            result = await self.engine.extract(work)
        hits: list[pb.FeatureHit] = []
        for place, name in enumerate(names):
            rows = [dictionaries[place] for dictionaries in result.inputs]
            features, activations = _firing(rows[: len(fires)], rows[len(fires) :])
            statistics = self.model.dictionaries[name].statistics
            scores = activations
            if statistics is not None:
                scores = ranking_table(statistics, "surprise").scores(features, activations)
            best = np.argsort(-scores, kind="stable")[:limit]
            summaries = await asyncio.to_thread(self.model.annotations[name].summaries_of, features[best].tolist())
            hits += [
                self._hit(name, summary, float(scores[i]), float(activations[i]))
                for summary, i in zip(summaries, best, strict=True)
            ]
        return hits

    def _hit(self, name: str, summary: FeatureSummary, score: float, activation: float = 0.0) -> pb.FeatureHit:
        return pb.FeatureHit(
            dictionary=name,
            fingerprint=self.model.dictionaries[name].fingerprint,
            summary=summary_message(summary),
            score=score,
            activation=activation,
        )


def _firing(fires: Sequence[DictionaryRows], silent: Sequence[DictionaryRows]) -> tuple[np.ndarray, np.ndarray]:
    """Features that fire on every text of `fires` and on none of `silent`: int64 [m]; their mean over texts [m].

    Every text is one row: the largest activation over its tokens.
    """
    features = np.concatenate([row.features.indices for row in fires]).astype(np.int64)
    values = np.concatenate([row.features.values for row in fires])
    found, where = np.unique(features, return_inverse=True)
    everywhere = np.bincount(where, minlength=len(found)) == len(fires)
    elsewhere = np.concatenate([np.zeros(0, np.uint32), *(row.features.indices for row in silent)])
    kept = everywhere & ~np.isin(found, elsewhere)
    means = np.bincount(where, values, minlength=len(found)) / len(fires)
    return found[kept], means[kept].astype(np.float32)
