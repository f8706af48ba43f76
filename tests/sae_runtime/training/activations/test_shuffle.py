"""The buffer gives out every row once, mixes far beyond a chunk, and stays within its bound."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sae_runtime.model.sites import Site
from sae_runtime.training.activations.shuffle import ShuffleBuffer

SITE, WIDER = Site.parse("0.resid_pre"), Site.parse("0.mlp_post_act")


def numbered(n_rows: int, chunk: int, start: int = 0) -> Iterator[dict[Site, Tensor]]:
    for first in range(start, n_rows, chunk):
        numbers = torch.arange(first, min(first + chunk, n_rows), dtype=torch.float32)[:, None]
        yield {SITE: numbers.expand(-1, 3), WIDER: -numbers.expand(-1, 5)}


def batches(buffer: ShuffleBuffer, size: int) -> list[Tensor]:
    out = []
    while True:
        try:
            batch = buffer.next_batch(size)
            assert torch.equal(batch[SITE][:, :1].expand(-1, 5), -batch[WIDER])  # the sites stay together
            out.append(batch[SITE])
        except StopIteration:
            return out


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_every_row_comes_exactly_once(chunk: int) -> None:
    given = torch.cat(batches(ShuffleBuffer(numbered(1000, chunk), 128, seed=0), 20))
    assert given.shape == (1000, 3)
    assert torch.equal(given[:, 0].sort().values, torch.arange(1000.0))
    assert torch.equal(given[:, 0], given[:, 2])


def test_neighbours_are_spread_over_the_buffers_length() -> None:
    capacity, size = 1024, 64
    order = torch.cat(batches(ShuffleBuffer(numbered(16 * capacity, 100), capacity, seed=0), size))[:, 0]
    place = torch.empty_like(order)
    place[order.long()] = torch.arange(float(len(order)))
    steady = place[2 * capacity : -2 * capacity]
    distance = steady.diff().abs()
    # Rows that were neighbours in the stream come out several batches apart, as far as a shuffled window allows.
    assert distance.median() > capacity / 6
    assert (distance < size).float().mean() < 0.2
    # A batch spans more of the stream than the half that was last read.
    spans = torch.stack([b[:, 0].max() - b[:, 0].min() for b in order[2 * capacity : -2 * capacity, None].split(size)])
    assert spans.median() > capacity


def test_memory_is_bounded_by_the_capacity() -> None:
    pulled = 0

    def stream() -> Iterator[dict[Site, Tensor]]:
        nonlocal pulled
        for chunk in numbered(10_000, 50):
            pulled += len(chunk[SITE])
            yield chunk

    buffer = ShuffleBuffer(stream(), 256, seed=0)
    for given in range(32, 8000, 32):
        buffer.next_batch(32)
        held = buffer.state_dict()
        assert held["held"]["0.resid_pre"].shape == (256, 3)
        assert pulled - given <= 256 + 50
        assert held["chunk"] is None or held["chunk"]["0.resid_pre"].untyped_storage().nbytes() <= 50 * 3 * 4


def test_continues_exactly_from_a_state() -> None:
    expected = batches(ShuffleBuffer(numbered(2000, 30), 128, seed=3), 16)
    pulled = [0]

    def counted() -> Iterator[dict[Site, Tensor]]:
        for chunk in numbered(2000, 30):
            pulled[0] += len(chunk[SITE])
            yield chunk

    first = ShuffleBuffer(counted(), 128, seed=3)
    for i in range(41):
        assert torch.equal(first.next_batch(16)[SITE], expected[i])
    second = ShuffleBuffer(numbered(2000, 30, start=pulled[0]), 128, seed=99)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(batches(second, 16), expected[41:], strict=True))


def test_peek_takes_nothing() -> None:
    buffer = ShuffleBuffer(numbered(500, 30), 128, seed=0)
    peeked = buffer.peek(50)
    given = [buffer.next_batch(25) for _ in range(2)]
    for site in (SITE, WIDER):
        assert torch.equal(peeked[site], torch.cat([batch[site] for batch in given]))


def test_errors_name_the_bound() -> None:
    with pytest.raises(ValueError, match="needs a buffer of 200, this one holds 128"):
        ShuffleBuffer(numbered(500, 30), 128, seed=0).next_batch(100)
    with pytest.raises(ValueError, match="stream of activations is empty"):
        ShuffleBuffer(iter([]), 128, seed=0).peek(1)
