"""Backbone and dictionary of GPT-2 small's shape with random weights, for measurements.

Speed does not depend on the values of the weights, as long as they are of a realistic scale.
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae_runtime import Backbone, Dictionary, LatentStatistics
from sae_runtime.dictionary.formats.published import save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference

LAYER = 8
N_LATENTS = 32_768
K = 32


def write_gpt2_shape(folder: Path, tokenizer: Path, seed: int = 0) -> tuple[Path, Path]:
    """Writes a Hugging Face folder and a published dictionary (site 8.resid_post_mlp) under `folder`.

    `tokenizer` is a Hugging Face folder to copy the tokenizer from; its vocabulary may not be larger than GPT-2's.

    Returns:
        The backbone's and the dictionary's folders.
    """
    torch.manual_seed(seed)
    backbone_folder, dictionary_folder = folder / "gpt2-shape", folder / "gpt2-shape-dictionary"
    config = GPT2Config(bos_token_id=0, eos_token_id=0)  # the defaults are GPT-2 small: 12 layers, 768 wide
    GPT2LMHeadModel(config).save_pretrained(backbone_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (backbone_folder / name).write_bytes((tokenizer / name).read_bytes())

    encoder = torch.nn.functional.normalize(torch.randn(N_LATENTS, config.n_embd), dim=1)
    dictionary = Dictionary(
        encoder=encoder,
        decoder=encoder.clone(),
        pre_bias=torch.zeros(config.n_embd),
        latent_bias=0.1 * torch.randn(N_LATENTS),
        activation="topk",
        k=K,
        normalization="layer_norm",
        site=f"{LAYER}.resid_post_mlp",
        name="gpt2-shape",
    )
    backbone = Backbone.load(backbone_folder)
    save_dictionary(
        dictionary,
        dictionary_folder,
        backbone=BackboneReference(backbone.name, backbone.fingerprint, backbone.tokenizer_fingerprint),
        statistics=LatentStatistics(
            **{name: torch.zeros(N_LATENTS) for name in ("firing_rate", "mean", "mean_square", "max")},
            quantiles=torch.zeros(N_LATENTS, 1),
            quantile_levels=torch.tensor([0.5]),
            n_tokens=0,
        ),
        dtype="float32",
    )
    return backbone_folder, dictionary_folder
