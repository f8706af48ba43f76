"""Figures of spliced tokens: over all of them, by position in the row, by kind of text, and of the baselines."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.data.text_sample import TextSample
from sae_runtime.evaluation.density import DENSE
from sae_runtime.evaluation.intervals import bootstrap_interval
from sae_runtime.evaluation.splice import SplicedTokens

MIN_DOCUMENTS = 20

Mask = npt.NDArray[np.bool_]


def overall_figures(tokens: SplicedTokens, sample: TextSample, *, seed: int, resamples: int) -> dict[str, Any]:
    """Reconstruction, cross-entropy and divergence over all tokens; intervals resample whole documents.

    Tokens of one document are alike: resampling tokens, or rows of the same document, would claim too much. Where there
    are fewer than MIN_DOCUMENTS, rows are resampled all the same.
    """
    n = sample.n_tokens
    error, deviation = tokens.error["spliced"].sum(), tokens.deviation.sum()
    figures = {
        "n_tokens": n,
        "nmse": error / deviation,
        "relative_error": error / tokens.square.sum(),
        "nmse_normalized": tokens.inner_error.sum() / tokens.inner_deviation.sum(),
        "l0": tokens.density.l0.mean(),
        "dead_fraction": (tokens.density.fired == 0).mean(),
        "dense_fraction": (tokens.density.fired > DENSE * n).mean(),
        # Centred residuals: what a constant offset costs counts for NMSE, not here.
        "variance_explained": 1 - (error - np.square(tokens.residual).sum() / n) / deviation,
        **_losses(tokens, np.ones(n, bool)),
    }
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
    for name, (top, bottom) in ratios.items():
        low, high = bootstrap_interval(top, bottom, seed=seed, purpose=name, resamples=resamples)
        figures |= {f"{name}_low": low, f"{name}_high": high}
    return _plain(figures)


def position_figures(tokens: SplicedTokens, sample: TextSample) -> dict[str, Any]:
    """Lists with one entry for each range of positions: 0, 1, 2-3, 4-7 and so on in powers of two."""
    last = int(sample.position.max())
    starts = [0, *(2**i for i in range(last.bit_length()))]
    ends = [*starts[1:], last + 1]
    parts = [_part(tokens, (sample.position >= a) & (sample.position < b)) for a, b in zip(starts, ends, strict=True)]
    lists = {f"position_{name}": [part[name] for part in parts] for name in parts[0]}
    return {"position_start": starts, "position_end": ends, **_plain(lists)}


def kind_figures(tokens: SplicedTokens, sample: TextSample) -> dict[str, Any]:
    """The same for each kind of text, under `kind_<name>_`; a token counts for the document it belongs to.

    The deviation is from the mean over all kinds.
    """
    figures: dict[str, Any] = {"kinds": [slug(kind) for kind in sample.kinds]}
    l0 = tokens.density.l0
    for number, kind in enumerate(sample.kinds):
        kept = sample.kind == number
        part = {"n_tokens": int(kept.sum()), "l0": float(l0[kept].mean()), **_part(tokens, kept)}
        figures |= {f"kind_{slug(kind)}_{name}": value for name, value in part.items()}
    return _plain(figures)


def baseline_figures(tokens: SplicedTokens, names: list[str]) -> dict[str, Any]:
    """`baseline_<name>_...` on the tokens that have them; `baseline_dictionary_...`: the dictionary on those tokens."""
    measured = ~np.isnan(tokens.error[names[0]])
    figures: dict[str, Any] = {"baseline_n_tokens": int(measured.sum())}
    for name in names:
        part = _part(tokens, measured, name)
        figures |= {f"baseline_{name}_{key}": value for key, value in part.items() if key != "ce_clean"}
    part = _part(tokens, measured)
    figures |= {f"baseline_dictionary_{key}": part[key] for key in ("nmse", "delta_ce", "loss_recovered", "kl")}
    return _plain(figures)


def slug(text: str) -> str:
    """A label as part of a key: lower case, without accents, with underscores."""
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^0-9a-z]+", "_", plain).strip("_") or "unnamed"


def _part(tokens: SplicedTokens, kept: Mask, name: str = "spliced") -> dict[str, Any]:
    deviation = tokens.deviation[kept].sum()
    nmse = tokens.error[name][kept].sum() / deviation if deviation else np.nan
    return {"nmse": nmse, **_losses(tokens, kept, name)}


def _losses(tokens: SplicedTokens, kept: Mask, name: str = "spliced") -> dict[str, Any]:
    kept = kept & tokens.predicts
    if not kept.any():
        return dict.fromkeys(("ce_clean", "ce_spliced", "ce_ablated", "delta_ce", "loss_recovered", "kl"), np.nan)
    clean, spliced, zero = (float(tokens.cross_entropy[each][kept].mean()) for each in ("clean", name, "zero"))
    return {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_ablated": zero,
        "delta_ce": spliced - clean,
        "loss_recovered": (zero - spliced) / (zero - clean) if zero != clean else np.nan,
        "kl": float(tokens.divergence[name][kept].mean()),
    }


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """NumPy numbers as Python's; NaN, which JSON does not have, as None."""
    return {name: _plain_value(value) for name, value in figures.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_value(each) for each in value]
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    return None if np.isnan(value) else float(value)
