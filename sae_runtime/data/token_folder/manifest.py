"""What a token folder says about itself, and the shards it consists of.

manifest.json          TokenManifest
train-00000.npy        token ids of whole documents, one after the other; uint16, or uint32 for large vocabularies
train-00000.ends.npy   int64: where each document ends in it
held_out-00000.npy …   the same for the documents that training never sees
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST_FILE = "manifest.json"
Split = Literal["train", "held_out"]


class TokenizerReference(BaseModel):
    """The tokenizer that made the tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str = Field(description="Name of the backbone whose tokenizer it is.")
    fingerprint: str = Field(description="sha256 of vocabulary and merges.")
    vocab_size: int = Field(ge=1, description="Token ids are below this.")
    end_of_text: int = Field(ge=0, description="Id of the end-of-text token.")


class TokenShard(BaseModel):
    """One pair of files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^(train|held_out)-\d{5}$", description="Files are <name>.npy and <name>.ends.npy.")
    documents: int = Field(ge=1, description="Documents in it.")
    tokens: int = Field(ge=0, description="Tokens in it.")
    bytes: tuple[int, int] = Field(description="Sizes of the two files.")
    sha256: tuple[str, str] = Field(description="Checksums of the two files.")

    @property
    def files(self) -> tuple[str, str]:
        return f"{self.name}.npy", f"{self.name}.ends.npy"


class TokenManifest(BaseModel):
    """Everything about a token folder that its arrays do not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(1, description="Version of this form.")
    tokenizer: TokenizerReference
    context_length: int = Field(ge=2, description="Tokens in a row, where the training run does not say otherwise.")
    append_end_of_text: bool = Field(description="Every document ends with the end-of-text token.")
    prepend_begin_of_text: bool = Field(
        description="Every document begins with the end-of-text token, which is GPT-2's begin-of-text."
    )
    dtype: Literal["uint16", "uint32"]
    held_out_fraction: float = Field(ge=0, lt=1, description="Share of documents in held_out, chosen by a hash.")
    sources: tuple[dict[str, Any], ...] = Field(description="What was read: names and sizes.")
    code_version: str
    train: tuple[TokenShard, ...]
    held_out: tuple[TokenShard, ...]

    def shards(self, split: Split) -> tuple[TokenShard, ...]:
        return self.train if split == "train" else self.held_out

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards(split))

    def documents(self, split: Split) -> int:
        return sum(shard.documents for shard in self.shards(split))

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens' checksums and how they are to be read; not over names and versions."""
        sums = {split: [shard.sha256 for shard in self.shards(split)] for split in ("train", "held_out")}
        meaning = self.model_dump(include={"append_end_of_text", "prepend_begin_of_text", "dtype"})
        canonical = json.dumps(
            {"sums": sums, "meaning": meaning, "tokenizer": self.tokenizer.fingerprint}, sort_keys=True
        )
        return hashlib.sha256(canonical.encode()).hexdigest()


def is_token_folder(path: Path) -> bool:
    return (path / MANIFEST_FILE).is_file()


def lone_token_folder(data: Sequence[Path]) -> Path | None:
    """The token folder that `data` names, None if it names text files.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder that is no token folder, or one beside other data.
    """
    for path in data:
        if not path.exists():
            raise FileNotFoundError(f"no text file or token folder at {path}")
        if path.is_dir() and not is_token_folder(path):
            raise ValueError(f"{path} is a folder, expected files or a token folder (see saeserve tokenize)")
    folders = [path for path in data if path.is_dir()]
    if folders and len(data) > 1:
        raise ValueError(f"data names the token folder {folders[0]} and {len(data) - 1} more; expected it alone")
    return folders[0] if folders else None


def read_manifest(folder: Path) -> TokenManifest:
    """Raises:
    FileNotFoundError: the folder has no manifest.
    ValueError: the manifest cannot be read; says why.
    """
    path = folder / MANIFEST_FILE
    try:
        return TokenManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is not the manifest of a token folder: {where}: {first['msg']}") from error
