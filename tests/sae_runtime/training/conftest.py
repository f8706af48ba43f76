"""A tiny run of the offline job: a corpus of words, and settings that train in a second."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

WORDS = ("a", "small", "dictionary", "latent", "fires", "on", "every", "word", "that", "begins", "with", "this")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    lines = [{"text": " ".join(generator.choices(WORDS, k=generator.randint(5, 80)))} for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def tiny_settings(words: Path, tiny_backbone_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "site": "1.resid_post_mlp",
        "data": [words],
        "backbone": str(tiny_backbone_folder),
        "out": tmp_path / "tiny",
        "n_latents": 64,
        "k": 8,
        "tokens": 3_000,
        "batch_tokens": 128,
        "backbone_tokens": 512,
        "buffer_tokens": 2048,
        "held_out_fraction": 0.1,
        "evaluation_tokens": 200,
        "statistics_tokens": 200,
        "aux_k": 8,
        "dead_after_tokens": 1000,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "backbone_dtype": "float32",
        "compute_dtype": "bfloat16",
    }
