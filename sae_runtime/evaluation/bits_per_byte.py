"""How well a backbone predicts text, in bits per UTF-8 byte: comparable over tokenizers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from sae_runtime.data.documents import Document
from sae_runtime.data.rows import encode_texts, encoded
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens


@torch.no_grad()
def bits_per_byte(
    backbone: Backbone, documents: Iterable[Document], *, tokens_per_pass: int = 4_096
) -> dict[str, float]:
    """Held-out bits per byte for each kind of text: total negative log2 probability over total bytes.

    Every document is preceded by end-of-text, so that all of its bytes are predicted, and read in windows of the
    backbone's context length that do not overlap: a window's tokens see only the tokens before them in it.

    Raises:
        ValueError: the backbone has no tokenizer with an end-of-text token, or a document cannot be tokenized.
    """
    nats: dict[str, float] = defaultdict(float)
    n_bytes: dict[str, int] = defaultdict(int)
    windows: list[tuple[str, list[int], list[int]]] = []  # kind, inputs, targets
    size = 0
    encode, end_of_text = encode_texts(backbone)
    for document, ids in encoded(documents, encode):
        n_bytes[document.kind] += len(document.text.encode())
        for inputs, targets in _windows([end_of_text, *ids], backbone.context_length):
            if windows and size + len(inputs) > tokens_per_pass:
                _add_nats(backbone, windows, nats)
                windows, size = [], 0
            windows.append((document.kind, inputs, targets))
            size += len(inputs)
    if windows:
        _add_nats(backbone, windows, nats)
    return {kind: nats[kind] / math.log(2) / n_bytes[kind] for kind in sorted(n_bytes) if n_bytes[kind]}


def _windows(ids: list[int], length: int) -> Iterable[tuple[list[int], list[int]]]:
    for start in range(0, len(ids) - 1, length):
        targets = ids[start + 1 : start + 1 + length]
        yield ids[start : start + len(targets)], targets


def _add_nats(backbone: Backbone, windows: list[tuple[str, list[int], list[int]]], nats: dict[str, float]) -> None:
    packed = PackedTokens.from_rows([inputs for _, inputs, _ in windows]).to(backbone.device)
    logits = backbone.forward(packed, logits="all").logits
    assert logits is not None
    targets = torch.tensor([t for _, _, row in windows for t in row], device=logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none").double()
    for (kind, _, _), row in zip(windows, torch.split(losses, list(packed.lengths)), strict=True):
        nats[kind] += float(row.sum())
