"""The plan against arithmetic by hand, and the tables of SCALING.md against the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import sae_runtime.training
from sae_runtime.training.distributed.estimate import (
    H100,
    best_split,
    estimate,
    main,
    most_latents,
    splits,
)
from sae_runtime.training.distributed.plan import RunShape, exchanges, persistent_bytes

SCALING = Path(sae_runtime.training.__file__).parent / "SCALING.md"
WIDE = RunShape(
    n_latents=1 << 24,
    d_in=12_288,
    k=256,
    batch_tokens=131_072,
    n_shards=256,
    data_parallel_size=2,
    micro_batch_tokens=8192,
)


def test_arithmetic_by_hand() -> None:
    """65,536 latents of width 12,288 on a shard; 65,536 tokens in a replica."""
    weights = 2 * 65_536 * 12_288 + 65_536 + 12_288
    assert persistent_bytes(WIDE) == 12 * weights + 16 + 8 * 65_536
    sent = {line.what: line.sent(WIDE) for line in exchanges(WIDE)}
    assert sent["gradients"] == 4 * weights  # two replicas: half of it twice
    assert sent["reconstructions"] == pytest.approx(2 * 255 / 256 * 65_536 * 12_288 * 4)
    assert sent["activations"] == 255 * (65_536 // 256) * 12_288 * 2
    found = estimate(WIDE)
    assert found.product_s == pytest.approx(2 * 65_536 * 65_536 * 12_288 / (0.4 * 989e12))
    assert found.network_s == pytest.approx(found.sent / (0.8 * 50e9))
    assert found.step_s == found.product_s + found.memory_s + found.network_s


def test_shards_within_a_node_talk_faster() -> None:
    small = replace(WIDE, d_in=768, n_shards=8, data_parallel_size=1)
    found = estimate(small)
    assert found.network_s == pytest.approx(found.sent / (0.8 * 450e9))
    two_nodes = replace(small, data_parallel_size=2)
    network = sum(
        line.sent(two_nodes) / (0.8 * (450e9 if line.meeting.group == "shards" else 50e9))
        for line in exchanges(two_nodes)
    )
    assert estimate(two_nodes).network_s == pytest.approx(network)


def test_the_split_is_the_fastest_that_fits() -> None:
    for workers in (8, 64, 512):
        best = best_split(WIDE, workers)
        fitting = [e for e in (estimate(each) for each in splits(WIDE, workers)) if e.held <= 0.9 * H100.memory]
        assert (best is None) == (not fitting)
        if best is not None:
            assert best.shape.workers == workers
            assert best.step_s == min(e.step_s for e in fitting)
    assert best_split(WIDE, 8) is None
    most = most_latents(WIDE, 8)
    assert best_split(replace(WIDE, n_latents=most), 8) is not None
    assert best_split(replace(WIDE, n_latents=2 * most), 8) is None


@pytest.mark.parametrize("flags", ["--d-in 12288 --gpus 8 64 512", "--d-in 4096 --k 128", "--d-in 768 --k 32"])
def test_the_tables_of_the_document_are_those_of_the_plan(capsys: pytest.CaptureFixture[str], flags: str) -> None:
    document = SCALING.read_text()
    assert f"python -m sae_runtime.training.distributed.estimate {flags}\n" in document
    main(flags.split())
    table = capsys.readouterr().out.split("\n\n")[0]
    assert len(table.splitlines()) == 5
    assert table in document
