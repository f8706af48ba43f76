"""Matryoshka BatchTopK dictionaries (Bussmann et al. 2025): nested dictionaries of growing size in one.

    z = as BatchTopK,   x̂_m = W_dec[:m] z[:m] + pre_bias for prefixes m_1 < … < m_g = n of the latents
    loss = mean over prefixes of mean (x̂_m - x)² / Var(initial sample) + aux_coefficient · AuxK of the largest

The first latents must reconstruct alone, so they stay general instead of being split up as the dictionary grows. The
paper sums the prefixes' losses; their mean differs by a factor that Adam does not see, and keeps AuxK's weight.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from sae_runtime.training.trainers.batch_selection import Entries
from sae_runtime.training.trainers.batch_topk import BatchTopKTrainer
from sae_runtime.training.trainers.topk import Selection


class MatryoshkaTrainer(BatchTopKTrainer):
    """BatchTopK with a loss for each prefix of the latents."""

    def set_up_family(self) -> None:
        super().set_up_family()
        ends = [round(end * self.n_latents) for end in accumulate(self.config.matryoshka_fractions)]
        self.prefix_ends = sorted({*(end for end in ends if 0 < end < self.n_latents), self.n_latents})
        """Latents in each prefix."""
        self.prefix_weights = (1 / len(self.prefix_ends),) * len(self.prefix_ends)
        self.main_prefix = len(self.prefix_ends) - 1

    def nest(self, centred: Tensor, entries: Entries) -> Selection:
        latents = entries.by_row(len(centred), self.n_latents)
        ends = torch.tensor(self.prefix_ends, device=entries.latents.device)
        prefix = torch.searchsorted(ends, entries.latents, right=True)
        # Row of an entry = token · n_prefixes + prefix. Entries are sorted by token and latent, so a row is contiguous.
        row = entries.rows * len(ends) + prefix
        offsets = row.new_zeros(len(centred) * len(ends) + 1)
        torch.cumsum(torch.bincount(row, minlength=len(offsets) - 1), 0, out=offsets[1:])
        return Selection(centred, latents, entries.values, latents.split(offsets), prefix)
