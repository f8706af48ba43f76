"""Edits of a batch: kept while nothing changes, nothing encoded without need, rows at fault named, bits left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runtime import Dictionary, Edit, Site, SparseFeatures
from sae_runtime.dictionary.readings import Readings
from sae_runtime.edits import (
    AfterText,
    BatchEdits,
    BatchRow,
    Condition,
    EditOutOfRange,
    InvalidEdit,
    Reference,
    RowEdits,
)
from tests.builders import dictionaries_of_all_kinds

DICTIONARIES = {name: d.to(dtype=torch.float32) for name, d in dictionaries_of_all_kinds(16).items()}
TOPK, GATED = DICTIONARIES["topk"], DICTIONARIES["gated"]
SITE = Site.parse("1.resid_post_mlp")


def activations(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) * 2


def row_edits(*edits: Edit, prompt_length: int = 4, **options: Any) -> RowEdits:
    return RowEdits(edits, DICTIONARIES, prompt_length, token_bytes=lambda token: bytes([token]), **options)


def test_the_arrays_are_kept_while_the_same_edits_cover_the_next_token() -> None:
    first, second = (
        row_edits(Edit("topk", 1, "add", 1.0)),
        row_edits(Edit("gated", 2, "scale", 2.0, positions="generated")),
    )

    def step(before: BatchEdits, past: int, *rows: RowEdits | None) -> BatchEdits:
        return before.for_step([BatchRow(edits, past, 1) for edits in rows])

    kept = step(BatchEdits(), 4, first, second, None)
    assert all(step(kept, past, first, second, None) is kept for past in range(5, 30))
    assert step(kept, 30, first, None) is not kept
    assert step(kept, 31, first, None, second) is not kept  # another place in the batch
    unedited = step(kept, 32, None, None)
    assert not unedited
    assert unedited is step(unedited, 33, None, None)


def test_the_arrays_are_renewed_where_the_coverage_changes() -> None:
    edits = {
        "explicit": row_edits(Edit("topk", 1, "add", 1.0, positions=(5, 6, 9))),
        "after": row_edits(Edit("topk", 1, "add", 1.0, positions=AfterText("ab", "each", 2))),
        "values": row_edits(Edit("topk", 1, "set", values=(0.5,) * 8)),
    }
    tokens = list(b"xxxx--ab----ab-")
    covered = {"explicit": [5, 6, 9], "after": [8, 9, 14], "values": list(range(8))}
    for name, own in edits.items():
        x, batch, editing = activations(1), BatchEdits(), []
        for past in range(15):
            batch = batch.for_step([BatchRow(own, past, 1, tokens)])
            editing += [past] if batch else []
            assert torch.equal(batch.apply(SITE, x), x) == (not batch)
        assert editing == covered[name]


def test_values_for_each_position_are_those_of_the_position() -> None:
    batch, d = BatchEdits(), DICTIONARIES["gated"]
    values = (0.5, 1.5, 2.5)
    own = row_edits(Edit("gated", 1, "set", values=values))
    x = activations(1)
    z = d.encode_dense(x)[0, 1]
    for past, value in enumerate(values):
        batch = batch.for_step([BatchRow(own, past, 1)])
        torch.testing.assert_close(batch.apply(SITE, x), x + (value - z) * d.decoder[1])


def test_a_row_has_its_own_memory_of_the_text() -> None:
    edits = row_edits(Edit("topk", 1, "add", 1.0, positions=AfterText("b")))
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
        edits = RowEdits(
            [Edit("topk", 1, "add", 1.0, positions=AfterText(text, occurrence, limit))],
            DICTIONARIES,
            4,
            token_bytes=pieces.__getitem__,
        )
        tokens = torch.randint(len(pieces), (60,), generator=generator).tolist()
        found = edits.offsets(edits.ready[0], 0, 60, tokens)
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
        batch = BatchEdits([BatchRow(row_edits(Edit("topk", feature, "scale", 3.0)), 0, 200)])
        changed = batch.apply(SITE, x)
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
        changed = BatchEdits([BatchRow(row_edits(never), 0, 50)]).apply(SITE, x)
        assert torch.equal(changed.view(torch.int32), x.view(torch.int32))


def test_rows_out_of_range_are_named() -> None:
    x = activations(6).half()
    strong, weak = Edit("gated", 1, "set", 1e6), Edit("gated", 1, "set", 1.0)
    lengths = ((row_edits(weak), 2), (row_edits(strong), 1), (None, 2), (row_edits(strong), 1))
    rows = [BatchRow(edits, 0, length) for edits, length in lengths]
    with pytest.raises(EditOutOfRange, match=r"leave the range of torch\.float16") as raised:
        BatchEdits(rows).apply(SITE, x)
    assert raised.value.rows == (1, 3)


def test_the_relative_change_is_bounded_row_by_row() -> None:
    x = activations(3)
    edit = Edit("gated", 1, "add", 2.0)
    sizes = 2.0 * GATED.decoder[1].norm() / x.norm(dim=1)
    order = sizes.argsort()
    middle = float(sizes[order[1]])
    bound = {"max_relative_change": middle * 1.001}
    rows = [BatchRow(row_edits(edit, **bound), 0, 1) for _ in range(2)] + [BatchRow(row_edits(edit), 0, 1)]
    with pytest.raises(EditOutOfRange, match="max_relative_change = ") as raised:
        BatchEdits(rows).apply(SITE, x[order[[0, 2, 2]]])
    assert raised.value.rows == (1,)
    # Each row has its own bound, and just below it passes; the last has none.
    torch.testing.assert_close(BatchEdits(rows).apply(SITE, x[order[[0, 1, 2]]]), x[order] + 2.0 * GATED.decoder[1])
    assert math.isinf(row_edits(edit).max_relative_change)


def test_what_cannot_be_row_edits() -> None:
    with pytest.raises(InvalidEdit, match="has not been run"):
        row_edits(Edit("topk", 1, "resample", reference=Reference("x")))
    with pytest.raises(InvalidEdit, match="the bytes of tokens are not known"):
        RowEdits([Edit("topk", 1, "set", positions=AfterText("x"))], DICTIONARIES, 4)
    edits = row_edits(Edit("topk", 1, "set", positions=AfterText("x")))
    with pytest.raises(ValueError, match="need the tokens of the row"):
        BatchEdits([BatchRow(edits, 0, 3)])
    with pytest.raises(ValueError, match="a row of 2 tokens is to be edited up to position 3"):
        BatchEdits([BatchRow(edits, 0, 3, [1, 2])])


def test_a_site_that_a_condition_reads_must_come_first() -> None:
    condition = Condition(1, 0.0, "relu")
    batch = BatchEdits([BatchRow(row_edits(Edit("topk", 1, "set", 1.0, condition=condition)), 0, 2)])
    assert [str(site) for site in batch.sites] == ["0.mlp_post_act", "1.resid_post_mlp"]
    with pytest.raises(RuntimeError, match="before the sites that its conditions read"):
        batch.apply(SITE, activations(2))
    wide = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert batch.apply(batch.sites[0], wide) is wide
    batch.apply(SITE, activations(2))


@dataclass(frozen=True, eq=False, kw_only=True)
class CountedDictionary(Dictionary):
    """Counts the tokens that are encoded in full."""

    encoded: list[int] = field(default_factory=list)

    def encode(self, x: Tensor) -> SparseFeatures:
        self.encoded.append(len(x))
        return super().encode(x)


def counted(name: str) -> CountedDictionary:
    return CountedDictionary(**{each.name: getattr(DICTIONARIES[name], each.name) for each in fields(Dictionary)})


def test_topk_is_encoded_only_where_a_latent_that_matters_may_be_kept() -> None:
    dictionary = counted("topk")
    x = activations(40)
    z = dictionary.encode_dense(x)
    dictionary.encoded.clear()
    pre = (dictionary.prepare(x)[0] @ dictionary.encoder.T + dictionary.latent_bias)[:, [2, 4]]
    edits = (
        Edit("topk", 1, "add", 1.0),  # adds the same whatever the latent is
        Edit("topk", 2, "scale", 0.0),
        Edit("topk", 3, "add", 1.0, condition=Condition(feature=4, threshold=0.5)),
    )
    edited = BatchEdits([BatchRow(RowEdits(edits, {"topk": dictionary}, 40), 0, 40)]).apply(SITE, x)
    positive = int((pre > 0).any(1).sum())
    assert 10 < positive < 40
    assert dictionary.encoded == [positive]
    change = torch.zeros_like(z)
    change[:, 1], change[:, 2], change[:, 3] = 1.0, -z[:, 2], (z[:, 4] > 0.5).float()
    torch.testing.assert_close(edited, x + x.std(1, keepdim=True) * (change @ TOPK.decoder))

    only_adds = BatchEdits([BatchRow(RowEdits(edits[:1], {"topk": dictionary}, 40), 0, 40)])
    only_adds.apply(SITE, x)
    assert dictionary.encoded == [positive]


def test_relu_like_latents_are_read_alone_unless_all_are_read_anyway() -> None:
    dictionary = counted("gated")
    x = activations(6)
    edits = RowEdits([Edit("gated", 1, "scale", 3.0)], {"gated": dictionary}, 3)
    batch = BatchEdits([BatchRow(None, 0, 3), BatchRow(edits, 0, 3)])
    alone = batch.apply(SITE, x)
    assert dictionary.encoded == []
    readings = Readings()
    readings.want(dictionary, np.arange(1, 6))
    torch.testing.assert_close(batch.apply(SITE, x, readings), alone)
    (reading,) = readings.made
    assert dictionary.encoded == [5]
    assert reading is readings.read(dictionary, x)
    torch.testing.assert_close(reading.rows(np.arange(1, 6)).to_dense(), GATED.encode_dense(x[1:]))


def test_edits_conditions_and_replacements_share_one_reading() -> None:
    dictionary = counted("topk")
    x = activations(20)
    rows = [
        [Edit("topk", 5, "scale", 2.0), Edit("topk", 6, "set", 1.0, condition=Condition(7, 0.1))],
        [Edit("topk", 0, "replace"), Edit("topk", 8, "ablate_zero")],
    ]
    batch = BatchEdits([BatchRow(RowEdits(edits, {"topk": dictionary}, 10), 0, 10) for edits in rows])
    readings = Readings()
    together = batch.apply(SITE, x, readings)
    assert len(dictionary.encoded) == len(readings.made) == 1
    for row, edits in enumerate(rows):
        tokens = slice(10 * row, 10 * row + 10)
        by_itself = BatchEdits([BatchRow(RowEdits(edits, DICTIONARIES, 10), 0, 10)]).apply(SITE, x[tokens])
        torch.testing.assert_close(together[tokens], by_itself)
