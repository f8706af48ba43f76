"""A small random backbone with its tokenizer and two dictionaries, written to a folder as users have theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae_runtime import Backbone, Dictionary, load_dictionary, save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference
from tests.builders import VOCABULARY, byte_tokenizer, random_dictionary

WIDTH = 32
CONTEXT_LENGTH = 1024
SITES = {"mid": "1.resid_post_mlp", "late": "2.resid_post_mlp"}


@dataclass(frozen=True)
class TinyModel:
    """Where the files are; the two methods load them with the library."""

    backbone: Path
    dictionaries: tuple[Path, ...]

    def load_backbone(self) -> Backbone:
        return Backbone.load(str(self.backbone))

    def load_dictionaries(self) -> dict[str, Dictionary]:
        return {path.name: load_dictionary(str(path)) for path in self.dictionaries}


def write_tiny_model(folder: Path) -> TinyModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT_LENGTH,
        n_embd=WIDTH,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "backbone")
    byte_tokenizer().save_pretrained(folder / "backbone")
    backbone = Backbone.load(str(folder / "backbone"))
    reference = BackboneReference("tiny", backbone.fingerprint, backbone.tokenizer_fingerprint)
    for seed, (name, site) in enumerate(SITES.items()):
        dictionary = random_dictionary(site, WIDTH, k=8, normalize=seed == 0, seed=seed)
        save_dictionary(
            dictionary, folder / name, backbone=reference, name=name, dtype="float32", context_length=CONTEXT_LENGTH
        )
    return TinyModel(folder / "backbone", tuple(folder / name for name in SITES))
