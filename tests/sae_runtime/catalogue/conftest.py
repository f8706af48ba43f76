"""A corpus of all kinds of documents, a dictionary, and what plain loops over single documents find in them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from sae_runtime import Backbone
from sae_runtime.catalogue.collect import Collection, collect
from sae_runtime.catalogue.neighbors import companions, nearest_latents
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.catalogue.text import TextReader
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.statistics import LatentStatisticsBuilder
from sae_runtime.model.packed import PackedTokens
from sae_runtime.progress import ProgressMeter

Array = npt.NDArray[Any]
N_LATENTS = 24
SITE = "0.resid_post_mlp"
CONTEXT_LENGTH = 32


@dataclass(frozen=True, eq=False)
class ReferenceToken:
    """One token of the corpus as a plain loop sees it."""

    document: int
    position_in_document: int
    position: int
    id: int
    z: Array
    """[N_LATENTS]."""


@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    generator = random.Random(0)
    lengths = [3, 100, 0, 1, 33, 64, *(generator.randint(1, 70) for _ in range(34))]
    texts = ["".join(generator.choices("abcdefgh é—", k=n)) for n in lengths]
    languages = [{"lang": "en"}, {"lang": "de"}, {}]
    return [{"text": t, "kind": f"kind {i % 3}", **languages[i % 3]} for i, t in enumerate(texts)]


@pytest.fixture(scope="session")
def corpus(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session", params=["topk", "relu"])
def dictionary(request: pytest.FixtureRequest, tiny_backbone: Backbone, records: list[dict[str, Any]]) -> Dictionary:
    """Its last latent never fires; statistics are of other text."""
    generator = torch.Generator().manual_seed(1)
    encoder = F.normalize(torch.randn(N_LATENTS, 16, generator=generator), dim=1)
    return with_statistics(
        Dictionary(
            encoder=encoder,
            decoder=F.normalize(encoder + 0.3 * torch.randn(N_LATENTS, 16, generator=generator), dim=1),
            pre_bias=torch.zeros(16),
            latent_bias=torch.cat([torch.zeros(N_LATENTS - 1), torch.tensor([-1e6])]),
            activation=request.param,
            k=5 if request.param == "topk" else None,
            normalization="layer_norm",
            site=SITE,
            name="tiny",
        ),
        tiny_backbone,
    )


def with_statistics(dictionary: Dictionary, backbone: Backbone) -> Dictionary:
    builder = LatentStatisticsBuilder(dictionary.n_latents)
    rows = torch.randint(1, 257, (20, 16), generator=torch.Generator().manual_seed(2)).tolist()
    x = backbone.forward(PackedTokens.from_rows(rows), capture=[SITE]).activations
    builder.add(dictionary.encode(next(iter(x.values()))))
    return replace(dictionary, statistics=builder.build())


@pytest.fixture(scope="session")
def reference(tiny_backbone: Backbone, dictionary: Dictionary, records: list[dict[str, Any]]) -> list[ReferenceToken]:
    """Every token of the corpus, in order, each row of each document run by itself."""
    tokens = []
    for number, record in enumerate(records):
        ids = tiny_backbone.encode_text(record["text"]).ids if record["text"] else []
        for start in range(0, len(ids), CONTEXT_LENGTH):
            row = ids[start : start + CONTEXT_LENGTH]
            if len(row) > 1:
                x = tiny_backbone.forward(PackedTokens.from_rows([row]), capture=[SITE]).activations
                z = dictionary.encode_dense(next(iter(x.values()))).numpy()
                tokens += [ReferenceToken(number, start + i, i, row[i], z[i]) for i in range(len(row))]
    return tokens


@pytest.fixture
def settings(corpus: Path) -> CatalogueSettings:
    return CatalogueSettings(
        data=(str(corpus),),
        context_length=CONTEXT_LENGTH,
        prepend_end_of_text=False,
        tokens_per_pass=64,
        strongest=3,
        shown_strongest=3,
        quantile_contexts=2,
        random_contexts=4,
        tokens_before=4,
        tokens_after=3,
        neighbors=3,
        sample_tokens=200,
        effect_contexts=2,
        effect_window=12,
    )


Collect = Callable[..., Collection]


@pytest.fixture
def collected(tiny_backbone: Backbone, dictionary: Dictionary, settings: CatalogueSettings, tmp_path: Path) -> Collect:
    """Runs the pass over the text, with some settings changed."""
    files: Iterator[int] = iter(range(1000))

    def run(**changes: Any) -> Collection:
        s = settings.model_copy(update=changes)
        near = companions(*nearest_latents(dictionary.decoder, None, s.neighbors))
        assert dictionary.statistics is not None
        collection = Collection(tiny_backbone, dictionary, dictionary.statistics, near, s)
        checkpoint = tmp_path / f"{next(files)}.partial"
        reader = TextReader.open(tiny_backbone, s)
        collect(collection, tiny_backbone, dictionary, reader, checkpoint, {}, ProgressMeter())
        return collection

    return run


def activations(reference: list[ReferenceToken]) -> Array:
    """[tokens, N_LATENTS]."""
    return np.stack([token.z for token in reference])
