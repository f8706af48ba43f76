"""What replacing activations by reconstructions costs the model.

With all tokens replaced at once (`sae_runtime.figures.held_out`): intervals, figures by position in the row and by kind
of text, and figures of the baselines. With one token of a row replaced: `splice_single_tokens`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_runtime.data.rows import packed_passes
from sae_runtime.data.text_sample import TextSample
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.evaluation.intervals import bootstrap_interval, generator
from sae_runtime.figures.held_out import (
    Array,
    Mask,
    SplicedTokens,
    joined,
    log_probabilities,
    next_token_loss,
    plain,
)
from sae_runtime.figures.held_out import divergence as kl_divergence
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressMeter

MIN_DOCUMENTS = 20


def overall_figures(tokens: SplicedTokens, sample: TextSample, *, seed: int, resamples: int) -> dict[str, Any]:
    """Reconstruction, cross-entropy and divergence over all tokens; intervals resample whole documents.

    Tokens of one document are alike: resampling tokens, or rows of the same document, would claim too much. Where there
    are fewer than MIN_DOCUMENTS, rows are resampled all the same.
    """
    n = sample.n_tokens
    figures = tokens.figures()
    predicts = tokens.predicts
    several = len(np.unique(sample.document)) >= MIN_DOCUMENTS
    unit = np.unique(sample.document if several else sample.row, return_inverse=True)[1]
    n_units = int(unit.max()) + 1

    def by_unit(values: npt.NDArray[np.float64], kept: Mask) -> npt.NDArray[np.float64]:
        return np.bincount(unit[kept], values[kept], minlength=n_units).astype(np.float64)

    everywhere = np.ones(n, bool)
    ce = tokens.cross_entropy
    counts = by_unit(np.ones(n), predicts)
    ratios = {
        "nmse": (by_unit(tokens.error["spliced"], everywhere), by_unit(tokens.deviation, everywhere)),
        "delta_ce": (by_unit(ce["spliced"] - ce["clean"], predicts), counts),
        "loss_recovered": (
            by_unit(ce["zero"] - ce["spliced"], predicts),
            by_unit(ce["zero"] - ce["clean"], predicts),
        ),
        "kl": (by_unit(tokens.divergence["spliced"], predicts), counts),
    }
    ends = {}
    for name, (top, bottom) in ratios.items():
        ends[f"{name}_low"], ends[f"{name}_high"] = bootstrap_interval(
            top, bottom, seed=seed, purpose=name, resamples=resamples
        )
    return figures | plain(ends)


def position_figures(tokens: SplicedTokens, sample: TextSample) -> dict[str, Any]:
    """Lists with one entry for each range of positions: 0, 1, 2-3, 4-7 and so on in powers of two."""
    last = int(sample.position.max())
    starts = [0, *(2**i for i in range(last.bit_length()))]
    ends = [*starts[1:], last + 1]
    ranges = [
        _subset_figures(tokens, (sample.position >= a) & (sample.position < b))
        for a, b in zip(starts, ends, strict=True)
    ]
    lists = {f"position_{name}": [figures[name] for figures in ranges] for name in ranges[0]}
    return {"position_start": starts, "position_end": ends, **plain(lists)}


def kind_figures(tokens: SplicedTokens, sample: TextSample) -> dict[str, Any]:
    """The same for each kind of text, under `kind_<name>_`; a token counts for the document it belongs to.

    The deviation is from the mean over all kinds.
    """
    figures: dict[str, Any] = {"kinds": [slug(kind) for kind in sample.kinds]}
    l0 = tokens.density.l0
    for number, kind in enumerate(sample.kinds):
        kept = sample.kind == number
        of_kind = {"n_tokens": int(kept.sum()), "l0": float(l0[kept].mean()), **_subset_figures(tokens, kept)}
        figures |= {f"kind_{slug(kind)}_{name}": value for name, value in of_kind.items()}
    return plain(figures)


def baseline_figures(tokens: SplicedTokens, names: list[str]) -> dict[str, Any]:
    """`baseline_<name>_...` on the tokens that have them; `baseline_dictionary_...`: the dictionary on those tokens."""
    measured = ~np.isnan(tokens.error[names[0]])
    figures: dict[str, Any] = {"baseline_n_tokens": int(measured.sum())}
    for name in names:
        of_baseline = _subset_figures(tokens, measured, name)
        figures |= {f"baseline_{name}_{key}": value for key, value in of_baseline.items() if key != "ce_clean"}
    of_dictionary = _subset_figures(tokens, measured)
    figures |= {
        f"baseline_dictionary_{key}": of_dictionary[key] for key in ("nmse", "delta_ce", "loss_recovered", "kl")
    }
    return plain(figures)


def slug(text: str) -> str:
    """A label as part of a key: lower case, without accents, with underscores."""
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^0-9a-z]+", "_", plain).strip("_") or "unnamed"


def _subset_figures(tokens: SplicedTokens, kept: Mask, name: str = "spliced") -> dict[str, Any]:
    deviation = tokens.deviation[kept].sum()
    nmse = tokens.error[name][kept].sum() / deviation if deviation else np.nan
    return {"nmse": nmse, **tokens.losses(kept, name)}


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
    progress: ProgressMeter | None = None,
) -> SingleSplices:
    """Replaces only the activation at `position` of each window. All windows have one length, above `position`."""
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
        log_spliced = log_probabilities(backbone, packed, site, replaced)
        loss = next_token_loss(log_spliced, packed) - next_token_loss(log_clean, packed)
        kl = kl_divergence(log_clean, log_spliced).view(-1, length)
        delta.append(loss.view(-1, length)[:, position])
        divergence.append(kl[:, position])
        later.append(kl[:, position + 1 :].mean(1))
        if progress is not None:
            progress.reach(sum(map(len, delta)))
    return SingleSplices(joined(delta), joined(divergence), joined(later))


def choose_windows(
    rows: Sequence[Sequence[int]], length: int, n_windows: int, seed: int, purpose: str
) -> list[list[int]]:
    """The first `length` tokens of rows drawn without repeats; fewer rows where too few are that long."""
    fitting = [i for i, row in enumerate(rows) if len(row) >= length]
    drawn = generator(seed, purpose).permutation(len(fitting))[:n_windows]
    return [list(rows[fitting[i]][:length]) for i in sorted(drawn.tolist())]
