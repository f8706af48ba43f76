"""Settings of an evaluation: one object that a YAML file and command-line flags of the same names fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_runtime.data.bad_documents import BadDocumentRule
from sae_runtime.data.text_files import unicode_name
from sae_runtime.model.sites import Site
from sae_runtime.settings import read_settings


class EvaluationSettings(BaseModel):
    """What a dictionary is measured on, and how much of it. Unknown keys are errors.

    The defaults take a few minutes of two CPU cores on the builtin dictionaries. A count of 0 leaves that part out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # What is measured on what
    data: tuple[Path, ...] = Field(
        (),
        description="Held-out text: .txt, .md, .jsonl (each also .xz, .gz or .zst) or .parquet files, or one token "
        "folder, of which the held-out documents are read; the builtin model's if not given.",
    )
    bad_documents: BadDocumentRule = "stop"
    out: Path | None = Field(
        None,
        description="Folder for evaluation.json, explanations.json, CARD.md and plots; <name>-evaluation if not given.",
    )
    backbone: str | None = Field(
        None, description="builtin, a Hugging Face folder or a hub name; the one trained on if not given."
    )
    site: str | None = Field(
        None, description="Where the dictionary is read, <layer>.<location>; the site trained on if not given."
    )
    device: str = Field("cpu", description="Device of the backbone and the dictionary.")
    seed: int | None = Field(
        None,
        ge=0,
        description="Seed of every choice: text, latents, positions, random baselines, resampling. As in training if "
        "not given, so that the text is that of the published figures, else 0.",
    )
    context_length: int | None = Field(
        None, ge=2, description="Tokens in a row; as in training if not given, else the backbone's own context length."
    )
    rows: Literal["packed", "documents"] | None = Field(
        None, description="How text is cut into rows (see `saeserve train`); as in training if not given, else packed."
    )
    prepend_end_of_text: bool | None = Field(
        None, description="Begin every row with an end-of-text token; as in training if not given."
    )

    # How much
    tokens: int = Field(131_072, ge=2, description="Tokens for reconstruction, cross-entropy and KL divergence.")
    baseline_tokens: int = Field(
        32_768,
        ge=0,
        description="The first of those tokens, in whole passes, on which the baselines are fitted and measured.",
    )
    feature_tokens: int = Field(
        262_144, ge=2, description="Tokens for L0, densities, probes and N2G explanations; site activations only."
    )
    tokens_per_pass: int = Field(
        2_048,
        ge=1,
        description="Most tokens in a forward pass, but at least one row; logits of all of them exist at once.",
    )
    probe_chunk: int = Field(
        32, ge=1, description="Tokens of one document whose latents are averaged into one example of a text-level task."
    )
    probe_examples: int = Field(
        500, ge=0, description="Most examples of each class and split in a probe task; classes are made equally large."
    )
    n2g_latents: int = Field(
        128, ge=0, description="Latents explained by N2G, drawn from those that fire often enough."
    )
    n2g_examples: int = Field(
        16,
        ge=1,
        description="Activations of a latent that its explanation is built from; it must fire as often in each split.",
    )
    n2g_max_length: int = Field(16, ge=1, description="Longest n-gram that an explanation may use, in tokens.")
    ablation_positions: int = Field(48, ge=0, description="Tokens at which single latents are ablated.")
    ablation_latents: int = Field(8, ge=1, description="Latents ablated at each of them, drawn from the active ones.")
    ablation_window: int = Field(64, ge=2, description="Tokens of the rows in which a latent is ablated.")
    ablation_horizon: int = Field(
        16, ge=1, description="Last tokens of that window whose logits count; the first of them is the one ablated."
    )
    single_splice_positions: int = Field(
        256, ge=0, description="Rows in which the activation of one token alone is replaced by its reconstruction."
    )
    geometry_latents: int = Field(
        8_192,
        ge=0,
        description="Latents whose nearest neighbour among all decoder rows is searched; all if there are fewer.",
    )
    resamples: int = Field(2_000, ge=1, description="Bootstrap resamples behind each 95 % interval.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.site is not None:
            Site.parse(self.site)
        if self.ablation_horizon >= self.ablation_window:
            raise ValueError(
                f"ablation_horizon is {self.ablation_horizon}, expected less than "
                f"ablation_window = {self.ablation_window}"
            )
        if self.baseline_tokens > self.tokens:
            raise ValueError(f"baseline_tokens is {self.baseline_tokens}, more than tokens = {self.tokens}")
        torch.device(self.device)
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> EvaluationSettings:
        """Reads a YAML mapping of these settings; `overrides` (such as command-line flags) win over it.

        Raises:
            SettingsError: the file cannot be read or is not a mapping, or a setting is unknown or wrong.
        """
        return read_settings(cls, path, overrides)

    def sample_settings(self) -> dict[str, Any]:
        """The settings that decide the figures, as a report records them: no folders, files by their names."""
        kept = self.model_dump(mode="json", exclude={"out", "device", "backbone", "bad_documents"})
        return kept | {"data": [unicode_name(path) for path in self.data]}
