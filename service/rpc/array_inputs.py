"""Selections, activations and sparse features of requests, as the engine takes them.

What is returned can be used if there were no violations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.ranking import Ranking
from service.arrays import unpack_input_statistics, unpack_sparse_rows, unpack_tensor
from service.engine.work import Csr, Selection
from service.pb.saeserve.v1 import common_pb2, feature_service_pb2
from service.rpc.checks import Violations
from service.rpc.limits import Limits

if TYPE_CHECKING:
    from sae_runtime import Dictionary

_RANKINGS: dict[int, Ranking] = {
    common_pb2.FEATURE_RANKING_UNSPECIFIED: "activation",
    common_pb2.FEATURE_RANKING_ACTIVATION: "activation",
    common_pb2.FEATURE_RANKING_SURPRISE: "surprise",
    common_pb2.FEATURE_RANKING_Z_SCORE: "z_score",
}


def read_selection(
    message: feature_service_pb2.FeatureSelection | None,
    dictionaries: Mapping[str, Dictionary],
    limits: Limits,
    violations: Violations,
) -> Selection:
    """The selection; feature numbers must exist in each of the dictionaries. They may lack statistics to rank by."""
    if message is None:
        return Selection()
    rank_by = read_ranking(message.rank_by, "selection.rank_by", violations)
    return replace(_read_rule(message, dictionaries, limits, violations), rank_by=rank_by)


def read_ranking(value: int, field: str, violations: Violations) -> Ranking:
    """An order of features."""
    violations.check_enum(field, value, _RANKINGS)
    return _RANKINGS.get(value, "activation")


def _read_rule(
    message: feature_service_pb2.FeatureSelection,
    dictionaries: Mapping[str, Dictionary],
    limits: Limits,
    violations: Violations,
) -> Selection:
    match message.WhichOneof("selection"):
        case "top_k":
            if not 1 <= message.top_k <= limits.max_selected_features:
                bounds = f"1 to max_selected_features = {limits.max_selected_features}"
                violations.add("selection.top_k", f"is {message.top_k}, expected {bounds}")
            return Selection("top_k", k=message.top_k)
        case "threshold":
            violations.check_threshold("selection.threshold", message.threshold)
            return Selection("threshold", threshold=message.threshold)
        case "features":
            return _read_features(tuple(message.features.ids), dictionaries, violations)
        case _:
            if not message.rank_by:
                rules = "set top_k, features, threshold or rank_by, or leave the selection unset"
                violations.add("selection", f"has no rule; {rules}")
            return Selection()


def _read_features(
    features: tuple[int, ...], dictionaries: Mapping[str, Dictionary], violations: Violations
) -> Selection:
    field = "selection.features.ids"
    if not violations.check_count(field, len(features), "max_selected_features"):
        return Selection()
    violations.check_distinct(field, features, lambda feature: f"feature {feature}")
    for dictionary in dictionaries.values():
        outside = next((place for place, feature in enumerate(features) if feature >= dictionary.n_latents), None)
        if outside is not None:
            violations.check_feature(features[outside], dictionary, f"{field}[{outside}]")
    return Selection("features", features=features)


def read_activations(
    tensor: common_pb2.Tensor, dictionary: Dictionary | None, violations: Violations
) -> NDArray[np.float32]:
    """float32 [n, d_in], finite."""
    shape = list(tensor.shape[:8])
    if len(tensor.shape) != 2:
        violations.add("activations.shape", f"is {shape}, expected two axes [n, d_in]")
    elif shape[0] == 0:
        violations.add("activations.shape", "has no rows; at least one is needed")
    elif (
        violations.check_limit("activations.shape", shape[0], "max_activation_rows", "has {} rows")
        and dictionary is not None
        and shape[1] != dictionary.d_in
    ):
        violations.add("activations.shape", f"has rows of {shape[1]} values, the dictionary reads {dictionary.d_in}")
    violations.check_enum("activations.dtype", tensor.dtype, common_pb2.DataType.values())
    if not violations:
        try:
            x = unpack_tensor(tensor)
        except ValueError as error:
            violations.add("activations.data", str(error))
        else:
            finite = np.isfinite(x).all(axis=1)
            if finite.all():
                return x
            first = int(np.argmin(finite))
            violations.add("activations.data", f"row {first} holds values that are not finite")
    return np.zeros((1, 1), np.float32)


def read_sparse_rows(
    message: common_pb2.SparseRows, dictionary: Dictionary | None, limits: Limits, violations: Violations
) -> Csr:
    """A well-formed CSR matrix of at least one row; entries of a row in any order, without repeats, finite."""
    empty = Csr(np.zeros(1, np.uint32), np.zeros(0, np.uint32), np.zeros(0, np.float32))
    n_rows, entries = len(message.row_splits) - 1, len(message.indices)
    if n_rows < 1:
        violations.add("features.row_splits", "needs n + 1 entries for n rows, at least one row")
    else:
        violations.check_limit("features.row_splits", n_rows, "max_activation_rows", "is of {} rows")
    most = limits.max_activation_rows * limits.max_selected_features
    if entries > most:
        violations.add(
            "features.indices", f"has {entries} entries, more than max_activation_rows x max_selected_features = {most}"
        )
    if len(message.values) != entries:
        violations.add("features.values", f"has {len(message.values)} entries, indices has {entries}")
    if violations:
        return empty
    rows = Csr(*unpack_sparse_rows(message))
    _check_splits(rows, violations)
    if dictionary is not None and entries and (outside := rows.indices >= dictionary.n_latents).any():
        at = int(np.argmax(outside))
        violations.check_feature(int(rows.indices[at]), dictionary, f"features.indices[{at}]")
    _check_finite(rows.values, "features.values", violations)
    if violations:
        return empty
    _check_repeats(rows, violations)
    return rows


def _check_splits(rows: Csr, violations: Violations) -> None:
    splits, entries = rows.row_splits.astype(np.int64), len(rows.indices)
    if splits[0] != 0:
        violations.add("features.row_splits", f"starts with {splits[0]}, expected 0")
    if (falls := splits[1:] < splits[:-1]).any():
        at = int(np.argmax(falls)) + 1
        violations.add(f"features.row_splits[{at}]", f"is {splits[at]}, less than the entry before it")
    if splits[-1] != entries:
        violations.add("features.row_splits", f"ends with {splits[-1]}, expected the {entries} entries there are")


def _check_repeats(rows: Csr, violations: Violations) -> None:
    # One number for each (row, feature) pair: a repeated pair is a repeated number.
    splits = rows.row_splits.astype(np.int64)
    lengths: NDArray[np.int64] = splits[1:] - splits[:-1]
    pairs = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths) << 32 | rows.indices
    order = np.argsort(pairs, kind="stable")
    repeats = np.flatnonzero(np.diff(pairs[order]) == 0)
    if len(repeats):
        at = int(order[repeats[0] + 1])
        violations.add(f"features.indices[{at}]", f"feature {rows.indices[at]} occurs twice in row {pairs[at] >> 32}")


def _check_finite(values: NDArray[np.float32], field: str, violations: Violations) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        at = int(np.argmin(finite))
        violations.add(f"{field}[{at}]", f"is {values[at]}, expected a finite number")


def read_input_statistics(
    message: common_pb2.InputStatistics | None, n_rows: int, dictionary: Dictionary | None, violations: Violations
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Mean and standard deviation of n_rows rows, or None twice; an empty message is none."""
    if message is None or not (len(message.mean) or len(message.std)):
        return None, None
    if dictionary is not None and not dictionary.normalizes_input:
        violations.add("input_statistics", "must be empty: the dictionary does not normalise its input")
        return None, None
    mean, std = unpack_input_statistics(message)
    for name, values in (("mean", mean), ("std", std)):
        field = f"input_statistics.{name}"
        if len(values) != n_rows:
            violations.add(field, f"has {len(values)} entries for {n_rows} rows")
        else:
            _check_finite(values, field, violations)
    if (std < 0).any():
        at = int(np.argmax(std < 0))
        violations.add(f"input_statistics.std[{at}]", f"is {std[at]}, expected at least 0")
    return mean, std
