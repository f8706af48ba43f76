"""What is read, replaced and kept on the way through one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sae_runtime.model.sites import Site

BRANCHES = ("resid_delta_attn", "mlp_post_act", "resid_delta_mlp")
"""Locations beside the residual stream, which goes on unchanged meanwhile."""

EditFunction = Callable[[Site, Tensor], Tensor]
"""Called with a site and its live activation [N, width]; returns what replaces it, a new tensor of the same shape."""


@dataclass(frozen=True)
class PausedForward:
    """A forward pass that stands at a site, before any edit there; another can start from it.

    Rows may be repeated or left out and the activation may be changed in between: what comes before the site is shared.
    """

    site: Site
    activation: Tensor
    """[N, width] at the site, in the backbone's dtype."""
    residual: Tensor | None
    """[N, d_model], the residual stream that the site's branch is added to later; None where the site is on it."""

    def take(self, tokens: Tensor) -> PausedForward:
        """The given tokens (int64 [M], places in the packed batch), as copies."""
        residual = None if self.residual is None else self.residual[tokens]
        return PausedForward(self.site, self.activation[tokens], residual)


@dataclass(frozen=True)
class ForwardResult:
    """What a forward pass was asked for."""

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
    pause: frozenset[Site] = frozenset()
    captured: dict[Site, Tensor] = field(default_factory=dict)
    paused: dict[Site, PausedForward] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._layers = frozenset(site.layer for site in (*self.capture, *self.edit_sites, *self.pause))

    def pass_through(self, layer: int, location: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual` is the stream that a branch is added to later."""
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
