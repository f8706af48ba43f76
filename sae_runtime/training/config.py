"""Settings of the offline job: one object that a YAML file and command-line flags of the same names fill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_runtime.sites import Site

DTypeName = Literal["float32", "bfloat16", "float16"]


class TrainingConfig(BaseModel):
    """How one TopK dictionary is trained, measured and published.

    The defaults suit a laptop and a small backbone; descriptions give the values of Gao et al. 2024 for GPT-2 small
    ("paper": n_latents 32768, k 32) where they differ. Unknown keys are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # What is trained on what
    site: str = Field(description="Where activations are read, <layer>.<location>, for example 8.resid_post_mlp.")
    data: tuple[Path, ...] = Field(
        min_length=1, description="Training text: .txt, .md or .jsonl files (records hold `text`), also .xz or .gz."
    )
    out: Path = Field(description="Folder that the published dictionary is written to; it must not exist yet.")
    name: str | None = Field(None, description="Name of the published dictionary; the folder's name if not given.")
    backbone: str = Field("builtin", description="Backbone: builtin, a Hugging Face folder or a hub name.")
    held_out: tuple[Path, ...] = Field(
        (), description="Held-out text for evaluation and statistics; if not given, a fraction of the training text."
    )
    held_out_fraction: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Share of documents (chosen by a hash of their text) that training never sees and evaluation uses, "
        "when held_out is not given.",
    )

    # The dictionary
    n_latents: int | None = Field(None, ge=1, description="Number of latents; or give expansion_factor.")
    expansion_factor: float = Field(
        16, gt=0, description="Latents per input dimension, used when n_latents is not given (paper: 42.7)."
    )
    k: int = Field(32, ge=1, description="Latents active on each token.")
    normalize: bool = Field(
        True, description="Layer-normalise the input (mean and standard deviation of each token), undone when decoding."
    )

    # Tokens
    tokens: int = Field(4_000_000, ge=1, description="Tokens to train on, rounded up to whole batches (paper: 1.3e9).")
    context_length: int | None = Field(
        None,
        ge=2,
        description="Tokens in a row given to the backbone; its own context length if not given (paper: 64).",
    )
    rows: Literal["packed", "documents"] = Field(
        "packed",
        description="packed: documents joined by end-of-text and cut into full rows; documents: every row belongs to "
        "one document.",
    )
    prepend_end_of_text: bool = Field(
        False, description="Begin every row with an end-of-text token, which is not trained on."
    )
    buffer_tokens: int = Field(
        131_072, ge=2, description="Activations in the shuffle buffer; half of it is replaced at a time."
    )
    backbone_tokens: int = Field(8_192, ge=1, description="Tokens in one forward pass of the backbone.")

    # Optimisation
    batch_tokens: int = Field(2_048, ge=1, description="Tokens in one optimiser step (paper: 131072).")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Adam's learning rate; 2e-4 / sqrt(n_latents / 2^14) times 2.5 if not given, which suits the small "
        "default batches (paper: 1e-4 at 32768 latents).",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay rate.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second decay rate.")
    adam_eps: float = Field(6.25e-10, gt=0, description="Adam's epsilon (paper: 6.25e-10).")
    warmup_steps: int = Field(50, ge=0, description="Steps over which the learning rate rises from 0 (paper: none).")
    decay_fraction: float = Field(
        0.25, ge=0, le=1, description="Last share of the steps over which the learning rate falls to 0 (paper: 0)."
    )
    gradient_clip: float | None = Field(1.0, gt=0, description="Largest norm of the gradient; none to switch off.")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Publish a bias-corrected moving average of the weights with this decay (paper: 0.999).",
    )

    # Dead latents
    aux_k: int = Field(
        128, ge=0, description="Dead latents that model the residual of each token; 0 switches off (paper: 512)."
    )
    aux_coefficient: float = Field(1 / 32, ge=0, description="Weight of that auxiliary loss (paper: 1/32).")
    dead_after_tokens: int = Field(
        200_000, ge=1, description="A latent that did not fire for this many tokens is dead (paper: 10,000,000)."
    )
    dead_threshold: float = Field(1e-3, ge=0, description="Activation that a latent must exceed to count as firing.")

    # Execution
    seed: int = Field(0, ge=0, description="Seed of everything random; the same seed gives the same weights.")
    device: str = Field("cpu", description="Device of the backbone and the dictionary, for example cpu or cuda:0.")
    threads: int | None = Field(None, ge=1, description="CPU threads of PyTorch; its own choice if not given.")
    compute_dtype: DTypeName = Field(
        "bfloat16", description="Type of the large matrix product x @ encoder; weights and gradients stay float32."
    )
    backbone_dtype: DTypeName = Field(
        "bfloat16", description="Type the backbone runs in while training; evaluation always runs in float32."
    )

    # Checkpoints and publication
    checkpoint: Path | None = Field(
        None, description="Checkpoint file; <out>.checkpoint.pt if not given. A run continues from it when it exists."
    )
    checkpoint_interval: float = Field(120.0, ge=0, description="Seconds between checkpoints; 0 writes none.")
    storage_dtype: DTypeName = Field("float16", description="Type of the published weights.")
    evaluation_tokens: int = Field(
        131_072, ge=1, description="Held-out tokens for NMSE, L0, dead fraction and loss recovered, all in float32."
    )
    statistics_tokens: int = Field(
        524_288, ge=1, description="Held-out tokens for the per-latent statistics and the dead fraction."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        Site.parse(self.site)
        if self.n_latents is not None and self.k > self.n_latents:
            raise ValueError(f"k is {self.k}, more than n_latents = {self.n_latents}")
        if self.buffer_tokens < 2 * self.batch_tokens:
            raise ValueError(
                f"buffer_tokens is {self.buffer_tokens}, expected at least twice batch_tokens = {self.batch_tokens}"
            )
        torch.device(self.device)
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> TrainingConfig:
        """Reads a YAML mapping of these settings; `overrides` (such as command-line flags) win over it.

        Raises:
            ValueError: the file is not a mapping, or a setting is unknown, missing or wrong (pydantic's message).
        """
        settings = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: found {type(settings).__name__}, expected a mapping of settings")
        return cls(**{**settings, **overrides})

    @property
    def published_name(self) -> str:
        return self.name or self.out.name

    @property
    def checkpoint_path(self) -> Path:
        return self.checkpoint or self.out.with_name(self.out.name + ".checkpoint.pt")

    @property
    def n_steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)

    def latents_for(self, d_in: int) -> int:
        """n_latents, or expansion_factor times the input width.

        Raises:
            ValueError: that is fewer than k.
        """
        n_latents = self.n_latents or round(self.expansion_factor * d_in)
        if n_latents < self.k:
            raise ValueError(
                f"{n_latents} latents (expansion_factor {self.expansion_factor} × {d_in}) are fewer than k = {self.k}"
            )
        return n_latents

    def learning_rate_for(self, n_latents: int) -> float:
        """The learning rate, scaled with 1/√n_latents when it is not given."""
        return self.learning_rate or 5e-4 / math.sqrt(n_latents / 2**14)

    def provenance(self) -> dict[str, Any]:
        """What a manifest records: every setting that decides the weights, files by their names only."""
        settings = self.model_dump(mode="json", exclude={"out", "checkpoint", "checkpoint_interval", "threads", "name"})
        return settings | {"data": [p.name for p in self.data], "held_out": [p.name for p in self.held_out]}
