import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.data.token_folder.manifest import TokenManifest
from sae_runtime.data.token_folder.tokenize import TokenizeConfig, tokenize
from tests.sae_runtime.data.token_folder.examples import texts, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    return [write_jsonl(tmp_path / "a.jsonl", texts(80)), write_jsonl(tmp_path / "b.jsonl.xz", texts(60, 1), lzma.open)]


@pytest.fixture
def make(tmp_path: Path, tiny_backbone_folder: Path) -> Callable[..., TokenManifest]:
    def call(sources: list[Any], progress: Any = None, restart: bool = False, **settings: Any) -> TokenManifest:
        settings = {"out": tmp_path / "tokens", "backbone": str(tiny_backbone_folder), "shard_tokens": 1000} | settings
        return tokenize(TokenizeConfig(sources=tuple(map(str, sources)), **settings), progress, restart=restart)

    return call
