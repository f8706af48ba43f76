from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sae_runtime import Backbone
from tests.sae_runtime.model.tiny_gpt2 import GOLDEN


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(GOLDEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden model that a test may change."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    return tmp_path
