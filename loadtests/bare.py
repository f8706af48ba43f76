"""Feature extraction without saeserve: Hugging Face's GPT-2 and two lines of PyTorch, as one would write it by hand."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Model

from sae_runtime.dictionary.formats.published import read_manifest


class BareExtractor:
    """GPT-2 up to one block's output, then a TopK encoder: from a padded batch to the top k latents of every token.

    Args:
        backbone: Hugging Face folder.
        dictionary: folder of a published TopK dictionary that reads a block's output; later blocks are removed.
    """

    def __init__(self, backbone: Path, dictionary: Path) -> None:
        manifest = read_manifest(dictionary)
        assert manifest.k is not None
        layer, location = manifest.site.split(".")
        assert location == "resid_post_mlp"
        self.model = GPT2Model.from_pretrained(backbone, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.model.h = self.model.h[: int(layer) + 1]
        self.model.ln_f = torch.nn.Identity()
        tensors = {name: tensor.float() for name, tensor in load_file(dictionary / "weights.safetensors").items()}
        self.encoder, self.pre_bias, self.latent_bias = (tensors[n] for n in ("encoder", "pre_bias", "latent_bias"))
        self.k, self.normalize = manifest.k, manifest.normalization == "layer_norm"

    @torch.inference_mode()
    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Activations of the rows' real tokens, [n, d]."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        hidden = self.model(ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return hidden[mask]

    @torch.inference_mode()
    def extract(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Values and indices of the top k latents of every token, both [n, k]."""
        x = self.forward(rows)
        if self.normalize:
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        values, indices = F.linear(x - self.pre_bias, self.encoder, self.latent_bias).topk(self.k)
        return values.relu(), indices
