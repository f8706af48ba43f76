"""The golden tiny GPT-2, and ways to change a copy of its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_runtime import Backbone
from tests import golden

GOLDEN = golden.FOLDER / "hooks_gpt2_tiny"
IDS = torch.tensor([[1, 2, 3, 4, 5]])
SITE = "2.resid_post_mlp"


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(actual: Backbone, expected: Backbone) -> bool:
    a, b = actual.activations(IDS, sites=[SITE]), expected.activations(IDS, sites=[SITE])
    return torch.equal(a[SITE], b[SITE]) and actual.fingerprint == expected.fingerprint
