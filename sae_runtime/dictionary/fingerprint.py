"""A dictionary's fingerprint: what tells its features from those of another dictionary, or of another version of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_runtime.dictionary.dictionary import Dictionary

_TENSORS = (
    "encoder", "decoder", "pre_bias", "latent_bias", "output_bias", "threshold", "magnitude_scale", "magnitude_bias",
    "skip",
)  # fmt: skip


def fingerprint_of(dictionary: Dictionary) -> str:
    """A sha256 (64 hexadecimal digits).

    Of a published dictionary, that of its weights file, as its manifest says: the same in whatever dtype it is loaded.
    Else of the tensors as float32, in the dtype that they were loaded in, and of what says how to use them.
    """
    if dictionary.manifest is not None and (recorded := dictionary.manifest.weights_sha256):
        return recorded
    digest = hashlib.sha256()
    digest.update(f"{dictionary.activation} {dictionary.k} {dictionary.normalization} {dictionary.postact}".encode())
    for name in _TENSORS:
        tensor = getattr(dictionary, name)
        if tensor is None or (name == "decoder" and dictionary.tied):
            continue
        digest.update(f" {name} {list(tensor.shape)} ".encode())
        for rows in tensor.detach().split(4096):  # bounds the memory of the copy
            digest.update(rows.to(device="cpu", dtype=torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
