"""What one forward pass reads, replaces and keeps on its way through the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sae_runtime.model.sites import Site

BRANCHES = ("resid_delta_attn", "mlp_post_act", "resid_delta_mlp")
"""Locations on a branch beside the residual stream. The branch is added to the stream later."""

EditFunction = Callable[[Site, Tensor], Tensor]
"""Called with a site and its live activation [N, width]; returns what replaces it, a new tensor of the same shape."""


@dataclass(frozen=True)
class PausedForward:
    """A forward pass that was paused at a site, before any edit there. Another forward can start from it.

    Rows may be repeated, left out or changed in between. All of them share what was computed before the site.
    """

    site: Site
    activation: Tensor
    """[N, width] at the site, in the backbone's dtype."""
    residual: Tensor | None
    """[N, d_model], the residual stream that the site's branch is added to later; None for a site on the stream."""

    def take(self, tokens: Tensor) -> PausedForward:
        """Copies of the given tokens (int64 [M], indices into the packed batch)."""
        residual = None if self.residual is None else self.residual[tokens]
        return PausedForward(self.site, self.activation[tokens], residual)


@dataclass(frozen=True)
class ForwardResult:
    """The results that a forward pass was asked for."""

    activations: dict[Site, Tensor]
    """[N, width] for every captured site, after any edit there, in the backbone's dtype. Do not modify in place."""
    logits: Tensor | None
    """float32 [B, vocab] of each row's last token, or [N, vocab] of all tokens, or None."""
    paused: dict[Site, PausedForward] = field(default_factory=dict)
    """For every site of `pause`."""


@dataclass
class Taps:
    """Reads and replaces activations on their way through one forward."""

    capture: frozenset[Site]
    edit: EditFunction | None
    edit_sites: frozenset[Site]
    last: Site | None
    """The last site that anything needs; None if nothing is needed."""
    pause: frozenset[Site] = frozenset()
    captured: dict[Site, Tensor] = field(default_factory=dict)
    paused: dict[Site, PausedForward] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._layers = frozenset(site.layer for site in (*self.capture, *self.edit_sites, *self.pause))

    def pass_through(self, layer: int, location: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, width] as it goes on from this site: edited if there is an edit.

        `residual` is the stream that x is added to later, for a site on a branch.
        """
        if layer not in self._layers:
            return x
        site = Site(layer, location)
        if site in self.pause:
            self.paused[site] = PausedForward(site, x, residual)
        if site in self.edit_sites and self.edit is not None:
            edited = self.edit(site, x)
            if edited.shape != x.shape or edited.dtype != x.dtype:
                raise ValueError(
                    f"the edit at {site} returned {edited.dtype} {list(edited.shape)}, "
                    f"expected {x.dtype} {list(x.shape)}"
                )
            x = edited
        if site in self.capture:
            self.captured[site] = x.contiguous()
        return x

    def end_at(self, layer: int, location: str) -> bool:
        """Whether nothing after this site is needed."""
        return self.last is None or (self.last.layer <= layer and self.last <= Site(layer, location))
