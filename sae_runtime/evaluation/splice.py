"""What replacing activations by reconstructions costs the model, token by token.

Every token of a row is replaced at once (`splice_tokens`), or one token of a row alone (`splice_single_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import InputStatistics
from sae_runtime.evaluation.density import DensityCounter
from sae_runtime.evaluation.dictionary_evaluation import packed_passes
from sae_runtime.evaluation.intervals import generator
from sae_runtime.evaluation.progress import StageProgress
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site

Array = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 256  # of the vocabulary's width, for what is needed only for a moment
Reconstruct = Callable[[Tensor, InputStatistics | None], Tensor]
"""Activations [N, d] and the dictionary's input statistics of them -> what replaces them, [N, d]."""


@dataclass(frozen=True, eq=False)
class SplicedTokens:
    """Figures of each token, in the order of the rows; float64 [N]."""

    cross_entropy: dict[str, Array]
    """By replacement ("clean" is none), nats that predicting the next token costs; NaN at the last token of a row."""
    divergence: dict[str, Array]
    """By replacement, KL(clean ‖ replaced) of the next-token distributions, nats."""
    error: dict[str, Array]
    """By replacement but "zero", |x̂ - x|²."""
    deviation: Array
    """|x - mean|²."""
    square: Array
    """|x|²."""
    inner_error: Array
    """|x̂' - x'|² of the dictionary, x' being x as the dictionary normalises it."""
    inner_deviation: Array
    """|x' - mean'|²."""
    residual: Array
    """Σ (x̂ - x) over the tokens, [d]."""
    density: DensityCounter
    """How many latents fire on each token, and on how many of the tokens each latent fires."""

    @property
    def predicts(self) -> npt.NDArray[np.bool_]:
        """[N], whether a token has a next one in its row."""
        return ~np.isnan(self.cross_entropy["clean"])


@torch.no_grad()
def splice_tokens(
    backbone: Backbone,
    dictionary: Dictionary,
    site: Site,
    rows: Sequence[Sequence[int]],
    *,
    mean: Tensor,
    inner_mean: Tensor,
    baselines: Mapping[str, Reconstruct] | None = None,
    baseline_rows: int = 0,
    tokens_per_pass: int = 2_048,
    progress: StageProgress | None = None,
) -> SplicedTokens:
    """Splices the dictionary ("spliced"), zeros ("zero") and, in the first passes, the baselines.

    Args:
        mean: [d] float64, what the deviation is taken from.
        inner_mean: the same of the activations as the dictionary normalises them.
        baselines: by name. Measured in the passes that begin within the first `baseline_rows` rows; NaN in the others.
    """
    baselines = baselines or {}
    names = ["spliced", "zero", *baselines]
    ce: dict[str, list[Tensor]] = {name: [] for name in ("clean", *names)}
    kl: dict[str, list[Tensor]] = {name: [] for name in names}
    error: dict[str, list[Tensor]] = {name: [] for name in names if name != "zero"}
    others: dict[str, list[Tensor]] = {name: [] for name in ("deviation", "square", "inner_error", "inner_deviation")}
    residual = torch.zeros(dictionary.d_in, dtype=torch.float64)
    density = DensityCounter(dictionary.n_latents)
    n_tokens = n_rows = 0
    for packed in packed_passes(rows, tokens_per_pass):
        clean = backbone.forward(packed, capture=[site], logits="all")
        x = clean.activations[site].float()
        assert clean.logits is not None
        log_clean = clean.logits.float().log_softmax(-1)  # [N, vocab]
        ce["clean"].append(_next_token_loss(log_clean, packed))
        features = dictionary.encode(x)
        density.add(features)
        statistics = features.input_statistics
        reconstruction = dictionary.decode(features).float()
        wide = x.double().cpu()
        difference = reconstruction.double().cpu() - wide
        residual += difference.sum(0)
        others["deviation"].append((wide - mean).square().sum(1))
        others["square"].append(wide.square().sum(1))
        if statistics is None:
            others["inner_error"].append(difference.square().sum(1))
            others["inner_deviation"].append((wide - inner_mean).square().sum(1))
        else:
            std = statistics.std.double().cpu().clamp_min(1e-12)
            inner = (wide - statistics.mean.double().cpu()) / std
            others["inner_error"].append((difference / std).square().sum(1))
            others["inner_deviation"].append((inner - inner_mean).square().sum(1))
        for name in names:
            if name in baselines and n_rows >= baseline_rows:
                absent = torch.full((len(x),), torch.nan, dtype=torch.float64)
                for table in (ce, kl, error):
                    table[name].append(absent)
                continue
            if name == "spliced":
                replacement = reconstruction
            elif name == "zero":
                replacement = torch.zeros_like(x)
            else:
                replacement = baselines[name](x, statistics)
            if name != "zero":
                error[name].append((replacement.double().cpu() - wide).square().sum(1))
            log_replaced = _log_probabilities(backbone, packed, site, replacement)
            ce[name].append(_next_token_loss(log_replaced, packed))
            kl[name].append(_divergence(log_clean, log_replaced))
        n_tokens += len(packed)
        n_rows += len(packed.lengths)
        if progress is not None:
            progress.reach(n_tokens)
    return SplicedTokens(
        cross_entropy={name: _array(parts) for name, parts in ce.items()},
        divergence={name: _array(parts) for name, parts in kl.items()},
        error={name: _array(parts) for name, parts in error.items()},
        residual=residual.numpy(),
        density=density,
        **{name: _array(parts) for name, parts in others.items()},
    )


@dataclass(frozen=True, eq=False)
class SingleSplices:
    """Rows in which one token's activation was replaced; float64 [n]."""

    delta_ce: Array
    """Change of the loss of predicting the token after it, nats."""
    divergence: Array
    """KL(clean ‖ spliced) at that token, nats."""
    later_divergence: Array
    """Mean of the same over the later tokens of the window."""


@torch.no_grad()
def splice_single_tokens(
    backbone: Backbone,
    dictionary: Dictionary,
    site: Site,
    windows: Sequence[Sequence[int]],
    position: int,
    *,
    tokens_per_pass: int = 2_048,
    progress: StageProgress | None = None,
) -> SingleSplices:
    """Replaces the activation at `position` of each window and no other. All are of one length, over `position`."""
    delta, divergence, later = [], [], []
    for packed in packed_passes(windows, tokens_per_pass):
        length = packed.lengths[0]
        at = packed.row_ends - (length - 1 - position)  # [B] tokens
        clean = backbone.forward(packed, capture=[site], logits="all")
        x = clean.activations[site]
        assert clean.logits is not None
        replaced = x.clone()
        replaced[at] = dictionary.decode(dictionary.encode(x[at].float())).to(x)
        log_clean = clean.logits.float().log_softmax(-1)
        log_spliced = _log_probabilities(backbone, packed, site, replaced)
        loss = _next_token_loss(log_spliced, packed) - _next_token_loss(log_clean, packed)
        kl = _divergence(log_clean, log_spliced).view(-1, length)
        delta.append(loss.view(-1, length)[:, position])
        divergence.append(kl[:, position])
        later.append(kl[:, position + 1 :].mean(1))
        if progress is not None:
            progress.reach(sum(map(len, delta)))
    return SingleSplices(_array(delta), _array(divergence), _array(later))


def choose_windows(
    rows: Sequence[Sequence[int]], length: int, n_windows: int, seed: int, purpose: str
) -> list[list[int]]:
    """The beginnings, `length` tokens long, of rows drawn without repeats; fewer where too few rows are that long."""
    fitting = [i for i, row in enumerate(rows) if len(row) >= length]
    drawn = generator(seed, purpose).permutation(len(fitting))[:n_windows]
    return [list(rows[fitting[i]][:length]) for i in sorted(drawn.tolist())]


def _log_probabilities(backbone: Backbone, packed: PackedTokens, site: Site, replacement: Tensor) -> Tensor:
    result = backbone.forward(packed, edit=lambda _, x: replacement.to(x), edit_sites=[site], logits="all")
    assert result.logits is not None
    return result.logits.float().log_softmax(-1)


def _next_token_loss(log_probabilities: Tensor, packed: PackedTokens) -> Tensor:
    """Nats [N] that each token's successor costs; NaN at the last token of a row."""
    targets = packed.ids.roll(-1).to(log_probabilities.device)
    loss = F.nll_loss(log_probabilities, targets, reduction="none").double()
    loss[packed.row_ends.to(loss.device)] = torch.nan
    return loss.cpu()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row [N], nats; never below 0, which rounding could bring about."""
    parts = [
        (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
        for p, q in zip(log_p.split(_ROWS_AT_ONCE), log_q.split(_ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).clamp_min(0).cpu()


def _array(parts: list[Tensor]) -> Array:
    return torch.cat(parts).numpy() if parts else np.zeros(0)
