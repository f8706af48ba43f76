"""Held-out figures of a dictionary: reconstruction, sparsity, and what splicing it into the model costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site

LOGIT_TOKENS = 2_048
"""Tokens whose logits exist at once; a vocabulary of 50,257 then takes 400 MB."""


@dataclass(frozen=True)
class DictionaryEvaluation:
    """Figures over `n_tokens` tokens of held-out text."""

    nmse: float
    """Mean squared error over that of always predicting the mean activation (Gao et al. 2024)."""
    relative_error: float
    """Σ(x̂ - x)² / Σx² over all tokens (README of openai/sparse_autoencoder)."""
    nmse_normalized: float
    """As nmse, but on layer-normalised activations, where every token counts the same; nmse if not normalised."""
    l0: float
    """Active latents per token."""
    dead_fraction: float
    """Share of latents that are active on none of the n_tokens tokens."""
    dense_fraction: float
    """Share of latents that are active on more than a tenth of the tokens."""
    ce_clean: float
    """Next-token cross-entropy of the backbone, nats per token."""
    ce_spliced: float
    """The same with the dictionary's reconstruction in place of the activation."""
    ce_ablated: float
    """The same with zeros in place of the activation."""
    loss_recovered: float
    """(ce_ablated - ce_spliced) / (ce_ablated - ce_clean); the ablation is to zero."""
    n_tokens: int
    firing_rate: Tensor = field(repr=False)
    """[n_latents], share of tokens on which each latent is active."""

    def figures(self) -> dict[str, float]:
        """The numbers, as a manifest records them."""
        return {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "firing_rate"}


@torch.no_grad()
def evaluate_dictionary(
    backbone: Backbone,
    dictionary: Dictionary,
    rows: Iterable[Sequence[int]],
    *,
    site: Site | None = None,
    tokens_per_pass: int = LOGIT_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> DictionaryEvaluation:
    """Measures a dictionary on rows of token ids, each at most the backbone's context length.

    Args:
        site: where it is spliced in; the dictionary's own site if not given.
        tokens_per_pass: most tokens in a forward pass, but at least one row.
        progress: called with the number of tokens done.

    Raises:
        ValueError: no site is known, or there are no rows with at least two tokens.
    """
    if site is None:
        if dictionary.site is None:
            raise ValueError("the dictionary does not say which site it belongs to; pass `site`")
        site = Site.parse(dictionary.site)
    raw, normalized = _Reconstruction(dictionary.d_in), _Reconstruction(dictionary.d_in)
    fired = torch.zeros(dictionary.n_latents, dtype=torch.int64)
    losses = {"clean": 0.0, "spliced": 0.0, "ablated": 0.0}
    n_predictions = 0
    for packed in packed_passes(rows, tokens_per_pass):
        clean = backbone.forward(packed, capture=[site], logits="all")
        x = clean.activations[site].float()
        features = dictionary.encode(x)
        reconstruction = dictionary.decode(features).float()
        raw.add(x, reconstruction)
        if (statistics := features.input_statistics) is not None:
            mean, std = statistics.mean, statistics.std.clamp_min(1e-12)
            normalized.add((x - mean) / std, (reconstruction - mean) / std)
        fired += torch.bincount(features.indices[features.indices >= 0].cpu(), minlength=dictionary.n_latents)

        spliced = backbone.forward(packed, edit=_replace_with(reconstruction), edit_sites=[site], logits="all")
        ablated = backbone.forward(packed, edit=_replace_with(torch.zeros_like(x)), edit_sites=[site], logits="all")
        for name, result in (("clean", clean), ("spliced", spliced), ("ablated", ablated)):
            assert result.logits is not None
            losses[name] += summed_next_token_loss(result.logits, packed)
        n_predictions += len(packed) - len(packed.lengths)
        if progress is not None:
            progress(raw.n_tokens)
    if n_predictions == 0:
        raise ValueError("evaluation needs at least one row of two tokens or more")
    n_tokens = raw.n_tokens
    clean_ce, spliced_ce, ablated_ce = (losses[name] / n_predictions for name in ("clean", "spliced", "ablated"))
    return DictionaryEvaluation(
        nmse=raw.nmse(),
        relative_error=raw.relative_error(),
        nmse_normalized=normalized.nmse() if dictionary.normalizes_input else raw.nmse(),
        l0=float(fired.sum()) / n_tokens,
        dead_fraction=float((fired == 0).double().mean()),
        dense_fraction=float((fired > 0.1 * n_tokens).double().mean()),
        ce_clean=clean_ce,
        ce_spliced=spliced_ce,
        ce_ablated=ablated_ce,
        loss_recovered=(ablated_ce - spliced_ce) / (ablated_ce - clean_ce),
        n_tokens=n_tokens,
        firing_rate=(fired.double() / n_tokens).float(),
    )


def packed_passes(rows: Iterable[Sequence[int]], tokens_per_pass: int) -> Iterator[PackedTokens]:
    """Rows in their order, as many in a pass as stay within `tokens_per_pass` tokens (at least one)."""
    batch: list[Sequence[int]] = []
    size = 0
    for row in rows:
        if batch and size + len(row) > tokens_per_pass:
            yield PackedTokens.from_rows(batch)
            batch, size = [], 0
        batch.append(row)
        size += len(row)
    if batch:
        yield PackedTokens.from_rows(batch)


def summed_next_token_loss(logits: Tensor, packed: PackedTokens) -> float:
    """Sum of the cross-entropies of every row's tokens but its first, in nats; logits [N, vocab]."""
    targets = packed.ids.roll(-1).to(logits.device)
    targets[packed.row_ends.to(logits.device)] = -100  # a row's last token predicts nothing that is known
    return float(F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum"))


def take_tokens(rows: Iterable[list[int]], n_tokens: int) -> Iterator[list[int]]:
    """Rows until at least `n_tokens` tokens were given."""
    taken = 0
    for row in islice(rows, n_tokens):
        yield row
        taken += len(row)
        if taken >= n_tokens:
            return


def _replace_with(replacement: Tensor) -> Callable[[Site, Tensor], Tensor]:
    return lambda site, x: replacement.to(x)


class _Reconstruction:
    """Sums behind the reconstruction errors, in float64."""

    def __init__(self, width: int) -> None:
        self.n_tokens = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._sum_of_squares = 0.0
        self._error = 0.0

    def add(self, x: Tensor, reconstruction: Tensor) -> None:
        wide = x.double().cpu()
        self.n_tokens += len(x)
        self._sum += wide.sum(0)
        self._sum_of_squares += float(wide.square().sum())
        self._error += float((reconstruction.double().cpu() - wide).square().sum())

    def nmse(self) -> float:
        """Error over Σ‖x - mean‖², the mean taken over all tokens seen."""
        return self._error / (self._sum_of_squares - float(self._sum.square().sum()) / self.n_tokens)

    def relative_error(self) -> float:
        return self._error / self._sum_of_squares
