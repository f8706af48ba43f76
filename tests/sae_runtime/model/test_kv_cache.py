"""Decoding with a cache against the full forward (which test_backbone.py compares with Hugging Face)."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime import Backbone, PackedTokens, Site
from sae_runtime.model.kv_cache import KVCache
from tests import golden

GOLDEN = golden.FOLDER / "hooks_gpt2_tiny"
SITE = Site(2, "resid_post_mlp")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(GOLDEN)


def full_forward(backbone: Backbone, row: list[int]) -> tuple[Tensor, Tensor]:
    """Activations [T, d] and logits [T, vocab] of a row, without a cache."""
    result = backbone.forward(PackedTokens.from_rows([row]), capture=[SITE], logits="all")
    assert result.logits is not None
    return result.activations[SITE], result.logits


def check_step(backbone: Backbone, cache: KVCache, pieces: dict[int, tuple[list[int], int, int]]) -> None:
    """Runs {slot: (row, past, end)} in one batch and compares with the full forward of row[:end]."""
    packed = PackedTokens.from_rows(
        [row[past:end] for row, past, end in pieces.values()],
        past=[past for _, past, _ in pieces.values()],
        slots=list(pieces),
    )
    result = backbone.forward(packed, capture=[SITE], cache=cache, logits="last")
    assert result.logits is not None
    parts = result.activations[SITE].split(packed.lengths)
    for (row, past, end), part, logits in zip(pieces.values(), parts, result.logits, strict=True):
        activations, all_logits = full_forward(backbone, row[:end])
        torch.testing.assert_close(part, activations[past:], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(logits, all_logits[-1], atol=1e-4, rtol=1e-5)


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
    found = [list(row) for row in rows]
    for _ in range(20):
        with torch.inference_mode():
            logits = backbone.forward(packed, cache=cache, logits="last").logits
        assert logits is not None
        for row, token in zip(found, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
        packed = PackedTokens.from_rows([row[-1:] for row in found], past=[len(r) - 1 for r in found], slots=range(3))
    assert found == expected


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


def test_a_row_that_went_wrong_leaves_nothing_in_its_slot(backbone: Backbone) -> None:
    cache = backbone.new_cache(2, 32)
    packed = PackedTokens.from_rows([list(range(30)), [1, 2]], slots=[0, 1])
    ruined = backbone.forward(
        packed,
        cache=cache,
        logits="last",
        edit=lambda _, x: torch.where((packed.row_of_token == 0)[:, None], torch.nan, x),
        edit_sites=[Site(0, "resid_pre")],
    ).logits
    assert ruined is not None
    assert ruined[0].isnan().all()
    row, neighbour = [5, 6, 7, 8, 9], [1, 2, *range(40, 67)]
    check_step(backbone, cache, {0: (row, 0, 3), 1: (neighbour, 2, 28)})
    check_step(
        backbone, cache, {0: (row, 3, 4), 1: (neighbour, 28, 29)}
    )  # decoded together, over the longer row's keys
    check_step(backbone, cache, {0: (row, 4, 5)})


def test_the_cache_is_filled_though_nothing_else_is_asked_for(backbone: Backbone) -> None:
    cache, row = backbone.new_cache(1), list(range(12))
    backbone.forward(PackedTokens.from_rows([row[:11]], slots=[0]), cache=cache)
    check_step(backbone, cache, {0: (row, 11, 12)})


def test_a_cache_serves_with_and_without_inference_mode(backbone: Backbone) -> None:
    with torch.inference_mode():
        cache = backbone.new_cache(1)
        check_step(backbone, cache, {0: ([1, 2], 0, 2)})
    check_step(backbone, cache, {0: ([1, 2, 3], 2, 3)})
    with torch.no_grad():
        check_step(backbone, cache, {0: ([4], 0, 1)})


def test_bfloat16_decoding() -> None:
    backbone, row = Backbone.load(GOLDEN, dtype="bfloat16"), list(range(20, 40))
    whole = full_forward(backbone, row)[1][-1]
    cache = backbone.new_cache(1)
    backbone.forward(PackedTokens.from_rows([row[:-1]], slots=[0]), cache=cache)
    step = backbone.forward(PackedTokens.from_rows([row[-1:]], past=[19], slots=[0]), cache=cache, logits="last").logits
    assert step is not None
    assert (step[0] - whole).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize(
    ("rows", "past", "slots", "message"),
    [
        ([[1]], [0], [2], "slot 2 does not exist"),
        ([[1] * 9], [0], [0], "9 tokens does not fit a cache slot of 8"),
        ([[1]], [8], [0], "9 tokens does not fit a cache slot of 8"),
        ([[1]], [3], [1], "holds 0 tokens, but the row's past is 3"),
    ],
)
def test_rows_that_do_not_fit_the_cache(
    backbone: Backbone, rows: list[list[int]], past: list[int], slots: list[int], message: str
) -> None:
    packed = PackedTokens.from_rows(rows, past=past, slots=slots)
    with pytest.raises(ValueError, match=message):
        backbone.forward(packed, cache=backbone.new_cache(2, 8))


def test_cache_and_slots_come_together(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"needs PackedTokens\.slots"):
        backbone.forward(PackedTokens.from_rows([[1]]), cache=backbone.new_cache(1))
    with pytest.raises(ValueError, match="no cache was given"):
        backbone.forward(PackedTokens.from_rows([[1]], slots=[0]), logits="last")
    with pytest.raises(ValueError, match="context length of 64"):
        backbone.new_cache(1, 65)
    with pytest.raises(ValueError, match="at least one slot"):
        backbone.new_cache(0)


def test_memory_is_what_the_shape_says(backbone: Backbone) -> None:
    assert (
        backbone.new_cache(4, 16).nbytes == 2 * 3 * 4 * 16 * 32 * 4
    )  # keys and values, layers, slots, length, d, float32


class Arena:
    """Rows of any lengths that come, grow and go in one arena; checks every step against the full forward."""

    def __init__(self, backbone: Backbone, n_slots: int, max_tokens: int) -> None:
        self.backbone, self.cache = backbone, backbone.new_cache(n_slots, max_tokens=max_tokens)
        self.rows: dict[int, list[int]] = {}
        self.past: dict[int, int] = {}

    def start(self, slot: int, row: list[int]) -> None:
        self.cache.reserve(slot, len(row))
        self.rows[slot], self.past[slot] = row, 0

    def step(self, slots: list[int], n: int = 1) -> None:
        pieces = {
            slot: (self.rows[slot], self.past[slot], min(self.past[slot] + n, len(self.rows[slot]))) for slot in slots
        }
        check_step(self.backbone, self.cache, pieces)
        for slot, (_, _, end) in pieces.items():
            self.past[slot] = end

    def stop(self, slot: int) -> None:
        self.cache.release(slot)
        del self.rows[slot], self.past[slot]


def test_rows_of_any_length_share_an_arena(backbone: Backbone) -> None:
    """Reservations of many sizes come and go until free places lie apart and rows must be moved."""
    rng = random.Random(3)
    arena, moves = Arena(backbone, 8, 100), 0
    move = arena.cache._move_together

    def counted() -> None:
        nonlocal moves
        moves += 1
        move()

    arena.cache._move_together = counted  # type: ignore[method-assign]
    for _ in range(60):
        length = rng.randint(2, 40)
        free = [slot for slot in range(8) if slot not in arena.rows]
        if free and length <= arena.cache.free_tokens:
            arena.start(rng.choice(free), [rng.randrange(120) for _ in range(length)])
        chosen = [slot for slot in arena.rows if rng.random() < 0.8]
        if chosen:
            arena.step(chosen, rng.choice([1, 1, 1, 7]))
        for slot in [slot for slot, row in arena.rows.items() if arena.past[slot] == len(row)]:
            arena.stop(slot)
    assert moves > 2
    assert arena.cache.free_tokens == 100 - sum(map(len, arena.rows.values()))


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


def test_a_copied_row_goes_on_by_itself(backbone: Backbone) -> None:
    arena = Arena(backbone, 3, 90)
    row = [3, 1, 4, 1, 5, 9, 2, 6]
    for slot, rest in enumerate(([7, 7, 7], [8, 9, 10, 11], [2])):
        arena.start(slot, [*row, *rest])
    arena.step([0], len(row))
    arena.cache.copy(0, [1, 2], len(row))
    arena.past = dict.fromkeys(arena.past, len(row))
    arena.step([0, 1, 2])
    arena.step([0, 1])
    with pytest.raises(ValueError, match="holds 10 tokens, not 11"):
        arena.cache.copy(0, [2], 11)
    with pytest.raises(ValueError, match="10 tokens does not fit a cache slot of 9"):
        arena.cache.copy(0, [2], 10)


def test_reservations_are_bounded(backbone: Backbone) -> None:
    cache = backbone.new_cache(2, 32, max_tokens=40)
    assert cache.nbytes == 2 * 3 * 40 * 32 * 4
    cache.reserve(0, 30)
    for slot, n, message in [
        (0, 1, "has 30 tokens reserved already"),
        (1, 33, "expected 1 to 32"),
        (1, 11, "11 tokens do not fit the cache: 10 of 40 are free"),
        (2, 1, "slot 2 does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.reserve(slot, n)
    with pytest.raises(ValueError, match="slot 1 has no tokens reserved"):
        cache.release(1)
    with pytest.raises(ValueError, match="slot 1 has no tokens reserved"):
        backbone.forward(PackedTokens.from_rows([[1]], slots=[1]), cache=cache)
    with pytest.raises(ValueError, match="31 tokens does not fit a cache slot of 30"):
        backbone.forward(PackedTokens.from_rows([[1] * 31], slots=[0]), cache=cache)
