"""The settings of a GPT-2 that decide what it computes, read from Hugging Face's config.json without transformers.

transformers takes about 4 s of CPU time to import its GPT-2 classes, which a replica would spend at every start.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GPT2Config

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
"""Activation functions of the MLP by Hugging Face's names, and the form of GELU that they are."""

# transformers takes these names in config.json as well.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


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
    eos_token_id: int | None = 50256

    def __post_init__(self) -> None:
        """ValueError for what the forward pass does not compute."""
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function {self.activation_function!r} is not supported; expected {', '.join(ACTIVATIONS)}"
            )
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def d_mlp(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> GPT2Settings:
        """From the contents of a config.json. Other keys, about dropout, training and transformers, are ignored.

        Raises:
            ValueError: not a GPT-2, or a GPT-2 that the forward pass does not compute.
        """
        if values.get("add_cross_attention"):
            raise ValueError("add_cross_attention is not supported: the backbone is a decoder alone")
        named = {_ALIASES.get(name, name): value for name, value in values.items()}
        return cls(**{field.name: named[field.name] for field in fields(cls) if field.name in named})

    @classmethod
    def from_folder(cls, folder: Path) -> GPT2Settings:
        """Reads config.json.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: as `from_mapping`, or the file is not JSON.
        """
        path = folder / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no config.json: expected a Hugging Face GPT-2 folder")
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        model_type = values.get("model_type") if isinstance(values, dict) else None
        if model_type != "gpt2":
            raise ValueError(f"{folder} holds a model of type {model_type!r}; only 'gpt2' is supported")
        return cls.from_mapping(values)

    def to_transformers(self) -> GPT2Config:
        """The same as transformers' own object, dropout off."""
        from transformers import GPT2Config

        return GPT2Config(
            **{field.name: getattr(self, field.name) for field in fields(self)},
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
