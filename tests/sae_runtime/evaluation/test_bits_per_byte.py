"""Bits per byte against a direct sum over single predictions."""

import math
from pathlib import Path

import pytest
import torch

from sae_runtime import Backbone
from sae_runtime.data.documents import Document
from sae_runtime.evaluation.bits_per_byte import bits_per_byte

DOCUMENTS = [
    Document("short", "prose"),
    Document("a text that is longer than one window of thirty-two tokens, and then some more of it", "prose"),
    Document("naïve 日本", "foreign"),
    Document("x" * 32, "exact"),
    Document("", "empty"),
]


def test_they_equal_a_direct_computation(tiny_backbone_folder: Path, tiny_backbone: Backbone) -> None:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tiny_backbone_folder).eval()
    nats: dict[str, float] = {}
    size: dict[str, int] = {}
    for document in DOCUMENTS:
        ids = [0, *[i for byte in document.text.encode() for i in [byte_id(tiny_backbone, byte)]]]
        for predicted in range(1, len(ids)):
            start = (predicted - 1) // 32 * 32  # windows of 32 inputs that do not overlap
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:predicted]])).logits[0, -1]
            nats[document.kind] = nats.get(document.kind, 0) - float(logits.log_softmax(0)[ids[predicted]])
            size[document.kind] = size.get(document.kind, 0) + 1
    expected = {kind: nats[kind] / math.log(2) / size[kind] for kind in nats}
    assert bits_per_byte(tiny_backbone, DOCUMENTS, tokens_per_pass=40) == pytest.approx(expected, rel=1e-4)


def byte_id(backbone: Backbone, byte: int) -> int:
    """This tokenizer's tokens are single bytes."""
    return next(i for i in range(257) if backbone.token_bytes(i) == bytes([byte]))


def test_a_backbone_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        bits_per_byte(Backbone.random(), DOCUMENTS)
