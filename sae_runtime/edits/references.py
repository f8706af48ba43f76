"""Resample edits: what their latents have on the reference texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits.edit import Edit
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site


@torch.no_grad()
def resolve_references(
    edits: Sequence[Edit], dictionaries: Mapping[str, Dictionary], backbone: Backbone
) -> tuple[Edit, ...]:
    """The edits with every "resample" made a "set"; each reference text runs once, unedited.

    The edits must have passed `check_edits`. ValueError: a text that the backbone cannot tokenise, or over its context
    length.
    """
    tokens_of: dict[int, tuple[int, ...]] = {}
    sites_of: dict[tuple[int, ...], set[Site]] = {}
    for index, edit in enumerate(edits):
        if edit.reference is not None:
            text = edit.reference.text
            tokens = tuple(backbone.encode_text(text).ids) if isinstance(text, str) else text
            tokens_of[index] = tokens
            sites_of.setdefault(tokens, set()).add(dictionaries[edit.dictionary].require_site())
    activations = {
        tokens: backbone.forward(PackedTokens.from_rows([tokens]), capture=sites).activations
        for tokens, sites in sites_of.items()
    }
    resolved = list(edits)
    for index, tokens in tokens_of.items():
        dictionary = dictionaries[edits[index].dictionary]
        x = activations[tokens][dictionary.require_site()]
        z = dictionary.encode_features(x, torch.tensor([edits[index].feature]))[:, 0]
        resolved[index] = edits[index].with_reference_values(tuple(z.tolist()))
    return tuple(resolved)
