"""Sparse autoencoders on a live GPT-2: the library under the service (torch, transformers, safetensors, numpy)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_runtime.autoencoder import Dictionary as Dictionary
    from sae_runtime.backbone import Backbone as Backbone
    from sae_runtime.errors import DictionaryFormatError as DictionaryFormatError
    from sae_runtime.errors import EditConflict as EditConflict
    from sae_runtime.errors import FingerprintMismatch as FingerprintMismatch
    from sae_runtime.errors import UnknownDictionary as UnknownDictionary
    from sae_runtime.features import InputStatistics as InputStatistics
    from sae_runtime.features import SparseFeatures as SparseFeatures
    from sae_runtime.formats import list_builtin_dictionaries as list_builtin_dictionaries
    from sae_runtime.formats import load_dictionary as load_dictionary
    from sae_runtime.formats.manifest import Manifest as Manifest
    from sae_runtime.formats.published import save_dictionary as save_dictionary
    from sae_runtime.interventions import Condition as Condition
    from sae_runtime.interventions import Edit as Edit
    from sae_runtime.interventions import InvalidEdit as InvalidEdit
    from sae_runtime.packed import PackedTokens as PackedTokens
    from sae_runtime.sites import Site as Site
    from sae_runtime.statistics import LatentStatistics as LatentStatistics
    from sae_runtime.tokenization import TokenizedText as TokenizedText

# Imported on first use: torch takes seconds to import, and commands such as `saeserve --help` need none of it.
_MODULE_OF = {
    "Backbone": "backbone",
    "Condition": "interventions",
    "Dictionary": "autoencoder",
    "DictionaryFormatError": "errors",
    "Edit": "interventions",
    "EditConflict": "errors",
    "FingerprintMismatch": "errors",
    "InputStatistics": "features",
    "InvalidEdit": "interventions",
    "LatentStatistics": "statistics",
    "Manifest": "formats.manifest",
    "PackedTokens": "packed",
    "Site": "sites",
    "SparseFeatures": "features",
    "TokenizedText": "tokenization",
    "UnknownDictionary": "errors",
    "list_builtin_dictionaries": "formats",
    "load_dictionary": "formats",
    "save_dictionary": "formats.published",
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
