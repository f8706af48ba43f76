"""The compiled arithmetic of plain edits against that of SiteEdits, and what it leaves to it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae_runtime import Dictionary, Edit, Site
from sae_runtime.dictionary.normalization import NORMALIZATIONS, Normalization
from sae_runtime.edits import CompiledEdits, Condition, EditOutOfRange, RowEdits
from sae_runtime.edits import batch as planning
from sae_runtime.edits.batch import plan_edits
from sae_runtime.edits.host_edits import HostEdits
from sae_runtime.kernels import topk_membership
from tests.service.engine.models import random_dictionary

SITE = Site.parse("0.resid_post_mlp")


def topk(normalization: Normalization = "layer_norm", n_latents: int = 300) -> Dictionary:
    dictionary = random_dictionary(str(SITE), 32, k=8, normalize=False, seed=3, n_latents=n_latents)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(4)) / 4
    return replace(dictionary, name="topk", normalization=normalization, pre_bias=shift).with_screen()


def rows_of_edits(dictionary: Dictionary, x: Tensor, rows: int) -> list[tuple[Edit, ...]]:
    """Of every row several edits, on latents that its tokens have and on others; every third row has none."""
    often = dictionary.encode_dense(x).sum(0).argsort(descending=True)
    edits = []
    for row in range(rows):
        a, b, c, d = (int(often[i]) for i in (row, row + 1, row + 3, 200 + row))
        every = (
            Edit("topk", a, "ablate_zero"),
            Edit("topk", b, "scale", 1.5 + row),
            Edit("topk", c, "clamp", minimum=0.1, maximum=0.4),
            Edit("topk", d, "add", 0.7),
            Edit("topk", 299, "set", 2.0, positions=(0,)),
        )
        edits.append(() if row % 3 == 2 else every[row % 4 :])
    return edits


def plans(edits: list[tuple[Edit, ...]], length: int, dictionary: Dictionary) -> tuple[planning.EditPlan, ...]:
    """The same edits by HostEdits, and by SiteEdits."""
    rows = [RowEdits(each, length, 0, length) for each in edits]
    found = plan_edits(rows, {"topk": dictionary})
    assert isinstance(found._by_site[SITE], HostEdits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostEdits, "can_edit", lambda layout: False)
        return found, plan_edits(rows, {"topk": dictionary})


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("small_latents", [4096, 100])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 1), (7, 1), (9, 11)])
def test_equals_site_edits(
    monkeypatch: pytest.MonkeyPatch, normalization: Normalization, small_latents: int, rows: int, length: int
) -> None:
    monkeypatch.setattr(topk_membership, "SMALL_LATENTS", small_latents)
    dictionary = topk(normalization)
    x = 3 * torch.randn(rows * length, 32, generator=torch.Generator().manual_seed(rows)) + 1
    edits = rows_of_edits(dictionary, x, rows)
    host, site = plans(edits, length, dictionary)
    found, expected = host.apply(SITE, x), site.apply(SITE, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, x)
    untouched = torch.tensor([not each for each in edits]).repeat_interleave(length)
    assert torch.equal(found[untouched], x[untouched])
    # In memory by column, as products for few rows leave it.
    torch.testing.assert_close(host.apply(SITE, x.t().contiguous().t()), found)


def test_a_row_without_spread_or_length_stays_finite() -> None:
    for normalization in NORMALIZATIONS:
        dictionary = topk(normalization)
        x = torch.stack([torch.zeros(32), torch.full((32,), 2.0)])
        host, site = plans([(Edit("topk", 1, "add", 1.0), Edit("topk", 2, "ablate_zero"))], 2, dictionary)
        torch.testing.assert_close(host.apply(SITE, x), site.apply(SITE, x))


def test_where_nothing_is_added_the_token_stays_bitwise_the_same() -> None:
    dictionary = topk()
    x = torch.randn(4, 32)
    x[:, 5] = -0.0
    silent = int(dictionary.encode_dense(x).sum(0).argmin())
    (host, _) = plans([(Edit("topk", silent, "ablate_zero"),)], 4, dictionary)
    assert torch.equal(host.apply(SITE, x).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize(
    ("edit", "x", "message"),
    [
        (Edit("topk", 1, "add", 3e38), 100 * torch.randn(2, 32), "leave the range of torch.float32"),
        (Edit("topk", 1, "ablate_zero"), torch.full((2, 32), math.nan), "not finite"),
        (Edit("topk", 1, "add", 1.0), torch.full((2, 32), math.inf), "not finite"),
    ],
)
def test_says_what_is_wrong_as_site_edits_do(edit: Edit, x: Tensor, message: str) -> None:
    for plan in plans([(edit,)], 2, topk()):
        with pytest.raises(ValueError, match=message):
            plan.apply(SITE, x)


def test_a_change_over_the_limit_names_its_row() -> None:
    dictionary = topk()
    strong, weak = ((Edit("topk", 1, "add", value),) for value in (50.0, 0.01))
    rows = [
        RowEdits(CompiledEdits(each, {"topk": dictionary}, 1, max_relative_change=0.5), 1, 0, 1)
        for each in (weak, strong, weak)
    ]
    plan = plan_edits(rows, {"topk": dictionary})
    with pytest.raises(EditOutOfRange, match=r"more than max_relative_change = 0.5") as caught:
        plan.apply(SITE, torch.randn(3, 32))
    assert caught.value.rows == (1,)


def test_leaves_the_rest_to_site_edits() -> None:
    dictionary = topk()
    conditional = Edit("topk", 1, "add", 1.0, condition=Condition(feature=2, threshold=0.5))
    for edits, each in (
        ((conditional,), dictionary),
        ((Edit("topk", 0, "replace"),), dictionary),
        ((Edit("topk", 1, "add", 1.0),), dictionary.to(dtype=torch.float64)),
        ((Edit("topk", 1, "add", 1.0),), replace(dictionary, postact="identity")),
    ):
        plan = plan_edits([RowEdits(edits, 2, 0, 2)], {"topk": each})
        assert not isinstance(plan._by_site[SITE], HostEdits)


def test_refuses_activations_that_the_plan_is_not_for() -> None:
    host, _ = plans([(Edit("topk", 1, "ablate_zero"),)], 3, topk())
    with pytest.raises(ValueError, match=r"shape \[3, 31\], expected \[n, 32\]"):
        host.apply(SITE, torch.randn(3, 31))
    with pytest.raises(IndexError):
        host.apply(SITE, torch.randn(2, 32))


def test_gradients_pass_as_through_an_added_constant() -> None:
    host, _ = plans([(Edit("topk", 1, "set", 2.0),)], 2, topk())
    x = torch.randn(2, 32, requires_grad=True)
    host.apply(SITE, x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
