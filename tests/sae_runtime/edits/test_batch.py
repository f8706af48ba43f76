"""Plans: kept while nothing changes, nothing encoded that nobody needs, rows at fault named, tokens left bitwise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime import Dictionary, Edit, Site
from sae_runtime.edits import (
    AfterText,
    CompiledEdits,
    Condition,
    EditOutOfRange,
    EditPlanner,
    InvalidEdit,
    Reference,
    RowEdits,
    apply,
    plan_edits,
)
from sae_runtime.edits.latent_reader import LatentReader
from tests.sae_runtime.edits.plain import plain_dictionaries

DICTIONARIES = {name: d.to(dtype=torch.float32) for name, d in plain_dictionaries(16).items()}
TOPK, GATED = DICTIONARIES["topk"], DICTIONARIES["gated"]
SITE = Site.parse("1.resid_post_mlp")


def activations(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) * 2


def compiled(*edits: Edit, prompt_length: int = 4, **options: Any) -> CompiledEdits:
    return CompiledEdits(edits, DICTIONARIES, prompt_length, token_bytes=lambda token: bytes([token]), **options)


def test_a_plan_is_kept_while_the_same_edits_cover_the_next_token() -> None:
    planner = EditPlanner()
    first, second = (
        compiled(Edit("topk", 1, "add", 1.0)),
        compiled(Edit("gated", 2, "scale", 2.0, positions="generated")),
    )

    def step(past: int, *rows: Any) -> Any:
        return planner.plan([RowEdits(edits, 4, past, 1) for edits in rows])

    kept = step(4, first, second, ())
    assert all(step(past, first, second, ()) is kept for past in range(5, 30))
    assert step(30, first, ()) is not kept
    assert step(31, first, second) is not kept  # another place in the batch
    unedited = step(32, (), ())
    assert not unedited
    assert unedited is step(33, (), ())


def test_a_plan_is_renewed_where_the_coverage_changes() -> None:
    planner = EditPlanner()
    edits = {
        "explicit": compiled(Edit("topk", 1, "add", 1.0, positions=(5, 6, 9))),
        "after": compiled(Edit("topk", 1, "add", 1.0, positions=AfterText("ab", "each", 2))),
        "values": compiled(Edit("topk", 1, "set", values=(0.5,) * 8)),
    }
    tokens = list(b"xxxx--ab----ab-")
    covered = {"explicit": [5, 6, 9], "after": [8, 9, 14], "values": list(range(8))}
    for name, own in edits.items():
        x = activations(1)
        plans = [planner.plan([RowEdits(own, 4, past, 1, tokens)]) for past in range(15)]
        assert [past for past, plan in enumerate(plans) if plan] == covered[name]
        assert all(torch.equal(plan.apply(SITE, x), x) == (not plan) for plan in plans)


def test_values_for_each_position_are_those_of_the_position() -> None:
    planner, d = EditPlanner(), DICTIONARIES["gated"]
    values = (0.5, 1.5, 2.5)
    own = compiled(Edit("gated", 1, "set", values=values))
    x = activations(1)
    z = d.encode_dense(x)[0, 1]
    for past, value in enumerate(values):
        changed = planner.plan([RowEdits(own, 4, past, 1)]).apply(SITE, x)
        torch.testing.assert_close(changed, x + (value - z) * d.decoder[1])


def test_a_row_has_its_own_memory_of_the_text() -> None:
    edits = compiled(Edit("topk", 1, "add", 1.0, positions=AfterText("b")))
    other = edits.for_another_row()
    a, b = list(b"aaab-"), list(b"aaaa-")
    for past in range(5):  # alternating: the one's text must not count for the other
        assert edits.key_at(past, a) == (past == 4)
        assert other.key_at(past, b) == 0
    # A row that is another one than before starts afresh, rather than going on with what was read.
    assert edits.key_at(4, b) == 0
    assert edits.key_at(4, a) == 1


@pytest.mark.parametrize("text", ["b", "ab", "aab", "é", "aé"])
@pytest.mark.parametrize("occurrence", ["first", "each"])
def test_a_text_may_end_inside_a_token(text: str, occurrence: Any) -> None:
    """Tokens of one to three bytes; against a search in the bytes before each token."""
    pieces = [b"a", b"ab", b"b", b"aab", "é".encode()[:1], "é".encode()[1:], "aé".encode(), b""]
    generator = torch.Generator().manual_seed(1)
    for limit in (1, 3):
        edits = CompiledEdits(
            [Edit("topk", 1, "add", 1.0, positions=AfterText(text, occurrence, limit))],
            DICTIONARIES,
            4,
            token_bytes=pieces.__getitem__,
        )
        tokens = torch.randint(len(pieces), (60,), generator=generator).tolist()
        found = edits.offsets(edits.parts[0], 0, 60, tokens)
        starts = [len(b"".join(pieces[t] for t in tokens[:n])) for n in range(60)]
        whole, pattern = b"".join(pieces[t] for t in tokens), text.encode()
        ends = [i + len(pattern) for i in range(len(whole)) if whole[i:].startswith(pattern)]
        expected: set[int] = set()
        for end in ends[:1] if occurrence == "first" else ends:
            after = [n for n in range(60) if starts[n] >= end]
            expected |= set(after[:limit])
        assert list(found) == sorted(expected)
        assert expected


def test_tokens_on_which_a_topk_latent_is_not_kept_stay_bitwise_the_same() -> None:
    """The latent is looked up without encoding in full; against the dictionary's own choice of the k largest."""
    x = activations(200, seed=2)
    for feature in (7, 20, 41):
        plan = plan_edits([RowEdits([Edit("topk", feature, "scale", 3.0)], 200, 0, 200)], DICTIONARIES)
        changed = plan.apply(SITE, x)
        z = TOPK.encode(x).to_dense()[:, feature, None]
        silent = z[:, 0] == 0
        assert 20 < silent.sum() < 190
        assert torch.equal(changed[silent], x[silent])
        expected = x + x.std(1, keepdim=True) * (2 * z) * TOPK.decoder[feature]
        torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


def test_a_token_whose_condition_does_not_hold_stays_bitwise_the_same() -> None:
    x = activations(50)
    x[:, 3] = -0.0
    for edit in (Edit("topk", 1, "set", 9.0), Edit("topk", 0, "replace")):
        never = replace(edit, condition=Condition(2, 1e9))
        changed = plan_edits([RowEdits([never], 50, 0, 50)], DICTIONARIES).apply(SITE, x)
        assert torch.equal(changed.view(torch.int32), x.view(torch.int32))


def test_rows_out_of_range_are_named() -> None:
    x = activations(6).half()
    strong, weak = Edit("gated", 1, "set", 1e6), Edit("gated", 1, "set", 1.0)
    rows = [RowEdits([weak], 2, 0, 2), RowEdits([strong], 1, 0, 1), RowEdits([], 2, 0, 2), RowEdits([strong], 1, 0, 1)]
    with pytest.raises(EditOutOfRange, match=r"leave the range of torch\.float16") as raised:
        plan_edits(rows, DICTIONARIES).apply(SITE, x)
    assert raised.value.rows == (1, 3)


def test_the_relative_change_is_bounded_row_by_row() -> None:
    x = activations(3)
    edit = Edit("gated", 1, "add", 2.0)
    sizes = 2.0 * GATED.decoder[1].norm() / x.norm(dim=1)
    order = sizes.argsort()
    middle = float(sizes[order[1]])
    bound = {"max_relative_change": middle * 1.001}
    rows = [RowEdits(compiled(edit, **bound), 4, 0, 1) for _ in range(2)] + [RowEdits(compiled(edit), 4, 0, 1)]
    with pytest.raises(EditOutOfRange, match="max_relative_change = ") as raised:
        plan_edits(rows, DICTIONARIES).apply(SITE, x[order[[0, 2, 2]]])
    assert raised.value.rows == (1,)
    # Each row has its own bound, and just below it passes; the last has none.
    torch.testing.assert_close(
        plan_edits(rows, DICTIONARIES).apply(SITE, x[order[[0, 1, 2]]]), x[order] + 2.0 * GATED.decoder[1]
    )
    assert math.isinf(compiled(edit).max_relative_change)


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(InvalidEdit, match="has not been run"):
        compiled(Edit("topk", 1, "resample", reference=Reference("x")))
    with pytest.raises(InvalidEdit, match="the bytes of tokens are not known"):
        CompiledEdits([Edit("topk", 1, "set", positions=AfterText("x"))], DICTIONARIES, 4)
    edits = compiled(Edit("topk", 1, "set", positions=AfterText("x")))
    with pytest.raises(ValueError, match="need the tokens of the row"):
        plan_edits([RowEdits(edits, 4, 0, 3)], DICTIONARIES)
    with pytest.raises(ValueError, match="a row of 2 tokens is to be edited up to position 3"):
        plan_edits([RowEdits(edits, 4, 0, 3, [1, 2])], DICTIONARIES)


def test_a_site_that_a_condition_reads_must_come_first() -> None:
    condition = Condition(1, 0.0, "relu")
    plan = plan_edits([RowEdits([Edit("topk", 1, "set", 1.0, condition=condition)], 2, 0, 2)], DICTIONARIES)
    assert [str(site) for site in plan.sites] == ["0.mlp_post_act", "1.resid_post_mlp"]
    with pytest.raises(RuntimeError, match="before the sites that its conditions read"):
        plan.apply(SITE, activations(2))
    wide = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert plan.apply(plan.sites[0], wide) is wide
    plan.apply(SITE, activations(2))


def test_an_edit_that_only_adds_does_not_ask_which_latents_are_active(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a TopK dictionary that takes the whole encoder, and the answer would change nothing."""
    asked: list[list[list[bool]]] = []

    class Watched(LatentReader):
        def __init__(self, dictionary: Dictionary, features: Tensor, wanted: Tensor) -> None:
            asked.append(wanted.tolist())
            super().__init__(dictionary, features, wanted)

    monkeypatch.setattr(apply, "LatentReader", Watched)
    edits = (
        Edit("topk", 1, "add", 1.0),
        Edit("topk", 2, "scale", 0.0),
        Edit("topk", 3, "add", 1.0, condition=Condition(feature=4, threshold=0.5)),
    )
    x = activations(2)
    plan = plan_edits([RowEdits(edits, 2, 0, 2)], DICTIONARIES)
    edited = plan.apply(SITE, x)
    assert asked == [[[False, True, False, True]] * 2]
    z = TOPK.encode_dense(x)
    _, statistics = TOPK.prepare(x)
    std = 1.0 if statistics is None else statistics.std
    change = torch.zeros_like(z)
    change[:, 1], change[:, 2], change[:, 3] = 1.0, -z[:, 2], (z[:, 4] > 0.5).float()
    torch.testing.assert_close(edited, x + std * (change @ TOPK.decoder))
