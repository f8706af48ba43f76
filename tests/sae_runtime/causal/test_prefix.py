"""Forwards that start at a site equal the whole forward; changes behind it equal edits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_runtime import Backbone, PackedTokens, Site
from sae_runtime.causal.prefix import Change, SharedPrefix
from sae_runtime.model.forward import PausedForward
from sae_runtime.model.sites import LOCATIONS

SITES = [Site(layer, location) for layer in range(2) for location in LOCATIONS]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_forward_from_a_site_is_the_whole_forward(tiny_backbone: Backbone, rows: list[list[int]], site: Site) -> None:
    packed = PackedTokens.from_rows(rows)
    later = [later_site for later_site in SITES if later_site >= site]
    whole = tiny_backbone.forward(packed, capture=later, logits="all", pause=[site])
    again = tiny_backbone.forward(packed, capture=later, logits="all", start=whole.paused[site])
    assert torch.equal(again.logits, whole.logits)  # the same operations on the same numbers
    assert all(torch.equal(again.activations[later_site], whole.activations[later_site]) for later_site in later)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_an_edit_behind_a_shared_prefix_is_an_edit(backbone64: Backbone, rows: list[list[int]], site: Site) -> None:
    packed = PackedTokens.from_rows(rows)
    noise = torch.randn(
        len(packed), backbone64.site_width(site), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def edit(at: Site, x: Tensor) -> Tensor:
        return x + noise

    expected = backbone64.forward(packed, edit=edit, edit_sites=[site], logits="all").logits
    paused = backbone64.forward(packed, pause=[site]).paused[site]
    resumed = backbone64.forward(packed, start=paused, edit=edit, edit_sites=[site], logits="all")
    assert torch.equal(resumed.logits, expected)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_many_changes_in_one_batch_equal_edits_one_by_one(
    backbone64: Backbone, rows: list[list[int]], site: Site
) -> None:
    generator = torch.Generator().manual_seed(1)
    prefix = SharedPrefix(backbone64, rows, [site])
    changes = []
    for row, tokens in ((1, [3, 4, 19]), (0, [0]), (1, [19]), (3, [5, 12]), (2, [1])):
        delta = torch.randn(len(tokens), backbone64.site_width(site), generator=generator, dtype=torch.float64)
        changes.append(Change(row, torch.tensor(tokens), delta))
    changed = prefix.run(site, changes)
    logits = backbone64.unembed(changed.final)
    for i, change in enumerate(changes):

        def edit(_: Site, x: Tensor, change: Change = change) -> Tensor:
            return x.index_add(0, change.tokens, change.delta)

        alone = backbone64.forward(
            PackedTokens.from_rows([rows[change.row]]), edit=edit, edit_sites=[site], capture=["1.resid_post_mlp"]
        )
        first = int(change.tokens[0])
        expected = backbone64.unembed(alone.activations[Site.parse("1.resid_post_mlp")])[first:]
        tokens = changed.change == i
        torch.testing.assert_close(logits[tokens], expected, atol=1e-10, rtol=0)
        start = sum(map(len, rows[: change.row]))
        assert changed.source[tokens].tolist() == list(range(start + first, start + len(rows[change.row])))


def test_what_does_not_fit_together(tiny_backbone: Backbone, rows: list[list[int]]) -> None:
    packed = PackedTokens.from_rows(rows)
    paused = tiny_backbone.forward(packed, pause=["1.mlp_post_act"]).paused[Site.parse("1.mlp_post_act")]
    with pytest.raises(ValueError, match=r"1\.resid_pre: before the site 1\.mlp_post_act where the forward starts"):
        tiny_backbone.forward(packed, start=paused, capture=["1.resid_pre"])
    with pytest.raises(
        ValueError, match=r"activation to start from is torch.float32 \[44, 64\], expected .*\[20, 64\]"
    ):
        tiny_backbone.forward(PackedTokens.from_rows([rows[1]]), start=paused, logits="last")
    with pytest.raises(ValueError, match=r"start at 1\.mlp_post_act has no residual"):
        tiny_backbone.forward(packed, start=PausedForward(paused.site, paused.activation, None), logits="last")
    cache = tiny_backbone.new_cache(4)
    with pytest.raises(ValueError, match="cannot use a cache"):
        tiny_backbone.forward(
            PackedTokens.from_rows(rows, slots=[0, 1, 2, 3]), start=paused, cache=cache, logits="last"
        )
    prefix = SharedPrefix(tiny_backbone, rows, [paused.site])
    with pytest.raises(ValueError, match="leave the range"):
        prefix.run(paused.site, [Change(0, torch.tensor([1]), torch.full((1, 64), torch.inf))])
