"""Sparse autoencoders on a live GPT-2: the library under the service (torch, transformers, safetensors, numpy)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_runtime.dictionary.dictionary import Dictionary as Dictionary
    from sae_runtime.dictionary.features import InputStatistics as InputStatistics
    from sae_runtime.dictionary.features import SparseFeatures as SparseFeatures
    from sae_runtime.dictionary.formats import list_builtin_dictionaries as list_builtin_dictionaries
    from sae_runtime.dictionary.formats import load_dictionary as load_dictionary
    from sae_runtime.dictionary.formats.published import save_dictionary as save_dictionary
    from sae_runtime.dictionary.manifest import Manifest as Manifest
    from sae_runtime.dictionary.statistics import LatentStatistics as LatentStatistics
    from sae_runtime.edits import Condition as Condition
    from sae_runtime.edits import Edit as Edit
    from sae_runtime.edits import InvalidEdit as InvalidEdit
    from sae_runtime.errors import DictionaryFormatError as DictionaryFormatError
    from sae_runtime.errors import EditConflict as EditConflict
    from sae_runtime.errors import FingerprintMismatch as FingerprintMismatch
    from sae_runtime.errors import UnknownDictionary as UnknownDictionary
    from sae_runtime.model.backbone import Backbone as Backbone
    from sae_runtime.model.packed import PackedTokens as PackedTokens
    from sae_runtime.model.sites import Site as Site
    from sae_runtime.model.tokenization import TokenizedText as TokenizedText

# Imported on first use: torch takes seconds to import, and commands such as `saeserve --help` need none of it.
_MODULE_OF = {
    "Backbone": "model.backbone",
    "Condition": "edits",
    "Dictionary": "dictionary.dictionary",
    "DictionaryFormatError": "errors",
    "Edit": "edits",
    "EditConflict": "errors",
    "FingerprintMismatch": "errors",
    "InputStatistics": "dictionary.features",
    "InvalidEdit": "edits",
    "LatentStatistics": "dictionary.statistics",
    "Manifest": "dictionary.manifest",
    "PackedTokens": "model.packed",
    "Site": "model.sites",
    "SparseFeatures": "dictionary.features",
    "TokenizedText": "model.tokenization",
    "UnknownDictionary": "errors",
    "list_builtin_dictionaries": "dictionary.formats",
    "load_dictionary": "dictionary.formats",
    "save_dictionary": "dictionary.formats.published",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        from sae_runtime.older_words import our_word

        ours = None if importlib.util.find_spec(f"sae_runtime.{name}") else our_word(name)
        if ours is not None:
            # Not an AttributeError: `from sae_runtime import NAME` would replace its text.
            raise ImportError(f"sae_runtime has no {name}; use {ours.code}")
        raise AttributeError(f"module 'sae_runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sae_runtime.{_MODULE_OF[name]}"), name)
