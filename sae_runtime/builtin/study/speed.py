"""The speed of the study's ablations: with the prefix that variants share, and with a whole forward for each."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
import torch.nn.functional as F

from sae_runtime.builtin.study.measure import TOKENS_PER_BATCH, Study
from sae_runtime.builtin.study.tables import table_head, table_row
from sae_runtime.builtin.study.texts import WINDOW, Row
from sae_runtime.causal.ablation import (
    AblationStudy,
    in_batches,
    strongest_features,
    total_activation,
)
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import BatchEdits, BatchRow, Edit, RowEdits
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens


def speed(
    backbone: Backbone, dictionaries: Mapping[str, Dictionary], rows: Sequence[Row], n_features: int = 24
) -> tuple[int, float, float]:
    """Number of variants of an ablation study, seconds one by one (a whole forward each), and seconds of the study.

    One by one is what there would be without a shared prefix: every variant by itself from the embedding on, its loss,
    and its KL from the unedited predictions, which are computed once a row.
    """
    features = strongest_features(total_activation(backbone, dictionaries, rows), n_features)
    began = time.perf_counter()
    study = AblationStudy(backbone, dictionaries, rows, features)
    for batch in in_batches(study.variants, TOKENS_PER_BATCH):
        study.run(batch)
    together = time.perf_counter() - began
    began = time.perf_counter()
    unedited = [_log_probabilities(backbone, row, [], dictionaries) for row in rows]
    for variant in study.variants:
        feature, row = features[variant.feature], rows[variant.row]
        edits = [Edit(feature.dictionary, feature.feature, "ablate_zero")]
        edited = _log_probabilities(backbone, row, edits, dictionaries)
        F.nll_loss(edited[:-1], torch.tensor(row[1:]))
        F.kl_div(edited, unedited[variant.row], reduction="none", log_target=True).sum(-1)
    return len(study.variants), time.perf_counter() - began, together


@torch.no_grad()
def _log_probabilities(
    backbone: Backbone, row: Row, edits: Sequence[Edit], dictionaries: Mapping[str, Dictionary]
) -> torch.Tensor:
    """Log probabilities [T, vocab] of the next token after each token of the row, from one whole forward."""
    batch = BatchEdits([BatchRow(RowEdits(edits, dictionaries, len(row)), 0, len(row), row)])
    packed = PackedTokens.from_rows([row])
    logits = backbone.forward(packed, edit=batch.apply, edit_sites=batch.sites, logits="all").logits
    assert logits is not None
    return logits.log_softmax(-1)


def speed_table(study: Study, rounds: int = 3) -> str:
    """Medians over rounds. Every round measures both ways, one after the other."""
    rows = study.texts.others()[:24]
    generator = random.Random(study.seed)
    large = Backbone.random_gpt2_small(study.seed)
    large_rows = [[generator.randrange(large.vocab_size) for _ in range(WINDOW)] for _ in range(4)]
    cases: list[tuple[Backbone, str, Dictionary, Sequence[Row], int]] = [
        (study.backbone, f"builtin, {name}", study.dictionaries[name], rows, 24)
        for name in ("resid-mid", "mlp-mid", "resid-late")
    ]
    cases.append((large, "GPT-2 small's shape, 32,768 latents", _random_dictionary(large, study.seed), large_rows, 8))
    lines = table_head("model and dictionary", "site", "variants", "one by one", "shared and batched", "ratio")
    for backbone, name, dictionary, texts, n_features in cases:
        measurements = [speed(backbone, {"dictionary": dictionary}, texts, n_features) for _ in range(rounds)]
        alone, together = (
            median(seconds for _, seconds, _ in measurements),
            median(seconds for _, _, seconds in measurements),
        )
        ratios = sorted(one_by_one / shared for _, one_by_one, shared in measurements)
        lines.append(
            table_row(
                [
                    name,
                    f"{dictionary.site}",
                    f"{measurements[0][0]}",
                    f"{alone:.2f} s",
                    f"{together:.2f} s",
                    f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                ]
            )
        )
    return "\n".join(lines)


def _random_dictionary(backbone: Backbone, seed: int) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.nn.functional.normalize(torch.randn(32_768, backbone.d_model, generator=generator), dim=1)
    return Dictionary(
        encoder=encoder,
        decoder=encoder,
        pre_bias=torch.zeros(backbone.d_model),
        latent_bias=torch.zeros(len(encoder)),
        activation="topk",
        k=32,
        normalization="layer_norm",
        site="8.resid_post_mlp",
    )
