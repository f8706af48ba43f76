"""Dictionary formats, one file per format, and the loader that recognises them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_runtime.builtin import DICTIONARIES
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import dictionary_learning, openai, saelens, sparsify
from sae_runtime.dictionary.formats.published import MANIFEST_FILE, load_published
from sae_runtime.dictionary.formats.torch_file import read_torch_file
from sae_runtime.errors import DictionaryFormatError, FingerprintMismatch, UnknownDictionary

if TYPE_CHECKING:
    from sae_runtime.model.backbone import Backbone

KNOWN_FORMATS = (
    f"a published dictionary (a folder with {MANIFEST_FILE}), a folder of SAELens (cfg.json and "
    f"{saelens.WEIGHTS_FILE}), sparsify (cfg.json and {sparsify.WEIGHTS_FILE}) or dictionary_learning "
    f"({dictionary_learning.WEIGHTS_FILE}), or OpenAI's sparse_autoencoder (a .pt file)"
)


def list_builtin_dictionaries() -> list[str]:
    """Names of the dictionaries that ship with the package, sorted."""
    return sorted(path.parent.name for path in DICTIONARIES.glob(f"*/{MANIFEST_FILE}"))


def load_dictionary(
    path_or_name: str | os.PathLike[str],
    *,
    backbone: Backbone | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Dictionary:
    """A dictionary from a folder or file of any supported format, or a builtin one ("builtin/NAME" or just NAME).

    A file may be the weights or the configuration in a folder of such a format, or a .pt file of OpenAI or
    dictionary_learning. Weights in any floating dtype are loaded as `dtype`. With a `backbone`, the dictionary must
    belong to it. Code in a file is never run.

    Raises:
        UnknownDictionary: no builtin dictionary has this name.
        DictionaryFormatError: missing, unknown, truncated or inconsistent files.
        FingerprintMismatch: the dictionary was made for another backbone or tokenizer.
    """
    path = _locate(path_or_name)
    if path.name in (MANIFEST_FILE, saelens.CONFIG_FILE, saelens.WEIGHTS_FILE, sparsify.WEIGHTS_FILE):
        path = path.parent
    dictionary = replace(_read(path, dtype, device), folder=path if path.is_dir() else None)
    if backbone is not None:
        check_backbone(dictionary, backbone)
    return dictionary


def check_backbone(dictionary: Dictionary, backbone: Backbone) -> None:
    """Checks that a dictionary belongs to a backbone.

    Raises:
        FingerprintMismatch: the dictionary was made for another backbone or tokenizer; names both.
        DictionaryFormatError: the backbone does not have the dictionary's site, or the site has another width.
    """
    manifest = dictionary.manifest
    if manifest is not None:
        made_for = manifest.backbone
        if made_for.fingerprint != backbone.fingerprint:
            raise FingerprintMismatch(
                f"dictionary {dictionary.name!r} was made for backbone {made_for.name!r} with weights "
                f"{made_for.fingerprint}, found backbone {backbone.name!r} with weights {backbone.fingerprint}"
            )
        expected, actual = made_for.tokenizer_fingerprint, backbone.tokenizer_fingerprint
        if expected and actual and expected != actual:  # either may have come without a tokenizer
            raise FingerprintMismatch(
                f"dictionary {dictionary.name!r} was made for backbone {made_for.name!r} with tokenizer {expected}, "
                f"found backbone {backbone.name!r} with tokenizer {actual}"
            )
    if dictionary.site is not None:
        try:
            dictionary.site_in(backbone)
        except ValueError as error:
            raise DictionaryFormatError(f"{dictionary} does not fit {backbone.name!r}: {error}") from error


def _read(path: Path, dtype: torch.dtype, device: str | torch.device) -> Dictionary:
    """Recognises the format by the file names in a folder, or by the keys in a .pt file, and reads it."""
    if path.is_file():
        state = read_torch_file(path, "OpenAI's or dictionary_learning's state dict")
        not_openai = {"pre_bias", "latent_bias"}.isdisjoint(state)
        if not_openai and ("ae" in state or {"W_dec", "decoder.weight"} & set(state)):
            return dictionary_learning.load_dictionary_learning(path, dtype=dtype, device=device, state=state)
        return openai.load_openai(path, dtype=dtype, device=device, state=state)
    if (path / MANIFEST_FILE).is_file():
        return load_published(path, dtype=dtype, device=device)
    if (path / saelens.WEIGHTS_FILE).is_file():
        return saelens.load_saelens(path, dtype=dtype, device=device)
    if (path / sparsify.WEIGHTS_FILE).is_file():
        return sparsify.load_sparsify(path, dtype=dtype, device=device)
    if (path / dictionary_learning.WEIGHTS_FILE).is_file():
        return dictionary_learning.load_dictionary_learning(path, dtype=dtype, device=device)
    names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise DictionaryFormatError(f"{path}: found {names}; expected {KNOWN_FORMATS}")


def _locate(path_or_name: str | os.PathLike[str]) -> Path:
    text = os.fspath(path_or_name)
    path = Path(text)
    if path.exists():
        return path
    name = text.removeprefix("builtin/")
    if name in list_builtin_dictionaries():
        return DICTIONARIES / name
    known = ", ".join(list_builtin_dictionaries()) or "none"
    if text.startswith("builtin/") or (isinstance(path_or_name, str) and path.name == text and not path.suffix):
        raise UnknownDictionary(f"no builtin dictionary {name!r}, and no such file; builtin dictionaries: {known}")
    raise DictionaryFormatError(f"{path}: no such file or folder; expected {KNOWN_FORMATS}")
