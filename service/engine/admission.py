"""The engine's checks of work before it is queued. They are cheap. Messages to users are the callers' business.

Invalid work is refused here, before it reaches the device. The dictionaries themselves check names, latents and sites.
Every check raises ValueError.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from sae_runtime.dictionary.dictionary import Dictionary, find_dictionary
from sae_runtime.edits import Edit, InvalidEdit, check_edits
from sae_runtime.model.backbone import Backbone
from service.engine.work import DecodeWork, GenerateWork


def check_rows(
    rows: Sequence[Sequence[int]], backbone: Backbone, *, at_least: int = 1, at_most: int = sys.maxsize
) -> None:
    """There are rows, of `at_least` to `at_most` token ids each, and no more than the context length."""
    at_most = min(at_most, backbone.context_length)
    if not rows:
        raise ValueError("there are no rows")
    for row in rows:
        if not at_least <= len(row) <= at_most:
            raise ValueError(f"a row has {len(row)} tokens, expected {at_least} to {at_most}")
        check_tokens(row, backbone)


def check_generation(
    work: GenerateWork, backbone: Backbone, dictionaries: Mapping[str, Dictionary], max_tokens: int
) -> None:
    """Sequences of at most `max_tokens` tokens each, prompt and new ones. UnknownDictionary for those they watch."""
    if work.max_new_tokens < 1 or work.samples < 1 or not work.sampling.repetition_penalty > 0:
        raise ValueError("max_new_tokens, samples and repetition_penalty must be positive")
    check_rows([work.prompt], backbone, at_most=max_tokens - 1)
    if work.stop and not backbone.has_tokenizer:
        raise ValueError("stop strings need a backbone with a tokenizer")
    for name in work.features.dictionaries if work.features else ():
        find_dictionary(name, dictionaries).require_site()
    check_row_edits(work.edits, dictionaries, len(work.prompt), backbone)


def check_row_edits(
    edits: Sequence[Edit], dictionaries: Mapping[str, Dictionary], prompt_length: int, backbone: Backbone
) -> None:
    """Edits that can run together on one row, their references resolved."""
    check_edits(edits, dictionaries, prompt_length, backbone)
    for index, edit in enumerate(edits):
        if edit.reference is not None:
            raise InvalidEdit("reference", "has not been run; see Engine.resolve_references", index)


def check_tokens(tokens: Sequence[int], backbone: Backbone) -> None:
    """Token ids of the vocabulary."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < backbone.vocab_size):
        raise ValueError(f"token ids {min(tokens)} to {max(tokens)} leave the vocabulary of {backbone.vocab_size}")


def check_features(work: DecodeWork, dictionary: Dictionary) -> None:
    """Well-formed rows of features that the dictionary has, and statistics of as many rows or none."""
    csr, n = work.features, len(work.features)
    splits = csr.row_splits
    if n < 1 or splits[0] != 0 or (splits[1:] < splits[:-1]).any():
        raise ValueError("row_splits are not rising offsets of at least one row, starting with 0")
    if not len(csr.indices) == len(csr.values) == splits[-1]:
        raise ValueError("row_splits, indices and values are of different lengths")
    dictionary.check_latents([int(csr.indices.max(initial=0))])
    shapes = [None if values is None else values.shape for values in (work.mean, work.std)]
    if shapes not in ([None, None], [(n,), (n,)]):
        raise ValueError(f"mean and std have shapes {shapes}, expected [{n}] both, or neither")
