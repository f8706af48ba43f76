"""Reads the API's replies into the classes that calls return. Generations have generation.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import UTC
from typing import Any, TypeVar, cast

import numpy as np

from sae_runtime.causal.report import (
    DistanceEffect,
    EffectFigures,
    FeatureAttribution,
    FeatureContrast,
    FeatureEffect,
    FeatureId,
    SetScore,
    SuggestionTrial,
    TokenScores,
)
from service.arrays import unpack_input_statistics, unpack_reconstruction_error, unpack_sparse_rows, unpack_tensor
from service.client import catalog, measurements, results
from service.edits.messages import read_edit
from service.pb.saeserve.v1 import (
    catalog_service_pb2,
    catalogue_pb2,
    causal_pb2,
    common_pb2,
    edits_pb2,
    feature_service_pb2,
    server_service_pb2,
)

Result = TypeVar("Result")


# Features


def read_extraction(reply: feature_service_pb2.ExtractFeaturesResponse) -> results.Extraction:
    return results.Extraction(
        inputs=tuple(_read_input(message) for message in reply.results),
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
        labels=read_labels(reply.labels),
    )


def _read_input(message: feature_service_pb2.InputFeatures) -> results.InputFeatures:
    return results.InputFeatures(
        dictionaries={entry.dictionary: _read_dictionary_features(entry) for entry in message.dictionaries},
        n_tokens=message.n_tokens,
        truncated_tokens=message.truncated_tokens,
        tokens=_read_tokens(message),
    )


def _read_dictionary_features(message: feature_service_pb2.DictionaryFeatures) -> results.DictionaryFeatures:
    return results.DictionaryFeatures(
        dictionary=message.dictionary,
        features=read_sparse_rows(message.features),
        reconstruction_error=unpack_reconstruction_error(message) if message.reconstruction_error else None,
        fingerprint=message.fingerprint,
    )


def read_activations(reply: feature_service_pb2.GetActivationsResponse) -> results.Activations:
    return results.Activations(
        inputs=tuple(
            results.InputActivations(
                sites={entry.site: unpack_tensor(entry.activations) for entry in message.sites},
                n_tokens=message.n_tokens,
                truncated_tokens=message.truncated_tokens,
                tokens=_read_tokens(message),
            )
            for message in reply.results
        ),
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def read_encoding(reply: feature_service_pb2.EncodeActivationsResponse) -> results.Encoding:
    statistics = reply.input_statistics
    return results.Encoding(
        features=read_sparse_rows(reply.features),
        input_statistics=results.InputStatistics(*unpack_input_statistics(statistics)) if statistics.mean else None,
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
        fingerprint=reply.fingerprint,
    )


def read_decoding(reply: feature_service_pb2.DecodeFeaturesResponse) -> results.Decoding:
    return results.Decoding(
        activations=unpack_tensor(reply.activations), request_id=reply.request_id, timing=read_timing(reply.timing)
    )


# Measurements


def read_scores(reply: causal_pb2.ScoreResponse) -> measurements.Scores:
    m = len(reply.logit_token_ids)
    return measurements.Scores(
        inputs=tuple(_read_input_score(message, m) for message in reply.results),
        logit_token_ids=tuple(reply.logit_token_ids),
        request_id=reply.request_id,
        timing=read_timing(reply.timing),
    )


def _read_input_score(message: causal_pb2.InputScore, m: int) -> measurements.InputScore:
    """`m` is the number of logit tokens."""
    edited = message.HasField("edited")
    return measurements.InputScore(
        unedited=_read_token_scores(message.unedited, message.n_tokens, m),
        edited=_read_token_scores(message.edited, message.n_tokens, m) if edited else None,
        kl=np.array(message.kl, np.float32) if edited else None,
        n_tokens=message.n_tokens,
        truncated_tokens=message.truncated_tokens,
        tokens=_read_tokens(message),
    )


def _read_token_scores(message: causal_pb2.TokenScores, n: int, m: int) -> TokenScores:
    return TokenScores(
        loss=np.array(message.loss, np.float32),
        correct=np.array(message.correct, np.bool_),
        target_logits=np.array(message.target_logits, np.float32),
        token_logits=np.array(message.token_logits, np.float32).reshape(n, m),
        mean_loss=message.mean_loss,
        accuracy=message.accuracy,
    )


def read_ablation(reply: causal_pb2.AblateFeaturesResponse) -> measurements.AblationStudy:
    return _same_fields(
        measurements.AblationStudy,
        reply,
        effects=tuple(_read_effect(message) for message in reply.effects),
        logit_token_ids=tuple(reply.logit_token_ids),
        truncated_tokens=tuple(reply.truncated_tokens),
        timing=read_timing(reply.timing),
        labels=read_labels(reply.labels),
        fingerprints=_read_fingerprints(reply.labels),
    )


def _read_effect(message: causal_pb2.FeatureEffect) -> FeatureEffect:
    return _same_fields(
        FeatureEffect,
        message,
        feature=_read_feature(message.feature),
        ablation="mean" if message.ablation == edits_pb2.ABLATION_MEAN else "zero",
        everywhere=_read_figures(message.everywhere),
        at_active=_read_figures(message.at_active),
        delta_loss_interval=(message.delta_loss_low, message.delta_loss_high),
        text_delta_loss=tuple(message.text_delta_loss),
        text_kl=tuple(message.text_kl),
        by_distance=tuple(
            DistanceEffect(effect.first, effect.last, _read_figures(effect.figures)) for effect in message.by_distance
        ),
    )


def _read_figures(message: causal_pb2.EffectFigures) -> EffectFigures:
    return _same_fields(EffectFigures, message, delta_logits=tuple(message.delta_logits))


def read_attributions(reply: causal_pb2.AttributeFeaturesResponse) -> measurements.Attributions:
    return _same_fields(
        measurements.Attributions,
        reply,
        attributions=tuple(
            _same_fields(FeatureAttribution, message, feature=_read_feature(message.feature))
            for message in reply.attributions
        ),
        totals=dict(reply.totals),
        pearson=reply.pearson if reply.HasField("pearson") else None,
        spearman=reply.spearman if reply.HasField("spearman") else None,
        foil_id=reply.foil_id if reply.HasField("foil_id") else None,
        tokens=_read_tokens(reply),
        timing=read_timing(reply.timing),
        labels=read_labels(reply.labels),
        fingerprints=_read_fingerprints(reply.labels),
    )


def read_contrast(reply: causal_pb2.ContrastFeaturesResponse) -> measurements.Contrast:
    return _same_fields(
        measurements.Contrast,
        reply,
        features=tuple(
            _same_fields(FeatureContrast, message, feature=_read_feature(message.feature)) for message in reply.features
        ),
        suggestion=tuple(read_edit(edit) for edit in reply.suggestion),
        trials=tuple(
            SuggestionTrial(
                tuple(read_edit(edit) for edit in trial.edits), _read_set(trial.a), _read_set(trial.b), trial.shift
            )
            for trial in reply.trials
        ),
        truncated_tokens=tuple(reply.truncated_tokens),
        timing=read_timing(reply.timing),
        labels=read_labels(reply.labels),
        fingerprints=_read_fingerprints(reply.labels),
    )


def _read_set(message: causal_pb2.SetScore) -> SetScore:
    return SetScore(message.delta_loss, (message.delta_loss_low, message.delta_loss_high), message.kl)


def _read_feature(message: causal_pb2.FeatureKey) -> FeatureId:
    return FeatureId(message.dictionary, message.feature)


# Catalogue and server


def read_dictionaries(reply: catalog_service_pb2.ListDictionariesResponse) -> tuple[catalog.DictionaryInfo, ...]:
    return tuple(_read_dictionary(message) for message in reply.dictionaries)


def read_dictionary_details(reply: catalog_service_pb2.GetDictionaryResponse) -> catalog.DictionaryDetails:
    return catalog.DictionaryDetails(
        dictionary=_read_dictionary(reply.dictionary),
        provenance=_read_provenance(reply.provenance) if reply.HasField("provenance") else None,
        evaluation=dict(reply.evaluation),
        catalogue=_read_catalogue(reply.catalogue) if reply.HasField("catalogue") else None,
        hidden_labels=reply.hidden_labels,
    )


def _read_catalogue(message: catalogue_pb2.CatalogueInfo) -> catalog.CatalogueSummary:
    return _same_fields(
        catalog.CatalogueSummary, message, sources=tuple(message.sources), figures=dict(message.figures)
    )


def _read_dictionary(message: catalog_service_pb2.Dictionary) -> catalog.DictionaryInfo:
    return _same_fields(
        catalog.DictionaryInfo, message, k=message.k or None, context_length=message.context_length or None
    )


def _read_provenance(message: catalog_service_pb2.Provenance) -> catalog.Provenance:
    return _same_fields(
        catalog.Provenance,
        message,
        created=message.created.ToDatetime(UTC) if message.HasField("created") else None,
        config=json.loads(message.config_json or "{}"),
    )


def read_server_info(reply: server_service_pb2.GetServerInfoResponse) -> catalog.ServerInfo:
    return _same_fields(
        catalog.ServerInfo,
        reply,
        library_versions=dict(reply.library_versions),
        backbone=_same_fields(catalog.BackboneInfo, reply.backbone, sites=tuple(reply.backbone.sites)),
        dictionaries=tuple(reply.dictionaries),
        limits=_same_fields(catalog.Limits, reply.limits),
        edit_presets=tuple(
            catalog.EditPreset(preset.name, preset.description, tuple(read_edit(edit) for edit in preset.edits))
            for preset in reply.edit_presets
        ),
        notes=tuple(reply.notes),
    )


# What replies share


def read_labels(messages: Iterable[common_pb2.DictionaryLabels]) -> results.Labels:
    return {message.dictionary: dict(message.labels) for message in messages}


def _read_fingerprints(messages: Iterable[common_pb2.DictionaryLabels]) -> dict[str, str]:
    return {message.dictionary: message.fingerprint for message in messages}


def read_timing(message: common_pb2.Timing) -> results.Timing:
    return _same_fields(results.Timing, message)


def read_sparse_rows(message: common_pb2.SparseRows) -> results.SparseRows:
    return results.SparseRows(*unpack_sparse_rows(message))


def _read_tokens(
    message: feature_service_pb2.InputFeatures
    | feature_service_pb2.InputActivations
    | causal_pb2.InputScore
    | causal_pb2.AttributeFeaturesResponse,
) -> results.Tokens | None:
    def offsets(values: Sequence[int]) -> results.UintArray:
        return np.array(values, np.uint32)

    if not message.HasField("tokens"):
        return None
    tokens = message.tokens
    return results.Tokens(
        ids=offsets(tokens.ids),
        pieces=tuple(tokens.pieces),
        byte_starts=offsets(tokens.byte_starts),
        byte_ends=offsets(tokens.byte_ends),
        char_starts=offsets(tokens.char_starts),
        char_ends=offsets(tokens.char_ends),
    )


def _same_fields(kind: type[Result], message: Any, **converted: Any) -> Result:
    """A dataclass with the message's fields, but for the `converted` ones."""
    names = [field.name for field in fields(cast(Any, kind)) if field.name not in converted]
    return kind(**{name: getattr(message, name) for name in names}, **converted)
