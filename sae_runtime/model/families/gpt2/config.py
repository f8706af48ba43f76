"""The settings of a GPT-2 that decide what it computes, read from Hugging Face's config.json without transformers.

transformers takes about 4 s of CPU time to import its GPT-2 classes, which a replica would spend at every start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GPT2Config

ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "none"),
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    **dict.fromkeys(("silu", "swish"), "silu"),
}
"""Activation functions of the MLP: Hugging Face's names, each with the key of FUNCTIONS that it means."""

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": partial(F.gelu, approximate="tanh"),
    "none": F.gelu,
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": F.relu,
    "silu": F.silu,
}
"""By the names that fingerprints hold: "tanh" and "none" are torch's names of the two forms of GELU."""

# transformers takes these names in config.json as well.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Settings that change what the model computes, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

_COUNTS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")


@dataclass(frozen=True)
class GPT2Settings:
    """Settings under Hugging Face's names, with its defaults (GPT-2 small's) for what config.json does not say."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; 4 n_embd if None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256  # any of several ends a text

    def __post_init__(self) -> None:
        """ValueError for what the forward pass does not compute."""
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function {self.activation_function!r} is not supported; expected {', '.join(ACTIVATIONS)}"
            )
        for name in _COUNTS:
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive integer")
        if self.n_inner is not None and not _is_count(self.n_inner):
            raise ValueError(f"n_inner is {self.n_inner!r}, expected a positive integer or null")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected true or false")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) not in (int, float) or not 0 <= epsilon < math.inf:
            raise ValueError(f"layer_norm_epsilon is {epsilon!r}, expected a number, 0 or more")
        if self.bos_token_id is not None and type(self.bos_token_id) is not int:
            raise ValueError(f"bos_token_id is {self.bos_token_id!r}, expected an integer or null")
        if any(type(token) is not int for token in self.ends_of_text):
            raise ValueError(f"eos_token_id is {self.eos_token_id!r}, expected an integer, a list of integers or null")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def d_mlp(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def ends_of_text(self) -> frozenset[int]:
        """The tokens that end a text. They may lie outside the vocabulary, and then nothing ends a text."""
        ends = self.eos_token_id
        return frozenset(ends if isinstance(ends, tuple) else () if ends is None else (ends,))

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> GPT2Settings:
        """From the contents of a config.json. Other keys, about dropout, training and transformers, are ignored.

        Raises:
            ValueError: not a GPT-2, or a GPT-2 that the forward pass does not compute.
        """
        for name, harmless in _UNSUPPORTED.items():
            if name in values and values[name] not in harmless:
                raise ValueError(f"{name} is {values[name]!r}, which is not supported")
        named: dict[str, Any] = {}
        for key, value in values.items():
            name = _ALIASES.get(key, key)
            if name in named and named[name] != value:
                raise ValueError(f"{name} and {key} are one setting, but have the values {named[name]!r} and {value!r}")
            named[name] = value
        if isinstance(named.get("eos_token_id"), list):
            named["eos_token_id"] = tuple(named["eos_token_id"])
        return cls(**{field.name: named[field.name] for field in fields(cls) if field.name in named})

    @classmethod
    def from_folder(cls, folder: Path) -> GPT2Settings:
        """Reads config.json, and what ends a text from generation_config.json if that says it, as transformers does.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: as `from_mapping`, or a file is not JSON; names the file.
        """
        path, generation = folder / "config.json", folder / "generation_config.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no config.json: expected a Hugging Face GPT-2 folder")
        values = _read_object(path)
        if values.get("model_type") != "gpt2":
            raise ValueError(f"{folder} holds a model of type {values.get('model_type')!r}; only 'gpt2' is supported")
        source = path
        try:
            settings = cls.from_mapping(values)
            if generation.exists():
                source = generation
                ends = _read_object(generation).get("eos_token_id")
                if ends is not None:
                    settings = cls.from_mapping(values | {"eos_token_id": ends})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return settings

    def to_transformers(self) -> GPT2Config:
        """The same as transformers' own object, dropout off."""
        from transformers import GPT2Config

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return GPT2Config(
            **values,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file. ValueError: it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values
