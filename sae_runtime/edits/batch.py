"""The edits of a packed batch: which tokens and latents they touch, built once; and their arithmetic, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits.apply import EditOutOfRange, SiteEdits
from sae_runtime.edits.edit import Edit
from sae_runtime.edits.host_edits import HostEdits
from sae_runtime.edits.layout import Entry, Layout
from sae_runtime.edits.row import CompiledEdits
from sae_runtime.model.sites import Site

__all__ = ["EditOutOfRange", "EditPlan", "EditPlanner", "RowEdits", "plan_edits"]


@dataclass(frozen=True, slots=True)
class RowEdits:
    """The edits of one row of a packed batch, and where in the row the batch's tokens are."""

    edits: Sequence[Edit]  # CompiledEdits, where the row is planned more than once
    prompt_length: int  # tokens of the row's prompt; a token at this position or later is a generated one
    past: int  # position in the row of the first token in the batch
    length: int  # tokens of the row in the batch
    tokens: Sequence[int] | None = None  # the row's ids up to its last token in the batch; for edits after a text


class EditPlan:
    """The edits of a packed batch, compiled; `apply` is the `edit` callable of `Backbone.forward`.

    Tokens without an edit are not encoded and come out bitwise as they went in. A plan may serve any number of forwards
    of the same rows, one after the other; not two at once.
    """

    def __init__(self, by_site: Mapping[Site, SiteEdits | HostEdits]) -> None:
        self._by_site = by_site
        self.sites: tuple[Site, ...] = tuple(sorted(by_site))
        """Where `apply` must be called, in this order: edited sites, and those that a later edit's condition reads."""
        self._truths: list[Tensor] = []  # of the thresholds that were read in the present forward, site by site

    def __bool__(self) -> bool:
        return bool(self.sites)

    def apply(self, site: Site, x: Tensor) -> Tensor:
        """The edited activations of a site, x [N, width] -> [N, width]; x itself where nothing is to be done.

        Latents are read without gradient: to autograd an edit is a constant added to x. ValueError: x is not finite at
        an edited token; EditOutOfRange (a ValueError that names the rows): the edited values overflow x's dtype, or
        change more than `max_relative_change` allows.
        """
        edits = self._by_site.get(site)
        if edits is None:
            return x
        if len(self._truths) < edits.n_earlier:
            raise RuntimeError(f"{site} is edited before the sites that its conditions read: {self.sites}")
        del self._truths[edits.n_earlier :]
        return edits.apply(x, self._truths)


_NOTHING = EditPlan({})


class EditPlanner:
    """Plans the edits of a running batch step after step; the plan is kept while the same tokens get the same edits.

    While every row brings one token and its edits cover that token as they covered the one before, `plan` returns the
    plan that it returned last: a step costs a comparison a row and uploads nothing.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._plan = _NOTHING

    def plan(self, rows: Sequence[RowEdits]) -> EditPlan:
        """The plan of one step, rows in the order of the packed batch; their edits are CompiledEdits, or none."""
        key = _key(rows)
        if key is None or key != self._key:
            self._plan, self._key = _build(rows, {}), key
        return self._plan


def plan_edits(rows: Sequence[RowEdits], dictionaries: Mapping[str, Dictionary]) -> EditPlan:
    """Compile the edits of the rows of a packed batch, in its order.

    Edits that are not compiled yet must have passed `check_edits` with the same dictionaries. Rows whose edits cover
    none of their tokens in this batch cost nothing.
    """
    return _build(rows, dictionaries)


def _key(rows: Sequence[RowEdits]) -> tuple[object, ...] | None:
    """Equal for two steps of the same edits on the same places; None where a row brings more than one token."""
    key: list[object] = []
    for row in rows:
        edits = row.edits
        if not edits:
            key.append(row.length)
        elif row.length == 1 and isinstance(edits, CompiledEdits):
            key.append(edits)
            key.append(edits.key_at(row.past, row.tokens))
        else:
            return None
    return tuple(key)


def _build(rows: Sequence[RowEdits], dictionaries: Mapping[str, Dictionary]) -> EditPlan:
    layout = Layout()
    start = 0
    for number, row in enumerate(rows):
        edits = row.edits
        if edits:
            if not isinstance(edits, CompiledEdits):
                edits = CompiledEdits(edits, dictionaries, row.prompt_length)
            for part in edits.parts:
                offsets = edits.offsets(part, row.past, row.length, row.tokens)
                if len(offsets):
                    layout.add(Entry(part, number, start, row.past, offsets, edits.max_relative_change))
        start += row.length
    sites = layout.finish()
    if not sites:
        return _NOTHING
    return EditPlan({site.site: HostEdits(site) if HostEdits.can_edit(site) else SiteEdits(site) for site in sites})
