"""The cache of keys and values: what its slots hold, and how rows of any length share its arena."""

from __future__ import annotations

import random

import pytest
import torch

from sae_runtime import Backbone, PackedTokens, Site
from tests.sae_runtime.model.decoding import Arena, check_step


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


def test_rows_of_any_length_share_an_arena(backbone: Backbone) -> None:
    """Reservations of many sizes come and go until the free cells lie apart and rows must be moved."""
    rng = random.Random(3)
    arena, moves = Arena(backbone, 8, 100), 0
    move = arena.cache._compact

    def counted() -> None:
        nonlocal moves
        moves += 1
        move()

    arena.cache._compact = counted  # type: ignore[method-assign]
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
