"""Checks of request fields that are not text or edits. All that is wrong with a request is collected, then raised."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.arrays import unpack_input_statistics, unpack_sparse_rows, unpack_tensor
from service.engine.work import Csr, Selection
from service.pb.saeserve.v1 import common_pb2, feature_service_pb2
from service.rpc.errors import Violation, invalid_argument, shown
from service.rpc.limits import Limits

if TYPE_CHECKING:
    from sae_runtime import Dictionary


class Violations:
    """What is wrong with one request, so far."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self._found.append(Violation(field, description))

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        """RpcError INVALID_ARGUMENT that names them all."""
        if self._found:
            raise invalid_argument(self._found)

    def check_count(self, field: str, count: int, limit: int, limit_name: str) -> bool:
        """Whether a list has 1 to `limit` entries."""
        if count == 0:
            self.add(field, "is empty; at least one is needed")
        elif count > limit:
            self.add(field, f"has {count} entries, more than {limit_name} = {limit}")
        return 0 < count <= limit

    def check_enum(self, field: str, value: int, known: Collection[int]) -> None:
        """That an enum field has a value of the enum: proto3 lets any number through."""
        if value not in known:
            self.add(field, f"{value} is not a value of this enum")


def first_repeated(values: Iterable[Any]) -> int | None:
    """Place of the first value that occurred before, or None."""
    seen = set()
    for place, value in enumerate(values):
        if value in seen:
            return place
        seen.add(value)
    return None


def check_dictionary_names(
    names: Sequence[str], limits: Limits, violations: Violations, field: str = "dictionaries"
) -> None:
    """One or more names without repeats; whether there are such dictionaries is another question."""
    if not violations.check_count(field, len(names), limits.max_dictionaries, "max_dictionaries"):
        return
    for place, name in enumerate(names):
        if not name:
            violations.add(f"{field}[{place}]", "is empty")
    repeated = first_repeated(names)
    if repeated is not None:
        violations.add(f"{field}[{repeated}]", f"{shown(names[repeated])} is named twice")


def read_selection(
    message: feature_service_pb2.FeatureSelection | None,
    dictionaries: Mapping[str, Dictionary],
    limits: Limits,
    violations: Violations,
) -> Selection:
    """The selection rule; feature numbers must exist in each of the dictionaries."""
    if message is None:
        return Selection()
    kind = message.WhichOneof("selection")
    if kind == "top_k":
        k = message.top_k
        if not 1 <= k <= limits.max_selected_features:
            bounds = f"1 to max_selected_features = {limits.max_selected_features}"
            violations.add("selection.top_k", f"is {k}, expected {bounds}")
        return Selection("top_k", k=k)
    if kind == "threshold":
        if not (math.isfinite(message.threshold) and message.threshold >= 0):
            violations.add("selection.threshold", f"is {message.threshold}, expected a finite number, at least 0")
        return Selection("threshold", threshold=message.threshold)
    if kind == "features":
        field = "selection.features.ids"
        count = len(message.features.ids)
        if not violations.check_count(field, count, limits.max_selected_features, "max_selected_features"):
            return Selection()
        features = tuple(message.features.ids)
        repeated = first_repeated(features)
        if repeated is not None:
            violations.add(f"{field}[{repeated}]", f"feature {features[repeated]} is named twice")
        for name, dictionary in dictionaries.items():
            outside = next((place for place, f in enumerate(features) if f >= dictionary.n_latents), None)
            if outside is not None:
                violations.add(
                    f"{field}[{outside}]",
                    f"feature {features[outside]} is outside 0..{dictionary.n_latents - 1} of {shown(name)}",
                )
        return Selection("features", features=features)
    violations.add("selection", "has no rule; set top_k, features or threshold, or leave the selection unset")
    return Selection()


def read_activations(
    tensor: common_pb2.Tensor, dictionary: Dictionary | None, limits: Limits, violations: Violations
) -> NDArray[np.float32]:
    """float32 [n, d_in], finite."""
    shape = list(tensor.shape[:8])
    if len(tensor.shape) != 2:
        violations.add("activations.shape", f"is {shape}, expected two axes [n, d_in]")
    elif shape[0] == 0:
        violations.add("activations.shape", "has no rows; at least one is needed")
    elif shape[0] > limits.max_activation_rows:
        violations.add(
            "activations.shape", f"has {shape[0]} rows, more than max_activation_rows = {limits.max_activation_rows}"
        )
    elif dictionary is not None and shape[1] != dictionary.d_in:
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
    n_rows = len(message.row_splits) - 1
    if n_rows < 1:
        violations.add("features.row_splits", "needs n + 1 entries for n rows, at least one row")
    elif n_rows > limits.max_activation_rows:
        violations.add(
            "features.row_splits", f"is of {n_rows} rows, more than max_activation_rows = {limits.max_activation_rows}"
        )
    entries, most = len(message.indices), limits.max_activation_rows * limits.max_selected_features
    if entries > most:
        violations.add(
            "features.indices", f"has {entries} entries, more than max_activation_rows x max_selected_features = {most}"
        )
    if len(message.values) != entries:
        violations.add("features.values", f"has {len(message.values)} entries, indices has {entries}")
    if violations:
        return empty
    row_splits, indices, values = unpack_sparse_rows(message)
    splits = row_splits.astype(np.int64)
    lengths: NDArray[np.int64] = splits[1:] - splits[:-1]
    if row_splits[0] != 0:
        violations.add("features.row_splits", f"starts with {row_splits[0]}, expected 0")
    if (lengths < 0).any():
        at = int(np.argmax(lengths < 0)) + 1
        violations.add(f"features.row_splits[{at}]", f"is {row_splits[at]}, less than the entry before it")
    if row_splits[-1] != entries:
        violations.add("features.row_splits", f"ends with {row_splits[-1]}, expected the {entries} entries there are")
    if dictionary is not None and entries and (outside := indices >= dictionary.n_latents).any():
        at = int(np.argmax(outside))
        violations.add(
            f"features.indices[{at}]",
            f"feature {indices[at]} is outside 0..{dictionary.n_latents - 1} of the dictionary",
        )
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        violations.add(f"features.values[{at}]", f"is {values[at]}, expected a finite number")
    if violations:
        return empty
    # One number a (row, feature) pair: a repeat is a repeated number.
    pairs = np.repeat(np.arange(n_rows, dtype=np.int64), lengths) << 32 | indices
    order = np.argsort(pairs, kind="stable")
    repeats = np.flatnonzero(np.diff(pairs[order]) == 0)
    if len(repeats):
        at = int(order[repeats[0] + 1])
        violations.add(f"features.indices[{at}]", f"feature {indices[at]} occurs twice in row {pairs[at] >> 32}")
    return Csr(row_splits, indices, values)


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
        elif not np.isfinite(values).all():
            at = int(np.argmin(np.isfinite(values)))
            violations.add(f"{field}[{at}]", f"is {values[at]}, expected a finite number")
    if (std < 0).any():
        at = int(np.argmax(std < 0))
        violations.add(f"input_statistics.std[{at}]", f"is {std[at]}, expected at least 0")
    return mean, std
