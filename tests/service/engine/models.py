"""Small random models, and a slow reference for generation that shares no code with the engine or the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.edits import Edit
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.families.gpt2.weights import random_state

N_LATENTS = 96
VOCABULARY = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <|endoftext|> as id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i + 1 for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end_of_text = AddedToken("<|endoftext|>", special=True)
    tokenizer = Tokenizer.from_str(
        tokenizer.to_str().replace('"vocab":{', '"vocab":{"<|endoftext|>":0,')  # id 0, before the alphabet
    )
    tokenizer.add_special_tokens([end_of_text])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def small_backbone(*, context_length: int = 96, n_layers: int = 3) -> Backbone:
    return Backbone.random(
        n_layers=n_layers,
        d_model=32,
        n_heads=4,
        vocab_size=VOCABULARY,
        context_length=context_length,
        seed=5,
        tokenizer=byte_tokenizer(),
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


class SlowGenerator:
    """Hugging Face's GPT-2, run over the whole sequence for every token, with edits as forward hooks."""

    def __init__(self, backbone: Backbone, dictionaries: dict[str, Dictionary], seed: int = 5) -> None:
        self.model = GPT2LMHeadModel(backbone.config).eval()
        self.model.load_state_dict(random_state(backbone.settings, seed), strict=False)
        self.model.tie_weights()
        self.dictionaries = dictionaries

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int], prompt_length: int, edits: Sequence[Edit]) -> Tensor:
        """Float32 logits [vocab] after the last token, with the edits on every token that they cover."""
        by_site: dict[str, list[Edit]] = {}
        for edit in edits:
            site = self.dictionaries[edit.dictionary].site
            assert site is not None
            by_site.setdefault(site, []).append(edit)
        handles = [
            self._module(site).register_forward_hook(self._hook(own, prompt_length)) for site, own in by_site.items()
        ]
        try:
            return self.model(torch.tensor([list(tokens)])).logits[0, -1].float()
        finally:
            for handle in handles:
                handle.remove()

    def greedy(self, prompt: Sequence[int], n: int, edits: Sequence[Edit] = ()) -> tuple[list[int], list[float]]:
        """n likeliest tokens and their log-probabilities, whatever they are."""
        tokens, logprobs = list(prompt), []
        for _ in range(n):
            logits = self.next_logits(tokens, len(prompt), edits)
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(0)[tokens[-1]]))
        return tokens[len(prompt) :], logprobs

    def _module(self, site: str) -> torch.nn.Module:
        layer, location = site.split(".")
        block = self.model.transformer.h[int(layer)]
        return {"resid_post_mlp": block, "mlp_post_act": block.mlp.act, "resid_delta_attn": block.attn}[location]

    def _hook(self, edits: Sequence[Edit], prompt_length: int):
        def hook(module: torch.nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]):
            h = output[0] if isinstance(output, tuple) else output
            edited = h.clone()
            for edit in edits:
                dictionary = self.dictionaries[edit.dictionary]
                for t in range(h.shape[1]):
                    if _covers(edit, t, prompt_length):
                        edited[0, t] += _delta(dictionary, edit, h[0, t])
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook


def _covers(edit: Edit, position: int, prompt_length: int) -> bool:
    match edit.positions:
        case "all":
            return True
        case "prompt":
            return position < prompt_length
        case "generated":
            return position >= prompt_length
        case explicit:
            return position in explicit


def _delta(dictionary: Dictionary, edit: Edit, h: Tensor) -> Tensor:
    """What one edit adds to one token's activation h [d], from the equations in autoencoder.py and interventions.py."""
    std = torch.tensor(1.0)
    x = h
    if dictionary.normalizes_input:
        std = h.std()
        x = (h - h.mean()) / (std + 1e-5)
    z = dictionary.encoder @ (x - dictionary.pre_bias) + dictionary.latent_bias
    if dictionary.k is not None:
        kept = z.topk(dictionary.k).indices
        z = torch.zeros_like(z).index_copy(0, kept, z[kept])
    z = z.relu()
    old = z[edit.feature]
    statistics = dictionary.statistics
    assert statistics is not None
    unit = statistics.max[edit.feature] if edit.unit == "max" else torch.tensor(1.0)
    match edit.operation:
        case "set":
            new = edit.value * unit
        case "add":
            new = old + edit.value * unit
        case "scale":
            new = edit.value * old
        case "clamp":
            low = -torch.inf if edit.minimum is None else edit.minimum * unit
            high = torch.inf if edit.maximum is None else edit.maximum * unit
            new = torch.clamp(old, torch.as_tensor(low), torch.as_tensor(high))
        case "ablate_zero":
            new = torch.tensor(0.0)
        case "ablate_mean":
            new = statistics.mean[edit.feature]
    return std * (new - old) * dictionary.decoder[edit.feature]
