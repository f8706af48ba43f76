"""Malformed requests of ExtractFeatures, EncodeActivations and DecodeFeatures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from service.arrays import pack_tensor
from service.pb.saeserve.v1 import catalog_service_pb2 as catalog_pb
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from tests.service.rpc.malformed.common import (
    INF,
    INVALID,
    MAX_UINT32,
    NAN,
    Defects,
    Facts,
    Service,
    Spoil,
    dictionary_defects,
    inputs_defects,
    names_defects,
    set_fields,
)


def services(facts: Facts) -> Iterator[Service]:
    yield "ExtractFeatures", lambda rng, d: _extract(facts, rng, d), _extract_defects(facts)
    yield "EncodeActivations", lambda rng, d: _encode(rng, d), _encode_defects(facts)
    yield "DecodeFeatures", lambda rng, d: _decode(d), _decode_defects(facts)


def _extract(facts: Facts, rng: random.Random, dictionary: catalog_pb.Dictionary) -> feature_pb.ExtractFeaturesRequest:
    ids = [rng.randrange(facts.vocab_size) for _ in range(rng.randint(1, 8))]
    return feature_pb.ExtractFeaturesRequest(
        inputs=[
            common_pb2.TextInput(text="A short text."),
            common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=ids)),
        ],
        dictionaries=[dictionary.name],
        aggregation=rng.randint(0, 5),
        include_tokens=rng.random() < 0.5,
        include_reconstruction_error=rng.random() < 0.5,
        overflow=rng.choice((common_pb2.OVERFLOW_UNSPECIFIED, common_pb2.OVERFLOW_ERROR)),
    )


def _encode(rng: random.Random, dictionary: catalog_pb.Dictionary) -> feature_pb.EncodeActivationsRequest:
    x = np.random.default_rng(rng.randrange(1000)).standard_normal((3, dictionary.d_in))
    return feature_pb.EncodeActivationsRequest(dictionary=dictionary.name, activations=pack_tensor(x))


def _decode(dictionary: catalog_pb.Dictionary) -> feature_pb.DecodeFeaturesRequest:
    request = feature_pb.DecodeFeaturesRequest(
        dictionary=dictionary.name,
        features=common_pb2.SparseRows(row_splits=[0, 2, 3], indices=[1, 0, 2], values=[0.5, 2, 1]),
    )
    if dictionary.normalizes_input:
        request.input_statistics.CopyFrom(common_pb2.InputStatistics(mean=[0, 1], std=[1, 2]))
    return request


def _selection_defects(facts: Facts) -> Defects:
    most = facts.limits.max_selected_features
    too_large = max(d.n_latents for d in facts.dictionaries)
    return {
        "selection without a rule": (INVALID, lambda r: r.selection.SetInParent()),
        "top_k 0": (INVALID, lambda r: set_fields(r.selection, top_k=0)),
        "top_k over the limit": (INVALID, lambda r: set_fields(r.selection, top_k=most + 1)),
        "top_k huge": (INVALID, lambda r: set_fields(r.selection, top_k=MAX_UINT32)),
        "no features": (INVALID, lambda r: r.selection.features.SetInParent()),
        "feature twice": (INVALID, lambda r: r.selection.features.ids.extend([1, 2, 1])),
        "feature outside": (INVALID, lambda r: r.selection.features.ids.extend([0, too_large])),
        "feature far outside": (INVALID, lambda r: r.selection.features.ids.append(MAX_UINT32)),
        "too many features": (INVALID, lambda r: r.selection.features.ids.extend(range(most + 1))),
        "threshold NaN": (INVALID, lambda r: set_fields(r.selection, threshold=NAN)),
        "threshold infinite": (INVALID, lambda r: set_fields(r.selection, threshold=INF)),
        "threshold negative": (INVALID, lambda r: set_fields(r.selection, threshold=-0.5)),
    }


def _extract_defects(facts: Facts) -> Defects:
    return (
        inputs_defects(facts)
        | names_defects(facts)
        | _selection_defects(facts)
        | {
            "aggregation unknown": (INVALID, lambda r: set_fields(r, aggregation=77)),
            "aggregation negative": (INVALID, lambda r: set_fields(r, aggregation=-3)),
        }
    )


def _encode_defects(facts: Facts) -> Defects:
    limits = facts.limits

    def shape(*lengths: int) -> Spoil:
        return lambda r: set_fields(r.activations, data=b"") or r.activations.shape.__setitem__(slice(None), lengths)

    def value(x: float) -> Spoil:
        def spoil(request: Any) -> None:
            array = np.frombuffer(request.activations.data, "<f4").copy()
            array[-1] = x
            request.activations.data = array.tobytes()

        return spoil

    def too_many_rows(request: Any) -> None:
        width = request.activations.shape[1]
        request.activations.CopyFrom(pack_tensor(np.ones((limits.max_activation_rows + 1, width))))

    defects: Defects = {
        "no activations": (INVALID, lambda r: r.ClearField("activations")),
        "shape of no axes": (INVALID, shape()),
        "shape of one axis": (INVALID, shape(4)),
        "shape of three axes": (INVALID, shape(1, 1, 4)),
        "no rows": (INVALID, lambda r: shape(0, r.activations.shape[1])(r)),
        "shape that overflows": (INVALID, shape(MAX_UINT32, MAX_UINT32)),
        "rows that overflow": (INVALID, lambda r: shape(MAX_UINT32, r.activations.shape[1])(r)),
        "wrong width": (INVALID, lambda r: r.activations.shape.__setitem__(1, r.activations.shape[1] + 1)),
        "data too short": (INVALID, lambda r: set_fields(r.activations, data=r.activations.data[:-1])),
        "data too long": (INVALID, lambda r: set_fields(r.activations, data=r.activations.data + b"\0" * 4)),
        "data of another dtype": (INVALID, lambda r: set_fields(r.activations, dtype=common_pb2.DATA_TYPE_FLOAT16)),
        "dtype unknown": (INVALID, lambda r: set_fields(r.activations, dtype=42)),
        "NaN": (INVALID, value(NAN)),
        "infinity": (INVALID, value(-INF)),
        "squares overflow": (INVALID, value(3e38)),
        "too many rows": (INVALID, too_many_rows),
    }
    return defects | dictionary_defects() | _selection_defects(facts)


def _decode_defects(facts: Facts) -> Defects:
    def splits(*values: int) -> Spoil:
        return lambda r: r.features.row_splits.__setitem__(slice(None), values)

    def statistics(mean: list[float], std: list[float]) -> Spoil:
        return lambda r: r.input_statistics.CopyFrom(common_pb2.InputStatistics(mean=mean, std=std))

    too_large = max(d.n_latents for d in facts.dictionaries)
    rows = facts.limits.max_activation_rows
    return dictionary_defects() | {
        "no features": (INVALID, lambda r: r.ClearField("features")),
        "no row splits": (INVALID, splits()),
        "no rows": (INVALID, splits(0)),
        "splits do not start with 0": (INVALID, splits(1, 2, 3)),
        "splits fall": (INVALID, splits(0, 3, 2)),
        "splits beyond the entries": (INVALID, splits(0, 2, 4)),
        "splits far beyond": (INVALID, splits(0, MAX_UINT32, 3)),
        "splits end early": (INVALID, splits(0, 2, 2)),
        "too many rows": (INVALID, splits(*([0] * (rows + 1)), 3)),
        "index outside": (INVALID, lambda r: r.features.indices.__setitem__(1, too_large)),
        "index far outside": (INVALID, lambda r: r.features.indices.__setitem__(1, MAX_UINT32)),
        "index twice": (INVALID, lambda r: r.features.indices.__setitem__(1, r.features.indices[0])),
        "more indices than values": (INVALID, lambda r: r.features.indices.append(0)),
        "more values than indices": (INVALID, lambda r: r.features.values.append(0)),
        "value NaN": (INVALID, lambda r: r.features.values.__setitem__(0, NAN)),
        "value infinite": (INVALID, lambda r: r.features.values.__setitem__(0, INF)),
        # Of a dictionary that does not normalise, any statistics are wrong.
        "statistics of other rows": (INVALID, statistics([0], [1])),
        "mean without std": (INVALID, statistics([0, 0], [])),
        "mean NaN": (INVALID, statistics([0, NAN], [1, 1])),
        "std negative": (INVALID, statistics([0, 0], [1, -1])),
        "std infinite": (INVALID, statistics([0, 0], [1, INF])),
    }
