"""Edited generation without saeserve: Hugging Face's `generate` with a forward hook, as one would write it by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime.dictionary.formats.published import read_manifest


@dataclass(frozen=True)
class HookEdit:
    """z' = factor * z + shift of one latent, on every token."""

    feature: int
    factor: float
    shift: float


class HookedGenerator:
    """GPT-2 with one TopK dictionary that reads a block's output, in float32; one request at a time, greedily."""

    def __init__(self, backbone: Path, dictionary: Path) -> None:
        manifest = read_manifest(dictionary)
        layer, location = manifest.site.split(".")
        assert location == "resid_post_mlp"
        assert manifest.k is not None
        self.model = GPT2LMHeadModel.from_pretrained(backbone, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.block = self.model.transformer.h[int(layer)]
        tensors = {name: tensor.float() for name, tensor in load_file(dictionary / "weights.safetensors").items()}
        self.encoder, self.pre_bias, self.latent_bias = (tensors[n] for n in ("encoder", "pre_bias", "latent_bias"))
        self.decoder = tensors.get("decoder", self.encoder)
        self.k, self.normalize = manifest.k, manifest.normalization == "layer_norm"

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], n: int, edits: Sequence[HookEdit] = ()) -> list[int]:
        """n new tokens; without edits there is no hook."""
        handle = self.block.register_forward_hook(lambda m, i, out: self._edit(out, edits)) if edits else None
        ids = torch.tensor([list(prompt)])
        try:
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        finally:
            if handle is not None:
                handle.remove()
        return [int(token) for token in out[0, len(prompt) :]]

    @torch.inference_mode()
    def latents(self, prompt: Sequence[int]) -> Tensor:
        """All latents of every token of a prompt, [T, n_latents], unedited."""
        outputs: list[Tensor] = []
        handle = self.block.register_forward_hook(lambda m, i, out: outputs.append(_hidden(out)))
        try:
            self.model(torch.tensor([list(prompt)]))
        finally:
            handle.remove()
        z, _ = self._encode(outputs[0][0])
        return z

    def _encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        std = torch.ones_like(h[..., :1])
        x = h
        if self.normalize:
            std = h.std(-1, keepdim=True)
            x = (h - h.mean(-1, keepdim=True)) / (std + 1e-5)
        values, indices = F.linear(x - self.pre_bias, self.encoder, self.latent_bias).topk(self.k)
        z = torch.zeros(*h.shape[:-1], len(self.encoder)).scatter_(-1, indices, values.relu())
        return z, std

    def _edit(self, out: Any, edits: Sequence[HookEdit]) -> Any:
        h = _hidden(out)
        z, std = self._encode(h)
        for edit in edits:
            old = z[..., edit.feature, None]
            h = h + ((edit.factor - 1) * old + edit.shift) * std * self.decoder[edit.feature]
        return (h, *out[1:]) if isinstance(out, tuple) else h


def _hidden(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
