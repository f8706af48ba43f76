"""Texts, files of them, and what a token folder holds."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_runtime.data.token_folder.reader import TokenFolder


def texts(n: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdef é", k=generator.randint(0, 90))) + f" {i}" for i in range(n)]


def write_jsonl(path: Path, documents: list[str], open_file: Callable[..., Any] = open, field: str = "text") -> Path:
    with open_file(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({field: text}) + "\n" for text in documents)
    return path


def stored(folder: Path, split: Any) -> list[list[int]]:
    opened = TokenFolder(folder)
    return [opened.document(split, i) for i in range(opened.n_documents(split))]
