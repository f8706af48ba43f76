"""Decoding with a cache against the full forward (which test_backbone.py compares with Hugging Face)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_runtime import Backbone, PackedTokens, Site
from sae_runtime.model.kv_cache import KVCache

SITE = Site(2, "resid_post_mlp")


def full_forward(backbone: Backbone, row: list[int]) -> tuple[Tensor, Tensor]:
    """Activations [T, d] and logits [T, vocab] of a row, without a cache."""
    result = backbone.forward(PackedTokens.from_rows([row]), capture=[SITE], logits="all")
    assert result.logits is not None
    return result.activations[SITE], result.logits


def check_step(backbone: Backbone, cache: KVCache, pieces: dict[int, tuple[list[int], int, int]]) -> None:
    """Runs {slot: (row, past, end)} in one batch and compares with the full forward of row[:end]."""
    packed = PackedTokens.from_rows(
        [row[past:end] for row, past, end in pieces.values()],
        past=[past for _, past, _ in pieces.values()],
        slots=list(pieces),
    )
    result = backbone.forward(packed, capture=[SITE], cache=cache, logits="last")
    assert result.logits is not None
    by_row = result.activations[SITE].split(packed.lengths)
    for (row, past, end), cached, logits in zip(pieces.values(), by_row, result.logits, strict=True):
        activations, all_logits = full_forward(backbone, row[:end])
        torch.testing.assert_close(cached, activations[past:], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(logits, all_logits[-1], atol=1e-4, rtol=1e-5)


class Arena:
    """Rows of any lengths that come, grow and go in one arena; checks every step against the full forward."""

    def __init__(self, backbone: Backbone, n_slots: int, max_tokens: int) -> None:
        self.backbone, self.cache = backbone, backbone.new_cache(n_slots, max_tokens=max_tokens)
        self.rows: dict[int, list[int]] = {}
        self.past: dict[int, int] = {}

    def start(self, slot: int, row: list[int]) -> None:
        self.cache.reserve(slot, len(row))
        self.rows[slot], self.past[slot] = row, 0

    def step(self, slots: list[int], n: int = 1) -> None:
        pieces = {
            slot: (self.rows[slot], self.past[slot], min(self.past[slot] + n, len(self.rows[slot]))) for slot in slots
        }
        check_step(self.backbone, self.cache, pieces)
        for slot, (_, _, end) in pieces.items():
            self.past[slot] = end

    def stop(self, slot: int) -> None:
        self.cache.release(slot)
        del self.rows[slot], self.past[slot]
