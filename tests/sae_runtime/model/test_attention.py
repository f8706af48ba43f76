"""Attention with a cache: rows of every kind in one batch, as the full forward and Hugging Face compute them."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime import Backbone, PackedTokens, Site
from tests.sae_runtime.model.decoding import check_step, full_forward
from tests.sae_runtime.model.tiny_gpt2 import GOLDEN


def test_rows_that_start_and_grow_at_different_times(backbone: Backbone) -> None:
    """Prompts, pieces of prompts and decoded tokens mixed in one batch, in any order of slots, with gaps."""
    rng = random.Random(0)
    cache = backbone.new_cache(n_slots=20, max_length=48)
    rows: dict[int, list[int]] = {}
    past: dict[int, int] = {}
    for _ in range(30):
        free = [slot for slot in (0, 1, 2, 3, 7, 18, 19) if slot not in rows]
        if free and rng.random() < 0.6:
            slot = rng.choice(free)
            rows[slot] = [rng.randrange(120) for _ in range(rng.randrange(2, 48))]
            past[slot] = 0
        chosen = rng.sample(list(rows), rng.randint(1, len(rows))) if rows else []
        if not chosen:
            continue
        pieces = {}
        for slot in chosen:
            step = rng.choice([1, 1, 1, 5, 30])
            pieces[slot] = (rows[slot], past[slot], min(past[slot] + step, len(rows[slot])))
        check_step(backbone, cache, pieces)
        for slot, (row, _, end) in pieces.items():
            past[slot] = end
            if end == len(row):
                del rows[slot], past[slot]


def test_greedy_decoding_equals_hugging_face_generate(backbone: Backbone) -> None:
    model = GPT2LMHeadModel.from_pretrained(GOLDEN, use_safetensors=True).eval()
    rows = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
    expected = [
        model.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row)),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=-1,
        )[0].tolist()
        for row in rows
    ]
    cache = backbone.new_cache(3)
    packed = PackedTokens.from_rows(rows, slots=range(3))
    decoded = [list(row) for row in rows]
    for _ in range(20):
        with torch.inference_mode():
            logits = backbone.forward(packed, cache=cache, logits="last").logits
        assert logits is not None
        for row, token in zip(decoded, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
        packed = PackedTokens.from_rows(
            [row[-1:] for row in decoded], past=[len(row) - 1 for row in decoded], slots=range(3)
        )
    assert decoded == expected


def test_edits_act_on_decoded_tokens(backbone: Backbone) -> None:
    row, sites = list(range(10, 30)), [Site(0, "resid_post_mlp"), Site(1, "mlp_post_act")]

    def edit(_: Site, x: Tensor) -> Tensor:
        return 0.7 * x + 0.2 * x.roll(1, -1)

    whole = backbone.forward(PackedTokens.from_rows([row]), edit=edit, edit_sites=sites, logits="all").logits
    assert whole is not None
    cache = backbone.new_cache(1)
    for past in range(len(row)):
        packed = PackedTokens.from_rows([row[past : past + 1]], past=[past], slots=[0])
        step = backbone.forward(packed, cache=cache, edit=edit, edit_sites=sites, logits="last").logits
        assert step is not None
        torch.testing.assert_close(step[0], whole[past], atol=1e-4, rtol=1e-5)


def test_bfloat16_decoding() -> None:
    backbone, row = Backbone.load(GOLDEN, dtype="bfloat16"), list(range(20, 40))
    whole = full_forward(backbone, row)[1][-1]
    cache = backbone.new_cache(1)
    backbone.forward(PackedTokens.from_rows([row[:-1]], slots=[0]), cache=cache)
    step = backbone.forward(PackedTokens.from_rows([row[-1:]], past=[19], slots=[0]), cache=cache, logits="last").logits
    assert step is not None
    assert (step[0] - whole).norm() < 0.02 * whole.norm()


def test_a_row_of_nan_between_two_others_stays_alone(backbone: Backbone) -> None:
    """Rows that decode together, one of them NaN from this step on."""
    cache = backbone.new_cache(3, max_tokens=60)
    for slot, size in enumerate((20, 20, 20)):
        cache.reserve(slot, size)
    rows = {0: [1, 2, 3], 1: [7, 8], 2: list(range(20, 38))}
    packed = PackedTokens.from_rows([row[:-1] for row in rows.values()], slots=list(rows))
    backbone.forward(packed, cache=cache)
    packed = PackedTokens.from_rows(
        [row[-1:] for row in rows.values()], past=[len(row) - 1 for row in rows.values()], slots=list(rows)
    )
    logits = backbone.forward(
        packed,
        cache=cache,
        logits="last",
        edit=lambda _, x: torch.where((packed.row_of_token == 1)[:, None], torch.nan, x),
        edit_sites=[Site(0, "resid_pre")],
    ).logits
    assert logits is not None
    for i, row in rows.items():
        expected = full_forward(backbone, row)[1][-1]
        if i == 1:
            assert logits[i].isnan().all()
        else:
            torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=1e-5)
    cache.release(1)
    cache.reserve(1, 4)
    assert bool(torch.isfinite(cache._arena).all())
