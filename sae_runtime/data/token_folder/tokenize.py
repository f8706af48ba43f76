"""Text to a token folder (`saeserve tokenize`): finished shards survive an interruption, it appears whole."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_runtime.atomic import atomic_file, flush_folder
from sae_runtime.data.bad_documents import BadDocumentRule, BadDocuments
from sae_runtime.data.documents import Document, mix
from sae_runtime.data.rows import Encode, encode_texts, encoded, is_held_out, with_text
from sae_runtime.data.sources import DocumentSource, find_sources
from sae_runtime.data.token_folder.manifest import (
    MANIFEST_FILE,
    Split,
    TokenizerReference,
    TokenManifest,
    TokenShard,
)
from sae_runtime.data.token_folder.shard_files import OpenShard, check_sums
from sae_runtime.model.backbone import Backbone
from sae_runtime.version import installed_version

_JOURNAL = "journal.json"
_PROGRESS_INTERVAL_S = 0.5


class TokenizeConfig(BaseModel):
    """What is tokenized, how, and into which folder. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="Text: .txt, .md or .jsonl files (also .xz, .gz or .zst), .parquet files, folders of them, Hugging "
        "Face data sets saved on disk, or their hub names (owner/name, owner/name@configuration).",
    )
    out: Path = Field(description="Folder that the tokens are written to; it must not exist yet.")
    bad_documents: BadDocumentRule = "stop"
    backbone: str = Field("builtin", description="Backbone whose tokenizer is used: builtin, a folder or a hub name.")
    context_length: int | None = Field(
        None, ge=2, description="Tokens in a row when the folder is trained on; the backbone's own if not given."
    )
    append_end_of_text: bool = Field(True, description="End every document with the end-of-text token.")
    prepend_begin_of_text: bool = Field(
        False, description="Begin every document with the end-of-text token, which is GPT-2's begin-of-text as well."
    )
    held_out_fraction: float = Field(
        0.02, ge=0, lt=1, description="Share of documents, chosen by a hash of their text, that training never sees."
    )
    text_field: str = Field("text", description="Field or column of a record that holds the text.")
    split: str = Field("train", description="Split of a Hugging Face data set that is read.")
    shard_tokens: int = Field(1 << 26, ge=1, description="A file is finished once it holds so many training tokens.")
    max_tokens: int | None = Field(
        None, ge=1, description="Stop once there are so many training tokens; everything if not given."
    )


@dataclass(frozen=True)
class TokenizeProgress:
    """How far tokenizing is."""

    documents: int
    tokens: int
    """Of both splits."""
    share: float
    """Of the sources read, 0 to 1, by their size."""
    tokens_per_second: float
    """Since this call began; what an earlier, interrupted call did is not counted."""


ProgressCallback = Callable[[TokenizeProgress], None]


def tokenize(
    config: TokenizeConfig, progress: ProgressCallback | None = None, *, restart: bool = False
) -> TokenManifest:
    """Writes the token folder that `config` describes and returns its manifest.

    Works in "<out>.partial". If that is there, it goes on after the last finished shard: documents that are in shards
    are read again but not tokenized, and the result is the same as without the interruption. Sources may have changed
    meanwhile, as when a bad line was mended, but not in the documents that are in shards.

    Args:
        restart: throw an unfinished folder away instead.

    Raises:
        FileExistsError: `config.out` exists.
        FileNotFoundError: a source does not exist.
        ModuleNotFoundError: a source needs a package that is not installed; names it.
        ValueError: a source or a document cannot be read, there is no text, or the unfinished folder is of other
            settings or sources. What was tokenized before a document that cannot be read is kept.
        OSError: the disk is full; finished shards are kept.
    """
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; remove it or choose another `out`")
    with BadDocuments(config.bad_documents) as bad:
        return _tokenize(config, bad, progress, restart=restart)


def _tokenize(
    config: TokenizeConfig, bad: BadDocuments, progress: ProgressCallback | None, *, restart: bool
) -> TokenManifest:
    sources = find_sources(config.sources, text_field=config.text_field, split=config.split, bad=bad)
    backbone = Backbone.load(config.backbone)
    encode, end_of_text = encode_texts(backbone)
    context_length = config.context_length or backbone.context_length
    if context_length > backbone.context_length:
        raise ValueError(f"context_length is {context_length}, the backbone reads at most {backbone.context_length}")
    manifest = TokenManifest(
        tokenizer=TokenizerReference(
            backbone=config.backbone,
            fingerprint=backbone.tokenizer_fingerprint,
            vocab_size=backbone.vocab_size,
            end_of_text=end_of_text,
        ),
        context_length=context_length,
        append_end_of_text=config.append_end_of_text,
        prepend_begin_of_text=config.prepend_begin_of_text,
        dtype="uint16" if backbone.vocab_size <= 1 << 16 else "uint32",
        held_out_fraction=config.held_out_fraction,
        sources=tuple(source.identity for source in sources),
        code_version=installed_version("saeserve") or "unknown",
        train=(),
        held_out=(),
    )
    partial = config.out.with_name(config.out.name + ".partial")
    if restart:
        shutil.rmtree(partial, ignore_errors=True)
    writer = _Writer(config, manifest, encode, bad, partial, _Meter(sources, progress))
    writer.write(sources)
    finished = writer.manifest()
    if not finished.train:
        raise ValueError(f"no text to train on in {', '.join(config.sources)}")
    _put_manifest(partial, finished)
    partial.replace(config.out)
    flush_folder(config.out.parent)
    return finished


@dataclass
class _Meter:
    """Turns documents into progress events."""

    sources: Sequence[DocumentSource]
    callback: ProgressCallback | None
    begun: float = field(default_factory=time.monotonic)
    event_at: float = 0.0
    before: int = 0
    """Tokens of an earlier call."""

    def show(self, documents: int, tokens: int, *, done: bool = False) -> None:
        now = time.monotonic()
        if self.callback is None or (not done and now - self.event_at < _PROGRESS_INTERVAL_S):
            return
        self.event_at = now
        size = sum(source.size for source in self.sources) or 1
        share = sum(source.size * source.share_read() for source in self.sources) / size
        rate = (tokens - self.before) / max(now - self.begun, 1e-9)
        self.callback(TokenizeProgress(documents, tokens, 1.0 if done else share, rate))


class _Writer:
    """Documents to shards; a journal says after each pair of shards what is finished."""

    def __init__(
        self,
        config: TokenizeConfig,
        manifest: TokenManifest,
        encode: Encode,
        bad: BadDocuments,
        folder: Path,
        meter: _Meter,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._encode = encode
        self._bad = bad
        self._folder = folder
        self._meter = meter
        self._open = self._empty()
        self._sizes: list[int] = []
        self._shards: dict[Split, list[TokenShard]] = {"train": [], "held_out": []}
        self._documents = 0  # documents of the sources that are in shards or open
        self._text_hash = ""  # of those documents
        self._tokens = 0
        self._identity = {
            "settings": config.model_dump(mode="json", exclude={"out", "sources", "bad_documents"}),
            "sources": list(manifest.sources),
            "tokenizer": manifest.tokenizer.fingerprint,
        }

    def manifest(self) -> TokenManifest:
        return self._manifest.model_copy(
            update={"train": tuple(self._shards["train"]), "held_out": tuple(self._shards["held_out"])}
        )

    def write(self, sources: Sequence[DocumentSource]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sizes = [source.size for source in sources]
        if not self._resume():
            documents = mix(zip(self._sizes, map(iter, sources), strict=True))
            self._read_again(documents)
            try:
                self._tokenize(documents)
            except ValueError:  # a bad document
                if any(map(len, self._open.values())):
                    self._close_shards(finished=False)
                raise
            self._close_shards(finished=True)
        self._meter.show(self._documents, self._tokens, done=True)

    def _read_again(self, documents: Iterator[Document]) -> None:
        """Passes over the documents that are in shards, and checks that they are still the same."""
        text_hash = ""
        for document in islice(documents, self._documents):
            text_hash = with_text(text_hash, document)
            self._meter.show(self._documents, self._tokens)
        if self._text_hash not in ("", text_hash):  # older folders have none
            raise ValueError(
                f"the {self._documents:,} documents that {self._folder} was begun with have changed: restore them, or "
                "restart (--restart) to throw it away"
            )
        self._text_hash = text_hash

    def _tokenize(self, documents: Iterator[Document]) -> None:
        for document, ids in encoded(documents, self._encode, self._bad):
            self._add(document, ids)
            if len(self._open["train"]) >= self._config.shard_tokens:
                self._close_shards(finished=False)
            self._meter.show(self._documents, self._tokens)
            if self._config.max_tokens is not None and self._trained() >= self._config.max_tokens:
                break

    def _add(self, document: Document, ids: list[int]) -> None:
        self._documents += 1
        self._text_hash = with_text(self._text_hash, document)
        if not ids:
            return
        end = [self._manifest.tokenizer.end_of_text]
        stored = (end if self._config.prepend_begin_of_text else []) + ids
        stored += end if self._config.append_end_of_text else []
        self._tokens += len(stored)
        split: Split = "held_out" if is_held_out(document, self._config.held_out_fraction) else "train"
        self._open[split].add(stored)

    def _empty(self) -> dict[Split, OpenShard]:
        return {"train": OpenShard(self._manifest.dtype), "held_out": OpenShard(self._manifest.dtype)}

    def _trained(self) -> int:
        return len(self._open["train"]) + sum(shard.tokens for shard in self._shards["train"])

    def _close_shards(self, *, finished: bool) -> None:
        """Writes what is open and then the journal: only what the journal names counts."""
        for split, shard in self._open.items():
            if len(shard):
                name = f"{split}-{len(self._shards[split]):05}"
                self._shards[split].append(shard.write(self._folder, name))
        self._open = self._empty()
        journal = {
            "identity": self._identity,
            "finished": finished,
            "sizes": self._sizes,
            "documents": self._documents,
            "text_hash": self._text_hash,
            "tokens": self._tokens,
            "shards": {split: [shard.model_dump() for shard in shards] for split, shards in self._shards.items()},
        }
        _write_atomically(self._folder / _JOURNAL, json.dumps(journal, indent=1))

    def _resume(self) -> bool:
        """Takes over the finished shards of an interrupted call. True if nothing is left to read."""
        path = self._folder / _JOURNAL
        if not path.exists():
            return False
        advice = "go on with the settings of before, or restart (--restart) to throw it away"
        try:
            journal: dict[str, Any] = json.loads(path.read_text())
            recorded = journal["identity"]
            shards = {
                split: [TokenShard.model_validate(shard) for shard in journal["shards"][split]]
                for split in self._shards
            }
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {advice}") from error
        expected = json.loads(json.dumps(self._identity))
        if "text_hash" in journal and not journal["finished"]:  # the documents will be read again and compared
            for identity in (recorded, expected):
                identity["sources"] = [source["name"] for source in identity["sources"]]
        if recorded != expected:
            raise ValueError(f"{self._folder} was begun with other {_difference(recorded, expected)}; {advice}")
        for split, finished in shards.items():
            for shard in finished:
                check_sums(self._folder, shard)
            self._shards[split] = finished
        self._documents, self._tokens = journal["documents"], journal["tokens"]
        self._text_hash = journal.get("text_hash", "")
        # Sources are mixed by their sizes of before, so that a changed one gives the same order.
        self._sizes = journal.get("sizes", self._sizes)
        self._meter.before = self._tokens
        return bool(journal["finished"])


def _difference(recorded: dict[str, Any], expected: dict[str, Any]) -> str:
    if recorded.get("sources") != expected["sources"]:
        return "sources (names, sizes or times differ)"
    if recorded.get("tokenizer") != expected["tokenizer"]:
        return f"tokenizer ({recorded.get('tokenizer')}, now {expected['tokenizer']})"
    theirs, ours = recorded.get("settings", {}), expected["settings"]
    names = [name for name in ours if theirs.get(name) != ours[name]]
    return "settings: " + ", ".join(f"{name} was {theirs.get(name)!r}, is {ours[name]!r}" for name in names[:3])


def _put_manifest(folder: Path, manifest: TokenManifest) -> None:
    named = {file for shard in (*manifest.train, *manifest.held_out) for file in shard.files}
    _write_atomically(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1))
    for path in folder.iterdir():
        if path.name not in named and path.name != MANIFEST_FILE:
            path.unlink()  # the journal, and shards that an interruption left half written
    flush_folder(folder)


def _write_atomically(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
