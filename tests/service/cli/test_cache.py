"""`saeserve cache` as it is called; the library's tests cover the cache itself."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from sae_runtime import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.cache import ActivationCache

Saeserve = Callable[..., tuple[int, str, str]]


def test_lists_and_clears_groups(saeserve: Saeserve, tmp_path: Path):
    folder, site = tmp_path / "cache", Site.parse("0.resid_pre")
    backbone = Backbone.random(n_layers=1, d_model=8, n_heads=2)
    ActivationCache(folder, backbone, [site], dtype=torch.float32, max_bytes=10**9).put([[1]], {site: torch.ones(1, 8)})
    code, printed, _ = saeserve("cache", "list", str(folder), "--json")
    [group] = json.loads(printed)
    assert (code, group["site"], group["passes"], group["backbone"]) == (0, "0.resid_pre", 1, backbone.name)
    assert group["group"] in saeserve("cache", "list", str(folder))[1]
    code, _, error = saeserve("cache", "clear", str(folder), "another")
    assert (code, "has no group 'another'" in error) == (1, True)
    assert "Deleted 1 groups" in saeserve("cache", "clear", str(folder), group["group"])[1]
    assert not folder.exists()
    assert "No cached activations" in saeserve("cache", "list", str(folder))[1]
