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
    plan = plan_edits([RowEdits(edits, prompt_length, past=0, length=n)], dictionaries)
    backbone.forward(packed, edit=plan.apply, edit_sites=plan.sites, ...)

In decoding, each request's edits are compiled when it arrives, and one planner serves the running batch. Its `plan` is
to be called at every step; while the batch and what its edits cover stay the same it returns the very plan of the step
before, without touching the device:

    compiled = CompiledEdits(edits, dictionaries, prompt_length, token_bytes=backbone.token_bytes)
    planner = EditPlanner()
    plan = planner.plan([RowEdits(compiled, prompt_length, past, n, tokens), ...])  # () of a row without edits

`tokens`, the row's ids so far, is needed only by edits after a text. A plan with `not plan` edits nothing: run the
forward without it. EditOutOfRange names the rows of the batch whose edits overflow; the others can run again.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_runtime.edits.apply import EditOutOfRange as EditOutOfRange
    from sae_runtime.edits.batch import EditPlan as EditPlan
    from sae_runtime.edits.batch import EditPlanner as EditPlanner
    from sae_runtime.edits.batch import RowEdits as RowEdits
    from sae_runtime.edits.batch import plan_edits as plan_edits
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
    from sae_runtime.edits.row import CompiledEdits as CompiledEdits

# Imported on first use: clients describe edits, and must not wait for torch.
_MODULE_OF = {
    "AfterText": "edit",
    "AllOf": "edit",
    "AnyOf": "edit",
    "CompiledEdits": "row",
    "Condition": "edit",
    "Edit": "edit",
    "EditOutOfRange": "apply",
    "EditPlan": "batch",
    "EditPlanner": "batch",
    "InvalidEdit": "edit",
    "Operation": "edit",
    "Positions": "edit",
    "Reference": "edit",
    "RowEdits": "batch",
    "Where": "edit",
    "check_edits": "checks",
    "plan_edits": "batch",
    "resolve_references": "references",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sae_runtime.edits' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sae_runtime.edits.{_MODULE_OF[name]}"), name)
