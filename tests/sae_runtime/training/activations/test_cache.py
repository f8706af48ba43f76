"""A cache gives the numbers that the backbone would, to whoever makes the same pass, within its bound, always."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations import cache as activation_cache
from sae_runtime.training.activations.cache import ActivationCache, clear_cache, list_groups
from sae_runtime.training.activations.source import open_activation_source
from sae_runtime.training.config import TrainingConfig
from tests.sae_runtime.training.activations.test_source import assert_same, batches, corpus, settings

pytestmark = pytest.mark.any_cpu

__all__ = ["corpus", "settings"]  # fixtures
SITES = [Site.parse("0.resid_pre"), Site.parse("1.resid_post_mlp")]
ROWS = [[1, 2, 3], [4, 5]]


def cache_of(folder: Path, backbone: Backbone, **changes: Any) -> ActivationCache:
    options: dict[str, Any] = {"sites": SITES, "dtype": torch.float32, "max_bytes": 10**9} | changes
    return ActivationCache(folder, backbone, options.pop("sites"), **options)


def some(n: int = 5, sites: list[Site] | None = None) -> dict[Site, Tensor]:
    return {site: torch.randn(n, 16) for site in sites or SITES}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_second_training_and_later_epochs_need_no_backbone(
    settings: dict[str, Any],
    tiny_backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overlap: str,
) -> None:
    expected = batches(open_activation_source(TrainingConfig(**settings), tiny_backbone, SITES), 150)
    config = TrainingConfig(**settings, cache=tmp_path / "cache", overlap=overlap)
    passes = []
    forward = tiny_backbone.forward
    monkeypatch.setattr(tiny_backbone, "forward", lambda *a, **k: passes.append(a) or forward(*a, **k))
    source = open_activation_source(config, tiny_backbone, SITES)
    assert_same(batches(source, 150), expected)
    source.close()
    n_passes = len(passes)
    entries = len(list((tmp_path / "cache").glob("*/*.pass")))
    assert entries == 2 * n_passes  # one a site; an epoch's passes come again in the next
    other = open_activation_source(
        TrainingConfig(**settings, cache=tmp_path / "cache", n_latents=99), tiny_backbone, SITES
    )
    assert_same(batches(other, 150), expected)
    assert len(passes) == n_passes
    # One of the sites alone finds its part, another context length nothing.
    one = open_activation_source(config, tiny_backbone, SITES[1:])
    assert torch.equal(one.next_batch(64)[SITES[1]], expected[0][SITES[1]])
    assert len(passes) == n_passes
    short = open_activation_source(config.model_copy(update={"context_length": 15}), tiny_backbone, SITES)
    short.next_batch(64)
    assert len(passes) > n_passes
    for each in (other, one, short):
        each.close()


def test_epochs_repeat_their_passes(settings: dict[str, Any], tiny_backbone: Backbone, tmp_path: Path) -> None:
    config = TrainingConfig(**settings, cache=tmp_path / "cache")
    source = open_activation_source(config, tiny_backbone, SITES)
    counts = []
    for _ in range(4):
        batches(source, 150)
        counts.append(len(list((tmp_path / "cache").glob("*/*.pass"))))
    n_epochs = source._reader.state_of(0)["epoch"]  # read so far
    assert n_epochs >= 2
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_stored_dtype_is_trained_on_whether_read_or_computed(
    settings: dict[str, Any], tiny_backbone: Backbone, tmp_path: Path, dtype: str
) -> None:
    plain = batches(open_activation_source(TrainingConfig(**settings), tiny_backbone, SITES), 40)
    config = TrainingConfig(**settings, cache=tmp_path / "cache", cache_dtype=dtype)
    for _ in range(2):
        found = batches(open_activation_source(config, tiny_backbone, SITES), 40)
        assert found[0][SITES[0]].dtype == getattr(torch, dtype)
        assert_same(found, [{site: x.to(getattr(torch, dtype)) for site, x in batch.items()} for batch in plain])


def test_what_matters_is_in_the_key(tiny_backbone: Backbone, tmp_path: Path) -> None:
    cache_of(tmp_path, tiny_backbone).put(ROWS, some())
    assert cache_of(tmp_path, tiny_backbone).get(ROWS) is not None
    assert cache_of(tmp_path, tiny_backbone).get([[1, 2], [3, 4, 5]]) is None  # the same tokens in other rows
    assert cache_of(tmp_path, tiny_backbone).get([[4, 5], [1, 2, 3]]) is None
    assert cache_of(tmp_path, tiny_backbone, dtype=torch.float16).get(ROWS) is None
    assert cache_of(tmp_path, tiny_backbone, skip_first=True).get(ROWS) is None
    assert cache_of(tmp_path, tiny_backbone, sites=[*SITES, Site.parse("0.resid_post_mlp")]).get(ROWS) is None
    other = Backbone.random(n_layers=2, d_model=16, n_heads=2, vocab_size=257, context_length=32, seed=1)
    assert cache_of(tmp_path, other).get(ROWS) is None
    half = Backbone.random(
        n_layers=2, d_model=16, n_heads=2, vocab_size=257, context_length=32, seed=1, dtype="bfloat16"
    )
    cache_of(tmp_path, other).put(ROWS, some())
    assert cache_of(tmp_path, half).get(ROWS) is None


def test_values_that_float16_cannot_hold_are_refused(tiny_backbone: Backbone, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny_backbone, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"activations at 0\.resid_pre reach 70000, more than float16 holds"):
        cache.put(ROWS, {site: torch.full((5, 16), 70_000.0) for site in SITES})


@pytest.mark.parametrize("damage", [b"", b"SAEc", None])
def test_a_damaged_entry_is_computed_again(tiny_backbone: Backbone, tmp_path: Path, damage: bytes | None) -> None:
    cache = cache_of(tmp_path, tiny_backbone)
    given = some()
    cache.put(ROWS, given)
    file = next(tmp_path.glob("1.resid_post_mlp-*/*.pass"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage is None else damage)
    assert cache.get(ROWS) is None
    assert not file.exists()
    cache.put(ROWS, given)
    again = cache.get(ROWS)
    assert again is not None
    assert all(torch.equal(again[site], given[site]) for site in SITES)


def test_the_bound_holds_and_what_is_there_stays(tiny_backbone: Backbone, tmp_path: Path) -> None:
    bound = 20_000
    cache = cache_of(tmp_path, tiny_backbone, max_bytes=bound)
    for i in range(50):
        cache.put([[i]], some())
        assert size_of(tmp_path) <= bound
    assert size_of(tmp_path) > bound / 2
    kept = [i for i in range(50) if cache.get([[i]]) is not None]
    assert kept == list(range(len(kept)))
    assert len(kept) > 10


def test_groups_of_other_runs_make_room_the_oldest_first(tiny_backbone: Backbone, tmp_path: Path) -> None:
    for age, site in ((300, "0.resid_pre"), (200, "0.mlp_post_act"), (100, "0.resid_post_mlp")):
        cache_of(tmp_path, tiny_backbone, sites=[Site.parse(site)]).put(ROWS, {Site.parse(site): torch.randn(100, 16)})
        used = next(tmp_path.glob(f"{site}-*/used"))
        os.utime(used, (time.time() - age, time.time() - age))
    before = size_of(tmp_path)
    cache = cache_of(tmp_path, tiny_backbone, sites=SITES[1:], max_bytes=before + 1000)
    cache.put(ROWS, {SITES[1]: torch.randn(100, 16)})
    assert size_of(tmp_path) <= before + 1000
    assert [group.description["site"] for group in list_groups(tmp_path)] == [
        "0.mlp_post_act",
        "0.resid_post_mlp",
        "1.resid_post_mlp",
    ]


def test_a_full_disk_stops_adding_and_nothing_else(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path, tiny_backbone)
    given = some()
    cache.put(ROWS, given)
    replace = Path.replace

    def full(self: Path, target: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device.*training goes on"):
        stored = cache.put([[9]], given)
    assert all(torch.equal(stored[site], given[site]) for site in SITES)
    monkeypatch.setattr(Path, "replace", replace)
    cache.put([[10]], given)  # silently left out
    assert list(tmp_path.rglob("*.tmp")) == []
    assert cache.get(ROWS) is not None
    assert cache.get([[9]]) is None
    assert cache.get([[10]]) is None


WRITE_UNTIL_KILLED = """
import sys, torch
from pathlib import Path
from sae_runtime import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.cache import ActivationCache
site = Site.parse("0.resid_pre")
backbone = Backbone.random(n_layers=1, d_model=16, n_heads=2)
cache = ActivationCache(Path(sys.argv[1]), backbone, [site], dtype=torch.float32, max_bytes=10**9)
i = 0
while True:
    cache.put([[i]], {site: torch.full((20_000, 16), float(i))})
    i += 1
    if i == 3:
        print("going", flush=True)
"""


def test_a_killed_run_leaves_whole_entries(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    site = Site.parse("0.resid_pre")
    backbone = Backbone.random(n_layers=1, d_model=16, n_heads=2)
    half = next(tmp_path.glob("*/used")).parent / "x.pass.1.tmp"  # as a kill in the middle of a write leaves it
    half.write_bytes(b"half")
    os.utime(half, (time.time() - 7200, time.time() - 7200))
    cache = ActivationCache(tmp_path, backbone, [site], dtype=torch.float32, max_bytes=10**9)
    assert not half.exists()
    n_entries = len(list(tmp_path.glob("*/*.pass")))
    found = [cache.get([[i]]) for i in range(n_entries)]
    assert n_entries >= 3
    assert all(x is not None and torch.equal(x[site], torch.full((20_000, 16), float(i))) for i, x in enumerate(found))


def test_groups_are_listed_and_cleared(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache_of(folder, tiny_backbone).put(ROWS, some())
    (folder / "mine.txt").write_text("not a group")
    groups = list_groups(folder)
    assert [(group.description["site"], group.passes) for group in groups] == [
        ("0.resid_pre", 1),
        ("1.resid_post_mlp", 1),
    ]
    assert groups[0].description["fingerprint"] == tiny_backbone.fingerprint
    with pytest.raises(ValueError, match="has no group 'other'"):
        clear_cache(folder, ["other"])
    assert clear_cache(folder, [groups[0].name]) == groups[:1]
    assert list_groups(folder) == groups[1:]
    clear_cache(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert list_groups(tmp_path / "absent") == []


def test_groups_say_what_they_are(tiny_backbone: Backbone, tmp_path: Path) -> None:
    cache_of(tmp_path, tiny_backbone, dtype=torch.bfloat16)
    description = json.loads(next(tmp_path.glob("0.resid_pre-bfloat16-*/group.json")).read_text())
    assert description["stored_as"] == "bfloat16"
    assert description["computed_in"] == "float32"
    assert description["format"] == activation_cache._FORMAT
