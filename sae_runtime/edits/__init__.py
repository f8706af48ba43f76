"""Edits of latents as data, and their arithmetic inside a forward pass.

An edit changes the value z_f of one latent to z'_f at some token positions of a row. The activation h of the edited
site becomes

    h' = h + decode(z') - decode(z) = h + std * sum_f (z'_f - z_f) d_f

with d_f the latent's decoder row and std the scale that the dictionary's input normalisation took out (1 without
normalisation). What the dictionary does not reconstruct stays in h: the edit is error-preserving, and an edit that does
not change z_f does not change h. The operation "replace" gives that up: h' = decode(z'), with the z' of the same
dictionary's other edits. Dictionaries at one site, and the conditions on their latents, all read the activation as it
was before any edit there; later sites see the earlier edits.

To run edits once (a prompt, a text to score):

    check_edits(edits, dictionaries, prompt_length, backbone)
    edits = resolve_references(edits, dictionaries, backbone)        # only for "resample"
    row = RowEdits(edits, dictionaries, prompt_length, token_bytes=backbone.token_bytes)
    batch = BatchEdits([BatchRow(row, past=0, length=n, tokens=tokens), ...])    # edits None: a row without any
    backbone.forward(packed, edit=batch.apply, edit_sites=batch.sites, ...)

In decoding, the edits of a row are made ready when it arrives, and those of the running batch follow it step by step:

    batch = batch.for_step([BatchRow(row, past, 1, tokens), ...])

While the batch and what its edits cover stay the same this is the very object of the step before, and nothing is sent
to the device. `tokens`, the row's ids so far, is needed only by edits after a text. A batch with `not batch` edits
nothing: run the forward without it. EditOutOfRange names the rows of the batch whose edits overflow; the others can run
again. Others that read the same dictionaries in the same forward share its `Readings` (dictionary/readings.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_runtime.edits.apply import EditOutOfRange as EditOutOfRange
    from sae_runtime.edits.batch import BatchEdits as BatchEdits
    from sae_runtime.edits.batch import BatchRow as BatchRow
    from sae_runtime.edits.checks import check_edits as check_edits
    from sae_runtime.edits.edit import AfterText as AfterText
    from sae_runtime.edits.edit import AllOf as AllOf
    from sae_runtime.edits.edit import AnyOf as AnyOf
    from sae_runtime.edits.edit import Condition as Condition
    from sae_runtime.edits.edit import Edit as Edit
    from sae_runtime.edits.edit import InvalidEdit as InvalidEdit
    from sae_runtime.edits.edit import Operation as Operation
    from sae_runtime.edits.edit import Positions as Positions
    from sae_runtime.edits.edit import Reference as Reference
    from sae_runtime.edits.edit import Where as Where
    from sae_runtime.edits.references import resolve_references as resolve_references
    from sae_runtime.edits.row import RowEdits as RowEdits

# Imported on first use: clients describe edits, and must not wait for torch.
_MODULE_OF = {
    "AfterText": "edit",
    "AllOf": "edit",
    "AnyOf": "edit",
    "BatchEdits": "batch",
    "BatchRow": "batch",
    "Condition": "edit",
    "Edit": "edit",
    "EditOutOfRange": "apply",
    "InvalidEdit": "edit",
    "Operation": "edit",
    "Positions": "edit",
    "Reference": "edit",
    "RowEdits": "row",
    "Where": "edit",
    "check_edits": "checks",
    "resolve_references": "references",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sae_runtime.edits' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sae_runtime.edits.{_MODULE_OF[name]}"), name)
