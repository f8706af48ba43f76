"""The streamed table against a search over all dense activations."""

import random

import pytest
import torch
import torch.nn.functional as F

from sae_runtime import Backbone, Site
from sae_runtime.data.documents import Document
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.evaluation.top_contexts import top_contexts
from sae_runtime.model.packed import PackedTokens


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    generator = random.Random(0)
    lengths = [0, 3, 100, *(generator.randint(1, 60) for _ in range(30)), 0]
    return [Document("".join(generator.choices("abcdefgh ", k=n)), f"kind {i % 3}") for i, n in enumerate(lengths)]


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("tokens_per_pass", [64, 10_000])
def test_they_are_the_strongest_of_all(
    tiny_backbone: Backbone, documents: list[Document], activation: str, tokens_per_pass: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    decoder = F.normalize(torch.randn(24, 16, generator=generator), dim=1)
    dictionary = Dictionary(
        encoder=decoder,
        decoder=decoder,
        pre_bias=torch.zeros(16),
        latent_bias=torch.cat([torch.zeros(23), torch.tensor([-1e6])]),
        activation=activation,  # type: ignore[arg-type]
        k=5 if activation == "topk" else None,
        normalization="layer_norm",
        site="1.resid_post_mlp",
    )
    n_contexts, window = 3, 4
    found = top_contexts(tiny_backbone, dictionary, documents, n_contexts, window, tokens_per_pass=tokens_per_pass)
    assert len(found) == 24
    assert found[23] == []

    dense = []  # per document, [tokens, latents]
    for document in documents:
        ids = [] if not document.text else tiny_backbone.encode_text(document.text).ids
        rows = [ids[start : start + 32] for start in range(0, len(ids), 32)]
        site = Site.parse("1.resid_post_mlp")
        chunks = [tiny_backbone.forward(PackedTokens.from_rows([r]), capture=[site]).activations[site] for r in rows]
        dense.append(torch.cat([dictionary.encode_dense(c) for c in chunks]) if chunks else torch.zeros(0, 24))
    for latent in range(24):
        peaks = sorted((float(z[:, latent].max()), i) for i, z in enumerate(dense) if len(z) and z[:, latent].max() > 0)
        expected = peaks[::-1][:n_contexts]
        contexts = found[latent]
        assert [c.value for c in contexts] == pytest.approx([value for value, _ in expected], rel=1e-4)
        assert len({c.document for c in contexts}) == len(contexts)
        for c in contexts:
            text, z = documents[c.document].text, dense[c.document][:, latent]
            first, last = max(0, c.position - window), min(len(text), c.position + window + 1)
            assert z[c.position] == pytest.approx(c.value, rel=1e-4)
            assert c.kind == documents[c.document].kind
            assert "".join(c.tokens) == text[first:last]  # tokens are single bytes here
            assert c.tokens[c.peak] == text[c.position]
            assert list(c.activations) == pytest.approx(z[first:last].tolist(), rel=1e-3, abs=1e-5)


def test_a_dictionary_without_a_site(tiny_backbone: Backbone) -> None:
    eye = torch.eye(16)
    dictionary = Dictionary(
        encoder=eye, decoder=eye, pre_bias=torch.zeros(16), latent_bias=torch.zeros(16), activation="relu"
    )
    with pytest.raises(ValueError, match="which site"):
        top_contexts(tiny_backbone, dictionary, [])
