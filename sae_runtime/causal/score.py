"""Teacher-forced scores of given texts, with and without edits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sae_runtime.causal.predictions import Predictions, compare, next_tokens, predict
from sae_runtime.causal.prefix import last_site
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.readings import Readings
from sae_runtime.edits import BatchEdits, BatchRow, Edit, RowEdits
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens


@dataclass(frozen=True)
class ScoredRow:
    """A row to score."""

    tokens: Sequence[int]
    edits: Sequence[Edit] = ()
    """Checked by `check_edits`, references resolved. The whole row counts as the prompt."""
    logit_tokens: Sequence[int] = ()
    """Tokens whose logits are returned at every position."""
    max_relative_change: float = math.inf
    """Edits may add at most this many times the Euclidean norm of a token's activation; more is out of range."""


@dataclass(frozen=True, eq=False)
class RowScore:
    """Predictions after each of a row's T tokens; the last has no loss."""

    unedited: Predictions
    edited: Predictions | None
    """None for a row without edits."""
    kl: Tensor | None
    """[T] KL(unedited || edited) in nats."""


@torch.no_grad()
def score_rows(
    backbone: Backbone,
    rows: Sequence[ScoredRow],
    dictionaries: Mapping[str, Dictionary],
    readings: Readings | None = None,
) -> list[RowScore]:
    """Scores rows in one batch. An edited row shares the blocks before the first edited site with its unedited copy.

    Args:
        readings: gets what edits read; its tokens are those of the edited rows, packed without the others.

    Raises:
        ValueError: a row over the context length, a token outside the vocabulary, or activations out of range.
    """
    device = backbone.device
    packed = PackedTokens.from_rows([row.tokens for row in rows]).to(device)
    edited_rows = [i for i, row in enumerate(rows) if row.edits]
    edits = BatchEdits([_row_edits(backbone, rows[i], dictionaries) for i in edited_rows])
    readings = Readings() if readings is None else readings
    last = last_site(backbone)
    result = backbone.forward(packed, capture=[last], pause=edits.sites[:1])
    final = result.activations[last]
    targets = next_tokens([row.tokens for row in rows]).to(device)
    columns = sorted({token for row in rows for token in row.logit_tokens})
    tokens = torch.tensor(columns, dtype=torch.int64, device=device)
    unedited = predict(backbone, final, targets, tokens)

    edited: Predictions | None = None
    kl: Tensor | None = None
    if edited_rows:
        spans = _spans(packed)
        source = torch.cat([torch.arange(*spans[i]) for i in edited_rows]).to(device)
        changed = final[source]
        if edits:
            copies = PackedTokens.from_rows([rows[i].tokens for i in edited_rows]).to(device)
            changed = backbone.forward(
                copies,
                start=result.paused[edits.sites[0]].take(source),
                edit=partial(edits.apply, readings=readings),
                edit_sites=edits.sites,
                capture=[last],
            ).activations[last]
        edited, kl = compare(backbone, final, changed, source, targets, tokens)

    scores, edited_start = [], 0  # `edited` holds the tokens of the edited rows alone
    for row, (start, end) in zip(rows, _spans(packed), strict=True):
        row_columns = [columns.index(token) for token in row.logit_tokens]
        logit_columns = torch.tensor(row_columns, dtype=torch.int64, device=device)
        before = unedited[start:end].with_tokens(logit_columns)
        if row.edits and edited is not None and kl is not None:
            span = slice(edited_start, edited_start + end - start)
            scores.append(RowScore(before, edited[span].with_tokens(logit_columns), kl[span]))
            edited_start = span.stop
        else:
            scores.append(RowScore(before, None, None))
    return scores


def _row_edits(backbone: Backbone, row: ScoredRow, dictionaries: Mapping[str, Dictionary]) -> BatchRow:
    n = len(row.tokens)
    edits = RowEdits(
        row.edits,
        dictionaries,
        n,
        token_bytes=backbone.token_bytes if backbone.has_tokenizer else None,
        max_relative_change=row.max_relative_change,
    )
    return BatchRow(edits, 0, n, row.tokens)


def _spans(packed: PackedTokens) -> list[tuple[int, int]]:
    """Start and end of each row in the packing."""
    ends = torch.tensor(packed.lengths).cumsum(0).tolist()
    return [(end - length, end) for end, length in zip(ends, packed.lengths, strict=True)]
