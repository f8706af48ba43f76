"""One forward pass of rows, and many changed copies of them that share its blocks before the changed site."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import LOCATIONS, Site


@dataclass(frozen=True, eq=False)
class Change:
    """A copy of a row with something added to its activations at one site."""

    row: int
    tokens: Tensor
    """int64 [c], positions in the row, ascending, at least one."""
    delta: Tensor
    """[c, width], float32 or better: what is added at the site."""


@dataclass(frozen=True, eq=False)
class ChangedTokens:
    """The tokens of changed copies from each copy's first change on; the tokens before it are unchanged."""

    final: Tensor
    """[M, d_model] after the last block, in the backbone's dtype."""
    change: Tensor
    """int64 [M]: the index of the change that a token belongs to."""
    source: Tensor
    """int64 [M]: the token of the packed rows that it is a copy of."""


class SharedPrefix:
    """Rows that ran once and can run again, with changes, from any of `sites` on.

    Holds the activations at `sites` and after the last block: (number of sites + 1) x [N, width].
    """

    def __init__(self, backbone: Backbone, rows: Sequence[Sequence[int]], sites: Collection[Site]) -> None:
        """Runs the unchanged rows. Errors as `Backbone.forward`."""
        self.backbone = backbone
        self.packed = PackedTokens.from_rows(rows).to(backbone.device)
        self._last = last_site(backbone)
        result = backbone.forward(self.packed, capture=[self._last], pause=sites)
        self.final = result.activations[self._last]
        """[N, d_model] after the last block."""
        self.paused = result.paused
        lengths = torch.tensor(self.packed.lengths)
        self.starts: list[int] = (lengths.cumsum(0) - lengths).tolist()
        """Packed index of each row's first token."""

    def run(self, site: Site, changes: Sequence[Change]) -> ChangedTokens:
        """Runs changed copies of rows from the site on, all in one batch.

        Raises:
            ValueError: the changed activations leave the range of the backbone's dtype.
        """
        device, lengths = self.backbone.device, [self.packed.lengths[change.row] for change in changes]
        ends = torch.tensor(lengths).cumsum(0)
        begins = (ends - torch.tensor(lengths)).tolist()  # of each copy, in the new packing
        source = torch.cat(
            [torch.arange(self.starts[c.row], self.starts[c.row] + n) for c, n in zip(changes, lengths, strict=True)]
        ).to(device)
        start = self.paused[site].take(source)
        changed = torch.cat([c.tokens + begin for c, begin in zip(changes, begins, strict=True)]).to(device)
        delta = torch.cat([change.delta for change in changes])
        rows = (start.activation[changed].to(delta.dtype) + delta).to(start.activation.dtype)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"changes at {site} leave the range of {rows.dtype}")
        start.activation[changed] = rows  # `take` made copies
        copies = PackedTokens(self.packed.ids[source], tuple(lengths), (0,) * len(lengths))
        final = self.backbone.forward(copies, start=start, capture=[self._last]).activations[self._last]
        first = torch.tensor([int(change.tokens[0]) for change in changes], device=device)
        affected = copies.positions >= first[copies.row_of_token]
        return ChangedTokens(final[affected], copies.row_of_token[affected], source[affected])


def last_site(backbone: Backbone) -> Site:
    """The site of the last block's output, before the final layer norm and the LM head."""
    return Site(backbone.n_layers - 1, LOCATIONS[-1])
