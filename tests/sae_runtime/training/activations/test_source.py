"""Batches of activations: every number of workers sees the same, several sites agree, and positions restore exactly."""

import io
import json
import random
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.run_rows import training_rows
from sae_runtime.training.activations.source import ActivationSource, merge_source_states, open_activation_source
from sae_runtime.training.config import TrainingConfig

SITES = [Site.parse("0.resid_pre"), Site.parse("1.mlp_post_act")]
WORDS = ("rows", "of", "tokens", "are", "dealt", "to", "lanes", "one", "after", "the", "other")


class Worker:
    """A communicator of a worker that is asked for its place only."""

    n_shards = 1
    shard_rank = 0

    def __init__(self, data_rank: int, data_parallel_size: int) -> None:
        self.data_rank = data_rank
        self.data_parallel_size = data_parallel_size


class Shard(Worker):
    """A worker whose replica's shards meet in threads."""

    def __init__(self, shard_rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__(0, 1)
        self.n_shards, self.shard_rank = len(table), shard_rank
        self._meeting, self._table = meeting, table

    def gather_over_shards(self, tensor: Tensor) -> Tensor:
        self._table[self.shard_rank] = tensor
        self._meeting.wait(30)
        gathered = torch.stack(self._table)
        self._meeting.wait(30)
        return gathered


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    lines = [{"text": " ".join(generator.choices(WORDS, k=generator.randint(5, 80)))} for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def settings(corpus: Path, tiny_backbone_folder: Path) -> dict[str, Any]:
    return {
        "site": "0.resid_pre",
        "data": [corpus],
        "backbone": str(tiny_backbone_folder),
        "out": "unused",
        "k": 4,
        "batch_tokens": 64,
        "backbone_tokens": 128,
        "buffer_tokens": 1024,
        "context_length": 16,
    }


def batches(source: ActivationSource, n: int, size: int = 64) -> list[dict[Site, Tensor]]:
    return [source.next_batch(size) for _ in range(n)]


def assert_same(found: list[dict[Site, Tensor]], expected: list[dict[Site, Tensor]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert list(a) == list(b)
        for site in a:
            assert torch.equal(a[site], b[site])


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("extra", [{}, {"rows": "documents", "prepend_end_of_text": True}])
def test_each_token_of_an_epoch_comes_once_with_the_model_s_activations(
    settings: dict[str, Any], tiny_backbone: Backbone, extra: dict[str, Any]
) -> None:
    config = TrainingConfig(**settings, **extra)
    rows = training_rows(config, tiny_backbone)
    epoch = [row for row in islice(rows, 4000) if rows.epoch == 0]
    first = int(config.prepend_end_of_text)
    expected: Counter[bytes] = Counter()
    for row in epoch:
        activations = tiny_backbone.activations(torch.tensor([row]), sites=[SITES[0]])[str(SITES[0])][0]
        expected.update(x.numpy().tobytes() for x in activations[first:])  # embeddings: the same in every batch
    source = open_activation_source(config, tiny_backbone, [SITES[0]])
    n_tokens = sum(expected.values())
    given = torch.cat([batch[SITES[0]] for batch in batches(source, 3 * n_tokens // 64)])
    found = Counter(x.numpy().tobytes() for x in given)
    # After three epochs' worth every token came about three times: only what is in the buffer may be missing or ahead.
    assert set(found) == set(expected)
    assert sum(abs(found[x] - 3 * expected[x]) for x in expected) <= 2 * config.buffer_tokens


def test_sites_are_read_in_one_pass_and_stay_together(
    settings: dict[str, Any], tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(**settings)
    alone = [batches(open_activation_source(config, tiny_backbone, [site]), 30) for site in SITES]
    passes = []
    forward = tiny_backbone.forward
    monkeypatch.setattr(tiny_backbone, "forward", lambda *a, **k: passes.append(k["capture"]) or forward(*a, **k))
    together = batches(open_activation_source(config, tiny_backbone, SITES), 30)
    assert all(set(capture) == set(SITES) for capture in passes)
    assert [list(batch) for batch in together] == [SITES] * 30
    for batch, first, second in zip(together, *alone, strict=True):
        assert torch.equal(batch[SITES[0]], first[SITES[0]])
        assert torch.equal(batch[SITES[1]], second[SITES[1]])
    assert together[0][SITES[1]].shape == (64, 64)


@pytest.mark.parametrize("extra", [{}, {"rows": "documents"}, {"data_lanes": 4}])
def test_every_number_of_workers_sees_the_same_batches(
    settings: dict[str, Any], tiny_backbone: Backbone, extra: dict[str, Any]
) -> None:
    config = TrainingConfig(**settings, **extra)
    expected = batches(open_activation_source(config, tiny_backbone, SITES), 50)
    for n in (2, 4):
        workers = [open_activation_source(config, tiny_backbone, SITES, Worker(i, n)) for i in range(n)]  # type: ignore[arg-type]
        parts = [batches(worker, 50, 64 // n) for worker in workers]
        joined = [{site: torch.cat([p[site] for p in step]) for site in SITES} for step in zip(*parts, strict=True)]
        assert_same(joined, expected)


def test_latent_shards_share_the_reading_of_their_replica(settings: dict[str, Any], tiny_backbone: Backbone) -> None:
    config = TrainingConfig(**settings)
    expected = batches(open_activation_source(config, tiny_backbone, SITES), 20)
    meeting, table = threading.Barrier(2), [None, None]
    results: dict[int, Any] = {}

    def work(shard_rank: int) -> None:
        source = open_activation_source(config, tiny_backbone, SITES, Shard(shard_rank, meeting, table))  # type: ignore[arg-type]
        results[shard_rank] = batches(source, 20), len(source.state_dict()["lanes"])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for shard_rank in range(2):
        assert_same(results[shard_rank][0], expected)
        assert results[shard_rank][1] == 4  # streams of eight


@pytest.mark.parametrize("extra", [{}, {"rows": "documents", "prepend_end_of_text": True}])
@pytest.mark.parametrize("taken", [0, 1, 9, 40, 90])
def test_it_continues_exactly_with_any_number_of_workers(
    settings: dict[str, Any], tiny_backbone: Backbone, extra: dict[str, Any], taken: int
) -> None:
    config = TrainingConfig(**settings, **extra)
    expected = batches(open_activation_source(config, tiny_backbone, SITES), 120)
    workers = [open_activation_source(config, tiny_backbone, SITES, Worker(i, 2)) for i in range(2)]  # type: ignore[arg-type]
    states = []
    for worker in workers:
        batches(worker, taken, 32)
        states.append(through_file(worker.state_dict()))
    state = merge_source_states(states)
    for n in (1, 2, 4):
        resumed = [open_activation_source(config, tiny_backbone, SITES, Worker(i, n)) for i in range(n)]  # type: ignore[arg-type]
        for worker in resumed:
            worker.load_state_dict(through_file(state))
        parts = [batches(worker, 120 - taken, 64 // n) for worker in resumed]
        joined = [{site: torch.cat([p[site] for p in step]) for site in SITES} for step in zip(*parts, strict=True)]
        assert_same(joined, expected[taken:])


def test_peek_takes_nothing(settings: dict[str, Any], tiny_backbone: Backbone) -> None:
    config = TrainingConfig(**settings)
    source = open_activation_source(config, tiny_backbone, SITES)
    peeked = source.peek(64)
    assert_same([source.next_batch(64)], [peeked])
    assert source.peek(10**6)[SITES[0]].shape[0] <= config.buffer_tokens


def test_text_shorter_than_a_stream_is_dealt_to_all(
    settings: dict[str, Any], tiny_backbone: Backbone, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("only three rows of sixteen tokens and a bit, not eight")
    source = open_activation_source(
        TrainingConfig(**{**settings, "data": [short], "held_out": [short]}), tiny_backbone, SITES
    )
    assert len(batches(source, 20)) == 20


def test_errors_say_what_does_not_fit(settings: dict[str, Any], tiny_backbone: Backbone, tmp_path: Path) -> None:
    config = TrainingConfig(**settings)
    with pytest.raises(ValueError, match=r"8 data streams cannot be shared equally by 3 workers"):
        open_activation_source(config, tiny_backbone, SITES, Worker(0, 3))  # type: ignore[arg-type]
    source = open_activation_source(config, tiny_backbone, SITES)
    with pytest.raises(ValueError, match="a batch of 60 tokens cannot be read equally from 8 data streams"):
        source.next_batch(60)
    other = open_activation_source(TrainingConfig(**settings, data_lanes=4), tiny_backbone, SITES)
    with pytest.raises(ValueError, match="is of 4 data streams, this run has 8"):
        source.load_state_dict(other.state_dict())
    half = open_activation_source(config, tiny_backbone, SITES, Worker(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds data streams 4, 5, 6, 7; stream 0 is missing"):
        source.load_state_dict(half.state_dict())
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        open_activation_source(TrainingConfig(**{**settings, "data": [tmp_path / "missing.txt"]}), tiny_backbone, SITES)
    with pytest.raises(ValueError, match="multiple of data_lanes = 3"):
        TrainingConfig(**settings, data_lanes=3)
