"""Rows of tokens from what a run's settings name: for training, and held-out ones for evaluation and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.documents import Document
from sae_runtime.data.rows import (
    CutterState,
    RowCutter,
    TrainingRows,
    encode_texts,
    is_held_out,
    mixed_documents,
    shuffled_held_out,
    take_tokens,
)
from sae_runtime.data.text_files import unicode_name
from sae_runtime.data.token_folder.manifest import lone_token_folder, read_manifest
from sae_runtime.data.token_folder.reader import (
    DocumentFolderRows,
    PackedFolderRows,
    TokenFolder,
    shuffled_documents,
)
from sae_runtime.model.backbone import Backbone
from sae_runtime.training.activations.streams import RowSource
from sae_runtime.training.config import TrainingConfig

_HELD_OUT_CHARACTERS_PER_TOKEN = 16  # read so much held-out text per token wanted, so that the choice is a fair sample


def token_folder_path(config: TrainingConfig) -> Path | None:
    """The token folder that `data` names, None if it names text files.

    Raises:
        FileNotFoundError: a path of `data` or `held_out` does not exist.
        ValueError: a token folder beside other data, a folder that is none, or another held-out share than it has.
    """
    folder = lone_token_folder(config.data)
    for path in config.held_out:
        if not path.exists():
            raise FileNotFoundError(f"no text file at {path}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected files")
    if folder is None:
        return None
    fraction = read_manifest(folder).held_out_fraction
    if "held_out_fraction" in config.model_fields_set and config.held_out_fraction != fraction:
        raise ValueError(
            f"held_out_fraction is {config.held_out_fraction}, but {folder} was tokenized with {fraction}; "
            "leave the setting out or tokenize again"
        )
    return folder


def data_fingerprint(config: TrainingConfig) -> str:
    """Tells the content of a token folder from others'. Empty for text: its rows compare what they read again."""
    folder = token_folder_path(config)
    return "" if folder is None else read_manifest(folder).fingerprint


def describe_data(config: TrainingConfig) -> str:
    """The training data in a sentence, for the provenance of a dictionary."""
    folder = token_folder_path(config)
    if folder is not None:
        manifest = read_manifest(folder)
        return f"{folder.name} ({manifest.tokens('train')} training tokens, fingerprint {manifest.fingerprint})"
    return ", ".join(f"{unicode_name(path)} ({path.stat().st_size} bytes)" for path in config.data)


def row_cutter(config: TrainingConfig, backbone: Backbone, bad: BadDocuments | None = None) -> RowCutter:
    """How this run cuts text into rows.

    Raises:
        ValueError: the context length is over the backbone's, or the backbone has no tokenizer.
    """
    folder = token_folder_path(config)
    default = backbone.context_length if folder is None else read_manifest(folder).context_length
    context_length = config.context_length or default
    if context_length > backbone.context_length:
        raise ValueError(f"context_length is {context_length}, the backbone reads at most {backbone.context_length}")
    encode, end_of_text = encode_texts(backbone)
    bad = bad or BadDocuments(config.bad_documents)
    return RowCutter(encode, end_of_text, context_length, config.rows, config.prepend_end_of_text, bad)


def training_rows(config: TrainingConfig, backbone: Backbone, bad: BadDocuments | None = None) -> RowSource:
    """The rows that the run trains on, endless; held-out documents are never among them.

    Raises:
        FileNotFoundError: a data file does not exist.
        ValueError: as `row_cutter`; a token folder is of another tokenizer, damaged, or without training text.
    """
    path, cutter = token_folder_path(config), row_cutter(config, backbone, bad)
    if path is None:
        return TrainingRows(config.data, cutter, 0.0 if config.held_out else config.held_out_fraction)
    folder = TokenFolder(path)
    folder.check(backbone)
    if cutter.mode == "packed":
        return PackedFolderRows(folder, cutter)
    if cutter.prepend_end_of_text and folder.manifest.prepend_begin_of_text:
        raise ValueError(f"prepend_end_of_text: the documents of {path} begin with that token already")
    return DocumentFolderRows(folder, cutter)


def held_out_rows(
    config: TrainingConfig, backbone: Backbone, n_tokens: int, bad: BadDocuments | None = None
) -> Iterator[list[int]]:
    """Rows of held-out text, at least `n_tokens` tokens together or all there is; a seeded mixture of all documents.

    Raises:
        ValueError: there is not enough held-out text for one row, or a document cannot be read.
    """
    cutter, state = row_cutter(config, backbone, bad), CutterState()
    path = token_folder_path(config)
    if path is not None and not config.held_out:
        folder = TokenFolder(path)
        folder.check(backbone)
        order = shuffled_documents(folder, config.seed)
        tokens = (folder.text_tokens(folder.document("held_out", i)) for i in order)
        rows, n_documents = cutter.cut_tokens(tokens, state), len(order)
    else:
        documents: Iterator[Document]
        if config.held_out:
            documents = mixed_documents(config.held_out, cutter.bad)
        else:
            documents = (
                d for d in mixed_documents(config.data, cutter.bad) if is_held_out(d, config.held_out_fraction)
            )
        chosen = shuffled_held_out(documents, n_tokens * _HELD_OUT_CHARACTERS_PER_TOKEN, config.seed)
        rows, n_documents = cutter.cut(chosen, state), len(chosen)
    empty = True
    for row in take_tokens(rows, n_tokens):
        empty = False
        yield row
    if empty and len(state.remainder) > 1:
        empty = False
        yield state.remainder
    if empty:
        raise ValueError(
            f"no held-out text ({n_documents} documents): give held_out files or a larger held_out_fraction"
        )
