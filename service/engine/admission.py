"""Checks before work is queued: what would otherwise reach the device, or other requests, as a failure there.

Limits and messages for users are the callers' business. Every check raises ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import Edit, InvalidEdit, check_edits
from sae_runtime.model.backbone import Backbone
from service.engine.work import DecodeWork, Selection


def check_row(row: Sequence[int], backbone: Backbone, limit: int) -> None:
    """Token ids of the vocabulary, 1 to `limit` of them."""
    if not 1 <= len(row) <= limit:
        raise ValueError(f"a row has {len(row)} tokens, expected 1 to {limit}")
    low, high = min(row), max(row)
    if low < 0 or high >= backbone.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside the vocabulary of {backbone.vocab_size}")


def check_row_edits(
    edits: Sequence[Edit], dictionaries: Mapping[str, Dictionary], prompt_length: int, backbone: Backbone
) -> None:
    """Edits that can run together on one row, their references resolved."""
    check_edits(edits, dictionaries, prompt_length, backbone)
    for index, edit in enumerate(edits):
        if edit.reference is not None:
            raise InvalidEdit("reference", "has not been run; see Engine.resolve_references", index)


def split_rows(rows: Sequence[tuple[int, ...]], budget: int) -> list[Sequence[tuple[int, ...]]]:
    """Consecutive rows of at most `budget` tokens together; a longer row stands alone."""
    if sum(map(len, rows)) <= budget:
        return [rows]
    pieces: list[Sequence[tuple[int, ...]]] = []
    start = tokens = 0
    for i, row in enumerate(rows):
        if i > start and tokens + len(row) > budget:
            pieces.append(rows[start:i])
            start, tokens = i, 0
        tokens += len(row)
    pieces.append(rows[start:])
    return pieces


def check_selection(selection: Selection, dictionary: Dictionary) -> None:
    """Selected features that the dictionary has."""
    if selection.kind == "features":
        dictionary.check_latents(selection.features)


def check_csr(work: DecodeWork, dictionary: Dictionary) -> None:
    """Well-formed rows of features that the dictionary has, and statistics of as many rows."""
    csr = work.features
    splits = csr.row_splits
    if len(splits) < 2 or splits[0] != 0 or (splits[1:] < splits[:-1]).any():
        raise ValueError("row_splits are not rising offsets of at least one row, starting with 0")
    if len(csr.indices) != splits[-1] or len(csr.values) != splits[-1]:
        raise ValueError(
            f"row_splits end with {splits[-1]}, but there are {len(csr.indices)} indices and {len(csr.values)} values"
        )
    dictionary.check_latents([int(csr.indices.max(initial=0))])
    if (work.mean is None) != (work.std is None):
        raise ValueError("mean and std must be given together")
    n = len(splits) - 1
    if work.mean is not None and work.std is not None and (work.mean.shape != (n,) or work.std.shape != (n,)):
        raise ValueError(f"mean and std have shapes {list(work.mean.shape)} and {list(work.std.shape)}, expected [{n}]")
