"""The arithmetic of edits at one site of a packed batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.dictionary.dictionary import COMPETING, Dictionary
from sae_runtime.dictionary.features import all_finite
from sae_runtime.dictionary.readings import Places, Readings
from sae_runtime.kernels.active import LatentActivation
from sae_runtime.model.sites import Site


class EditOutOfRange(ValueError):
    """Edited values overflow, or change more than is allowed; `rows` are the rows of the packed batch at fault."""

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True, eq=False)
class DictionaryEdits:
    """What one dictionary reads and changes at a site: latents z [T, F] of T tokens and F latents.

    A pair of a token and a latent is written as its place in z, row by row:

                     latents
                     3   17   40
        tokens   0   0    1    2
                 7   3    4    5

    A pair's edit is a column of `arithmetic` [4, P]:

        z'[pairs[p]] = min(max(scale[p] * z[pairs[p]] + shift[p], minimum[p]), maximum[p])

    and only where its condition holds. Conditions are places in `holds`, see SiteEdits.
    """

    dictionary: Dictionary
    tokens: Places
    """[T] places in the packed batch."""
    at_site: Tensor | None
    """int64 [T], the tokens' places among those of the site; None: they are all of these."""
    latents: Tensor
    """int64 [F], ascending."""
    looked_at: Tensor
    """bool [T, F]: the latents whose value matters. Others may be read as 0: an edit that only adds needs none."""

    pairs: Tensor
    """int64 [P], without repeats."""
    arithmetic: Tensor
    """[4, P]: scale, shift, minimum, maximum."""
    clamps: bool
    """Whether any minimum or maximum is finite."""
    conditions: Tensor | None
    """int64 [P]; None: there are none."""

    threshold_pairs: Tensor
    """int64 [L], the pairs that conditions look at."""
    thresholds: Tensor
    """[2, L]: sign * threshold, and sign: 1 for "above", -1 for "at most"."""

    replaced: Tensor
    """int64 [R], the tokens, as places in `tokens`, that the dictionary's reconstruction replaces."""
    replaced_conditions: Tensor | None
    """int64 [R]."""

    @cached_property
    def encoder(self) -> Tensor:
        """Encoder rows of the latents, [F, width]."""
        return self.dictionary.encoder[self.latents]

    @cached_property
    def activation(self) -> LatentActivation:
        """That of the latents."""
        return self.dictionary.latent_activation[self.latents]

    @cached_property
    def decoder(self) -> Tensor:
        """Decoder rows of the latents, [F, width], in the dtype of the arithmetic."""
        return self.dictionary.decoder[self.latents].to(self.arithmetic.dtype)

    @cached_property
    def rows_looked_at(self) -> Tensor:
        """int64, on the host: the rows of z with a latent that matters."""
        return self.looked_at.any(dim=1).nonzero().squeeze(1).cpu()

    @property
    def changes(self) -> bool:
        """Whether anything is edited; conditions of later sites only read."""
        return self.pairs.numel() > 0 or self.replaced.numel() > 0

    def read(self, x: Tensor, site_x: Tensor, readings: Readings) -> LatentValues:
        """Latents of the packed batch's activation x [N, width], of which site_x [S, width] are the site's tokens."""
        token_x = site_x if self.at_site is None else site_x[self.at_site]
        prepared, statistics = self.dictionary.prepare(token_x)
        reconstruction = None
        if self.replaced.numel():
            readings.want(self.dictionary, self.tokens)
            features = readings.read(self.dictionary, x).rows(self.tokens)
            z = features.select_ascending(self.latents)
            reconstruction = self.dictionary.decode(features[self.replaced])
        else:
            z = self._read_latents(x, prepared, readings)
        z = z.to(self.arithmetic.dtype)
        return LatentValues(token_x, z, None if statistics is None else statistics.std, reconstruction)

    def _read_latents(self, x: Tensor, prepared: Tensor, readings: Readings) -> Tensor:
        """z [T, F], right where it is looked at."""
        dictionary = self.dictionary
        competing = dictionary.activation in COMPETING
        shared = readings.covers(dictionary, self.tokens)
        if not competing and not shared:
            z = self.activation.before_relu(prepared, self.encoder).relu_()
            dictionary.check_overflow(z)
            return z
        rows = self.rows_looked_at
        if not shared and dictionary.postact == "relu" and x.device.type == "cpu":
            # A latent whose pre-activation is not positive is 0, whichever are kept. (NaN is not known to be.)
            silent = self.activation.before_relu(prepared, self.encoder) <= 0
            rows = (~silent & self.looked_at).any(dim=1).nonzero().squeeze(1)
        z = prepared.new_zeros(self.looked_at.shape)
        if len(rows):
            tokens = self.tokens[rows.numpy()]
            readings.want(dictionary, tokens)
            values = readings.read(dictionary, x).rows(tokens).select_ascending(self.latents)
            z = values if len(rows) == len(z) else z.index_copy_(0, rows.to(z.device), values)
        return z

    def thresholds_hold(self, values: LatentValues) -> Tensor:
        """Whether each of the thresholds holds: 1 or 0, [L]."""
        bounds, signs = self.thresholds
        z = values.z.view(-1)[self.threshold_pairs] * signs
        # "At most" is the opposite of "above", so it holds where they are equal.
        return torch.where(signs > 0, z > bounds, z >= bounds).to(z.dtype)

    def change(self, values: LatentValues, holds: Tensor) -> Tensor:
        """What to add to the dictionary's tokens, [T, width]: std (z' - z) @ decoder, and x^ - x for replaced ones."""
        old = values.z.view(-1)[self.pairs]
        scale, shift, minimum, maximum = self.arithmetic
        new = torch.addcmul(shift, scale, old)
        if self.clamps:
            new = torch.clamp(new, minimum, maximum)
        change = new - old
        if self.conditions is not None:
            change = change * holds[self.conditions]
        change = torch.zeros_like(values.z).view(-1).index_copy_(0, self.pairs, change).view(values.z.shape)
        added = change @ self.decoder
        if values.std is not None:
            added = added * values.std
        if values.reconstruction is not None:
            lost = values.reconstruction.to(added.dtype) - values.x[self.replaced].to(added.dtype)
            if self.replaced_conditions is not None:
                lost = lost * holds[self.replaced_conditions, None]
            added = added.index_add_(0, self.replaced, lost)
        return added


@dataclass(frozen=True, eq=False)
class LatentValues:
    """What a dictionary reads on its tokens before any edit at their site."""

    x: Tensor  # [T, width]
    z: Tensor  # [T, F]
    std: Tensor | None  # [T, 1], where the dictionary normalises
    reconstruction: Tensor | None  # [R, width] of the replaced tokens


@dataclass(frozen=True, eq=False)
class Combinations:
    """m combinations of conditions on one token each: combination i holds if at least needed[i] inner ones do.

    all of (2, 3), any of (4, 5, 6):    inner   2 3 4 5 6      needed  2 1
                                        of      0 0 1 1 1
    """

    inner: Tensor  # int64 [c], places in `holds`
    of: Tensor  # int64 [c], which of the m combinations
    needed: Tensor  # [m]


@dataclass(frozen=True, eq=False)
class SiteEdits:
    """The edits of one site; all of them read the activation as it was before any of them.

    Whether a condition holds on a token is a number, 1 or 0, in `holds`:

        1 | thresholds read at earlier sites | thresholds read here | combinations, the inner ones first

    Place 0 always holds: that is the condition of an edit without one.
    """

    site: Site
    tokens: Places
    """[S] places in the packed batch of the tokens that anything reads or edits here."""
    index: Tensor
    """The same on the device."""
    rows: NDArray[np.int64]
    """[S], the row of each."""
    limits: Tensor | None
    """[S, 1], the largest relative change of each; None if there is no limit."""
    dictionaries: tuple[DictionaryEdits, ...]
    combinations: tuple[Combinations, ...]
    """Inner ones first; each adds its m to the end of `holds`."""
    n_earlier: int
    """Dictionaries with thresholds at earlier sites."""

    @property
    def changes(self) -> bool:
        """Whether anything is edited here."""
        return any(dictionary.changes for dictionary in self.dictionaries)

    def apply(self, x: Tensor, thresholds: list[Tensor], readings: Readings) -> Tensor:
        """The edited x [N, width]; adds what holds of the thresholds here to `thresholds`, those of earlier sites."""
        h = x if len(self.tokens) == len(x) else x[self.index]  # [S, width]
        before = h.detach()
        values = [dictionary.read(x.detach(), before, readings) for dictionary in self.dictionaries]
        for dictionary, read in zip(self.dictionaries, values, strict=True):
            if dictionary.threshold_pairs.numel():
                thresholds.append(dictionary.thresholds_hold(read))
        if not self.changes:
            return x
        holds = self._combine(thresholds)
        added: Tensor | None = None
        for dictionary, read in zip(self.dictionaries, values, strict=True):
            if dictionary.changes:
                change = dictionary.change(read, holds)
                change = change.to(torch.promote_types(x.dtype, change.dtype))
                if dictionary.at_site is not None:
                    change = change.new_zeros(h.shape).index_copy_(0, dictionary.at_site, change)
                added = change if added is None else added + change
        assert added is not None
        # Where nothing is added the token stays bitwise the same: a sum would lose the sign of -0.
        edited = torch.where(added == 0, h, (h.to(added.dtype) + added).to(x.dtype))
        self._check(before, added, edited.detach())
        return edited if h is x else x.index_copy(0, self.index, edited)

    def _combine(self, thresholds: list[Tensor]) -> Tensor:
        """`holds`."""
        like = self.dictionaries[0].arithmetic
        holds = torch.cat([like.new_ones(1), *(hold.to(like.dtype) for hold in thresholds)])
        for level in self.combinations:
            count = torch.zeros_like(level.needed).index_add_(0, level.of, holds[level.inner])
            holds = torch.cat([holds, (count >= level.needed).to(like.dtype)])
        return holds

    def _check(self, before: Tensor, added: Tensor, edited: Tensor) -> None:
        """EditOutOfRange for tokens that are not finite, or changed by more than their limit."""
        overflow = f"edits at {self.site} leave the range of {edited.dtype}"
        if self.limits is None:
            if not all_finite(edited):
                self._refuse(edited.isfinite().all(dim=1), overflow)
            return
        size = torch.linalg.vector_norm(before.to(added.dtype), dim=1, keepdim=True)
        change = torch.linalg.vector_norm(added, dim=1, keepdim=True)
        fits = ((change <= self.limits * size) & edited.isfinite().all(dim=1, keepdim=True)).squeeze(1)
        if bool(fits.all()):
            return
        first = int((~fits).nonzero()[0])
        if not bool(edited[first].isfinite().all()):
            self._refuse(fits, overflow)
        ratio, limit = float(change[first] / size[first]), float(self.limits[first])
        self._refuse(
            fits,
            f"edits at {self.site} change an activation by {ratio:.4g} x its size, "
            f"more than max_relative_change = {limit:g}",
        )

    def _refuse(self, fits: Tensor, message: str) -> None:
        rows = np.unique(self.rows[(~fits).cpu().numpy()])
        raise EditOutOfRange(message, tuple(int(row) for row in rows))
