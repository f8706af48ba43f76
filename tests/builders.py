"""Small random models and dictionaries, for tests of the library and of the service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.families.gpt2.weights import random_state
from tests.reference_edits import EditedModel

N_LATENTS = 96
VOCABULARY = 257


def byte_tokenizer(*added: str) -> PreTrainedTokenizerFast:
    """One token a byte, <|endoftext|> as id 0, and `added` tokens as ids 257 and up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i + 1 for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end_of_text = AddedToken("<|endoftext|>", special=True)
    tokenizer = Tokenizer.from_str(
        tokenizer.to_str().replace('"vocab":{', '"vocab":{"<|endoftext|>":0,')  # id 0, before the alphabet
    )
    tokenizer.add_special_tokens([end_of_text, *(AddedToken(text, special=True) for text in added)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def small_backbone(
    *, context_length: int = 96, n_layers: int = 3, tokenizer: PreTrainedTokenizerFast | None = None
) -> Backbone:
    return Backbone.random(
        n_layers=n_layers,
        d_model=32,
        n_heads=4,
        vocab_size=VOCABULARY,
        context_length=context_length,
        seed=5,
        tokenizer=tokenizer or byte_tokenizer(),
    )


def random_dictionary(
    site: str, d_in: int, *, k: int | None, normalize: bool, seed: int, n_latents: int = N_LATENTS
) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    encoder = torch.nn.functional.normalize(normal(n_latents, d_in), dim=1)
    tied = k is not None
    return Dictionary(
        encoder=encoder,
        decoder=encoder if tied else torch.nn.functional.normalize(normal(n_latents, d_in), dim=1),
        pre_bias=0.1 * normal(d_in),
        latent_bias=0.1 * normal(n_latents),
        activation="relu" if k is None else "topk",
        k=k,
        normalization="layer_norm" if normalize else "none",
        site=site,
        name=site,
        statistics=LatentStatistics(
            firing_rate=torch.rand(n_latents, generator=generator),
            mean=torch.rand(n_latents, generator=generator),
            mean_square=torch.rand(n_latents, generator=generator),
            max=1 + 3 * torch.rand(n_latents, generator=generator),
            quantiles=torch.rand(n_latents, 2, generator=generator),
            quantile_levels=torch.tensor([0.5, 0.9]),
            n_tokens=1000,
        ),
    )


def small_dictionaries() -> dict[str, Dictionary]:
    return {
        "early": random_dictionary("0.resid_post_mlp", 32, k=None, normalize=False, seed=1),
        "mid": random_dictionary("1.resid_post_mlp", 32, k=8, normalize=True, seed=2),
        "wide": random_dictionary("1.mlp_post_act", 128, k=12, normalize=False, seed=3),
        "delta": random_dictionary("2.resid_delta_attn", 32, k=6, normalize=True, seed=4),
    }


def random_rows(n: int, lengths: tuple[int, int], seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        rows.append(tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()))
    return rows


def hugging_face_copy(backbone: Backbone, seed: int = 5) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 with the weights of a random backbone, made with the seed of `small_backbone`."""
    model = GPT2LMHeadModel(backbone.config)
    model.load_state_dict(random_state(backbone.settings, seed), strict=False)
    model.tie_weights()
    return model


def edited_model(backbone: Backbone, dictionaries: Mapping[str, Dictionary]) -> EditedModel:
    """The slow reference of a `small_backbone`, which shares no code with the engine or the library."""
    return EditedModel(hugging_face_copy(backbone), dictionaries, backbone.token_bytes)


def dictionaries_of_all_kinds(d_model: int) -> dict[str, Dictionary]:
    """Every family, each normalisation, several sites, two of them at one; float64."""
    kinds: dict[str, dict[str, Any]] = {
        "relu": {"site": "0.mlp_post_act", "activation": "relu"},
        "jumprelu": {"site": "0.resid_post_mlp", "activation": "jumprelu", "normalization": "constant_norm"},
        "groupmax": {"site": "1.resid_delta_attn", "activation": "groupmax", "normalization": "layer_norm", "k": 8},
        "topk": {"site": "1.resid_post_mlp", "activation": "topk", "normalization": "layer_norm", "k": 10},
        "gated": {"site": "1.resid_post_mlp", "activation": "gated"},
        "signed": {"site": "1.resid_delta_mlp", "activation": "topk", "k": 10, "postact": "identity", "skip": True},
    }
    return {name: _of_kind(i, d_model, **kind) for i, (name, kind) in enumerate(kinds.items())}


def _of_kind(seed: int, d_model: int, *, site: str, skip: bool = False, **options: Any) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    n, d = 48, 4 * d_model if "mlp_post_act" in site else d_model

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    activation = options["activation"]
    if activation == "jumprelu":
        options["threshold"] = 0.3 * normal(n).abs()
    if activation == "gated":
        options |= {"magnitude_scale": normal(n).exp(), "magnitude_bias": 0.1 * normal(n)}
    if skip:
        options["skip"] = 0.1 * normal(d, d)
    largest = normal(n).abs() + 1
    statistics = LatentStatistics(
        torch.rand(n), (0.3 * largest).float(), largest.float(), largest.float(), torch.zeros(n, 1), torch.ones(1), 9
    )
    return Dictionary(
        encoder=normal(n, d) / d**0.5,
        decoder=normal(n, d) / d**0.5,
        pre_bias=0.2 * normal(d),
        latent_bias=0.2 * normal(n),
        output_bias=0.2 * normal(d),
        site=site,
        statistics=statistics,
        **options,
    )
