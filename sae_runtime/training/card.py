"""CARD.md: what a published dictionary is and how good it is, for people."""

from __future__ import annotations

import math

import torch

from sae_runtime.autoencoder import Dictionary
from sae_runtime.evaluation.dictionary_evaluation import DictionaryEvaluation
from sae_runtime.formats.manifest import Provenance
from sae_runtime.statistics import LatentStatistics

_BAR = 40  # characters of the longest bar


def render_card(
    dictionary: Dictionary,
    evaluation: DictionaryEvaluation,
    statistics: LatentStatistics,
    provenance: Provenance,
    backbone: str,
) -> str:
    """Markdown with the description, the measured figures and a histogram of latent densities."""
    config, e = provenance.config, evaluation
    kind = f"TopK (k = {dictionary.k})" if dictionary.k else "ReLU"
    return f"""# {dictionary.name}

{kind} dictionary of {dictionary.n_latents:,} latents for site `{dictionary.site}` ({dictionary.d_in} wide) \
of backbone `{backbone}`{", on layer-normalised activations" if dictionary.normalize else ""}.

## Measured on held-out text

| figure | value | meaning |
| --- | ---: | --- |
| NMSE | {e.nmse:.4f} | squared error over that of predicting the mean activation |
| NMSE, normalised | {e.nmse_normalized:.4f} | the same on layer-normalised activations |
| Relative error | {e.relative_error:.4f} | Σ(x̂ − x)² / Σx² |
| L0 | {e.l0:.2f} | active latents per token |
| Dead latents | {e.dead_fraction:.2%} | never active |
| Dense latents | {e.dense_fraction:.2%} | active on more than 10 % of the tokens |
| Loss recovered | {e.loss_recovered:.4f} | (ablated − spliced) / (ablated − clean), ablation to zero |
| Cross-entropy, clean | {e.ce_clean:.4f} | nats per token |
| Cross-entropy, spliced | {e.ce_spliced:.4f} | |
| Cross-entropy, ablated | {e.ce_ablated:.4f} | |

Over {e.n_tokens:,} tokens, in float32, with the weights as stored.

## Densities

Share of {statistics.n_tokens:,} held-out tokens on which a latent is active, and the number of latents.

```
{_density_histogram(statistics.firing_rate)}
```

## Training

{provenance.tokens:,} tokens of {provenance.data}, seed {provenance.seed}.
Made by {provenance.code_version}, {provenance.created}.

| setting | value |
| --- | --- |
{chr(10).join(f"| {name} | {_shown(value)} |" for name, value in config.items())}
"""


def _density_histogram(firing_rate: torch.Tensor) -> str:
    """One line for each half decade of density, from never active to always active."""
    rates = [float(r) for r in firing_rate]
    halves = [math.floor(2 * math.log10(r)) for r in rates if r > 0]
    counts = [("never", len(rates) - len(halves))]
    counts += [
        (f"{10 ** (half / 2):.1e} to {10 ** ((half + 1) / 2):.1e}", sum(h == half for h in halves))
        for half in range(min(halves, default=0), max(halves, default=-1) + 1)
    ]
    longest = max(count for _, count in counts)
    return "\n".join(f"{label:>18}  {count:6}  {'#' * round(_BAR * count / longest)}" for label, count in counts)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
