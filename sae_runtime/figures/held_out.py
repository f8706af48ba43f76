"""Held-out figures of a dictionary: reconstruction, sparsity, and what splicing it into the model costs.

For activations x of a site, x̂ = decode(encode(x)), and the means over all tokens:

    nmse           = Σ|x̂ - x|² / Σ|x - mean|²                                       (Gao et al. 2024)
    loss_recovered = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)

where the model's cross-entropy is ce_spliced with x̂ in place of x at every token, and ce_ablated with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.data.rows import packed_passes
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import InputStatistics
from sae_runtime.figures.density import DENSE, DensityCounter
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressMeter

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Reconstruct = Callable[[Tensor, InputStatistics | None], Tensor]
"""Activations [N, d] and the dictionary's input statistics of them -> what replaces them, [N, d]."""

LOGIT_TOKENS = 2_048
"""Tokens whose logits exist at once; a vocabulary of 50,257 then takes 400 MB."""
_ROWS_AT_ONCE = 256  # of the vocabulary's width, for what is needed only for a moment


@dataclass(frozen=True, eq=False)
class SplicedTokens:
    """Figures of each token, in the order of the rows; float64 [N]."""

    cross_entropy: dict[str, Array]
    """By replacement ("clean" is none), loss of the next token, nats; NaN at the last token of a row."""
    divergence: dict[str, Array]
    """By replacement, KL(clean ‖ replaced) of the next-token distributions, nats."""
    error: dict[str, Array]
    """By replacement but "zero", |x̂ - x|²."""
    square: Array
    """|x|²."""
    deviation: Array
    """|x - centre|²."""
    inner_error: Array
    """|x̂' - x'|² of the dictionary, x' being x as the dictionary normalises it."""
    inner_deviation: Array
    """|x' - centre'|²."""
    residual: Array
    """Σ (x̂ - x) over the tokens, [d]."""
    offset: Array
    """Σ (x - centre) over the tokens, [d]; 0 where the centre is their mean."""
    inner_offset: Array
    """The same of x'."""
    density: DensityCounter
    """How many latents fire on each token, and on how many of the tokens each latent fires."""

    @property
    def n_tokens(self) -> int:
        return len(self.square)

    @property
    def predicts(self) -> Mask:
        """[N], whether a token has a next one in its row."""
        return ~np.isnan(self.cross_entropy["clean"])

    def figures(self) -> dict[str, Any]:
        """The figures over all tokens, by the names in evaluation.json; None where one is undefined."""
        n = self.n_tokens
        error = self.error["spliced"].sum()
        deviation = _around_mean(self.deviation, self.offset)
        figures = {
            "n_tokens": n,
            "nmse": _ratio(error, deviation),
            "relative_error": _ratio(error, self.square.sum()),
            "nmse_normalized": _ratio(self.inner_error.sum(), _around_mean(self.inner_deviation, self.inner_offset)),
            "l0": self.density.l0.mean(),
            "dead_fraction": (self.density.fired == 0).mean(),
            "dense_fraction": (self.density.fired > DENSE * n).mean(),
            # Centred residuals: the cost of a constant offset counts in the NMSE, not here.
            "variance_explained": 1 - _ratio(error - np.square(self.residual).sum() / n, deviation),
            **self.losses(np.ones(n, bool)),
        }
        return plain(figures)

    def losses(self, kept: Mask, name: str = "spliced") -> dict[str, float]:
        """Cross-entropies and divergence of a replacement over the tokens of a mask [N]; NaN without a prediction."""
        kept = kept & self.predicts
        if not kept.any():
            return dict.fromkeys(("ce_clean", "ce_spliced", "ce_ablated", "delta_ce", "loss_recovered", "kl"), np.nan)
        clean, spliced, zero = (float(self.cross_entropy[key][kept].mean()) for key in ("clean", name, "zero"))
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_ablated": zero,
            "delta_ce": spliced - clean,
            "loss_recovered": _ratio(zero - spliced, zero - clean),
            "kl": float(self.divergence[name][kept].mean()),
        }


@torch.no_grad()
def splice_tokens(
    backbone: Backbone,
    dictionary: Dictionary,
    site: Site,
    rows: Iterable[Sequence[int]],
    *,
    mean: Tensor | None = None,
    inner_mean: Tensor | None = None,
    baselines: Mapping[str, Reconstruct] | None = None,
    baseline_rows: int = 0,
    tokens_per_pass: int = LOGIT_TOKENS,
    progress: ProgressMeter | None = None,
) -> SplicedTokens:
    """Splices the dictionary ("spliced"), zeros ("zero") and, in the first passes, the baselines.

    Args:
        mean: [d] float64, the centre that deviations are taken from; zero if not given, which is enough for the figures
            over all tokens: Σ|x - mean|² = Σ|x - centre|² - |Σ(x - centre)|² / N.
        inner_mean: the same of the activations as the dictionary normalises them.
        baselines: by name. Measured in the passes that begin within the first `baseline_rows` rows; NaN in the others.
        tokens_per_pass: most tokens in a forward pass, but at least one row.
    """
    baselines = baselines or {}
    names = ["spliced", "zero", *baselines]
    ce: dict[str, list[Tensor]] = {name: [] for name in ("clean", *names)}
    kl: dict[str, list[Tensor]] = {name: [] for name in names}
    error: dict[str, list[Tensor]] = {name: [] for name in names if name != "zero"}
    others: dict[str, list[Tensor]] = {name: [] for name in ("deviation", "square", "inner_error", "inner_deviation")}
    residual, offset, inner_offset = torch.zeros(3, dictionary.d_in, dtype=torch.float64)
    centre = torch.zeros_like(offset) if mean is None else mean
    inner_centre = torch.zeros_like(offset) if inner_mean is None else inner_mean
    density = DensityCounter(dictionary.n_latents)
    n_rows = 0
    for packed in packed_passes(rows, tokens_per_pass):
        clean = backbone.forward(packed, capture=[site], logits="all")
        x = clean.activations[site].float()
        assert clean.logits is not None
        log_clean = clean.logits.float().log_softmax(-1)  # [N, vocab]
        del clean
        ce["clean"].append(next_token_loss(log_clean, packed))
        features = dictionary.encode(x)
        density.add(features)
        statistics = features.input_statistics
        reconstruction = dictionary.decode(features).float()
        wide = x.double().cpu()
        difference = inner_difference = reconstruction.double().cpu() - wide
        inner = wide
        if statistics is not None:
            std = statistics.std.double().cpu().clamp_min(1e-12)
            inner, inner_difference = (wide - statistics.mean.double().cpu()) / std, difference / std
        residual += difference.sum(0)
        offset += (wide - centre).sum(0)
        inner_offset += (inner - inner_centre).sum(0)
        others["square"].append(wide.square().sum(1))
        others["deviation"].append((wide - centre).square().sum(1))
        others["inner_error"].append(inner_difference.square().sum(1))
        others["inner_deviation"].append((inner - inner_centre).square().sum(1))
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
            log_replaced = log_probabilities(backbone, packed, site, replacement)
            ce[name].append(next_token_loss(log_replaced, packed))
            kl[name].append(divergence(log_clean, log_replaced))
        n_rows += len(packed.lengths)
        if progress is not None:
            progress.reach(density.n_tokens)
    return SplicedTokens(
        cross_entropy={name: joined(passes) for name, passes in ce.items()},
        divergence={name: joined(passes) for name, passes in kl.items()},
        error={name: joined(passes) for name, passes in error.items()},
        residual=residual.numpy(),
        offset=offset.numpy(),
        inner_offset=inner_offset.numpy(),
        density=density,
        **{name: joined(passes) for name, passes in others.items()},
    )


def held_out_figures(
    backbone: Backbone,
    dictionary: Dictionary,
    rows: Iterable[Sequence[int]],
    *,
    tokens_per_pass: int = LOGIT_TOKENS,
    progress: ProgressMeter | None = None,
) -> dict[str, float]:
    """The figures that a dictionary is published with, on rows of token ids; without those that are undefined.

    Raises:
        ValueError: the dictionary's site is not known, or there are no rows with at least two tokens.
    """
    site = dictionary.site_in(backbone)
    tokens = splice_tokens(backbone, dictionary, site, rows, tokens_per_pass=tokens_per_pass, progress=progress)
    if not tokens.predicts.any():
        raise ValueError("held-out figures need at least one row of two tokens or more")
    return {name: float(value) for name, value in tokens.figures().items() if value is not None}


def log_probabilities(backbone: Backbone, packed: PackedTokens, site: Site, replacement: Tensor) -> Tensor:
    """Log probabilities [N, vocab] of the next token, with `replacement` [N, d] in place of the site's activations."""
    result = backbone.forward(packed, edit=lambda _, x: replacement.to(x), edit_sites=[site], logits="all")
    assert result.logits is not None
    return result.logits.float().log_softmax(-1)


def next_token_loss(log_probabilities: Tensor, packed: PackedTokens) -> Tensor:
    """Loss [N] of each token's successor, nats; NaN at the last token of a row."""
    targets = packed.ids.roll(-1).to(log_probabilities.device)
    loss = F.nll_loss(log_probabilities, targets, reduction="none").double()
    loss[packed.row_ends.to(loss.device)] = torch.nan
    return loss.cpu()


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row [N], nats. Negative values, from rounding, become 0."""
    chunks = [
        (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
        for p, q in zip(log_p.split(_ROWS_AT_ONCE), log_q.split(_ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(chunks).clamp_min(0).cpu()


def joined(passes: list[Tensor]) -> Array:
    """The tensors [n] of all passes as one array."""
    return torch.cat(passes).numpy() if passes else np.zeros(0)


def plain(figures: dict[str, Any]) -> dict[str, Any]:
    """NumPy numbers as Python's; NaN, which JSON does not have, as None."""
    return {name: _plain_value(value) for name, value in figures.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    return None if np.isnan(value) else float(value)


def _around_mean(deviation: Array, offset: Array) -> float:
    """Σ|x - mean|² from what SplicedTokens says of any other centre."""
    return float(deviation.sum() - np.square(offset).sum() / len(deviation))


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else np.nan
