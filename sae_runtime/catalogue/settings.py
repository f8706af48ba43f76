"""Settings of a catalogue: one object that a YAML file and command-line flags of the same names fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_runtime.builtin import HELD_OUT
from sae_runtime.data.bad_documents import BadDocumentRule
from sae_runtime.dictionary.dictionary import Dictionary

MAX_TOKENS = 2**32 - 1
"""Places of tokens are kept as uint32."""


class CatalogueSettings(BaseModel):
    """What text a catalogue is made from, and how much it keeps of every latent. Unknown keys are errors.

    The defaults take some minutes of two CPU cores on the builtin dictionaries. A count of 0 leaves that out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # What is read
    data: tuple[str, ...] = Field(
        (),
        description="Text: .txt, .md, .jsonl (each also .xz, .gz or .zst) or .parquet files, folders of them, or data "
        "sets; the builtin model's held-out text if not given.",
    )
    bad_documents: BadDocumentRule = "stop"
    out: Path | None = Field(
        None, description="The file to write; features.sqlite in the dictionary's folder if not given."
    )
    backbone: str | None = Field(
        None, description="builtin, a Hugging Face folder or a hub name; the one trained on if not given."
    )
    device: str = Field("cpu", description="Device of the backbone and the dictionary.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every choice.")
    tokens: int = Field(10_000_000, ge=2, le=MAX_TOKENS, description="Most tokens to read.")
    context_length: int | None = Field(
        None, ge=2, description="Tokens in a row; as in training if not given, else the backbone's context length."
    )
    rows: Literal["packed", "documents"] = Field(
        "documents",
        description="documents: a row holds text of one document; packed: documents are joined by end-of-text.",
    )
    prepend_end_of_text: bool | None = Field(
        None, description="Begin every row with an end-of-text token; as in training if not given."
    )
    tokens_per_pass: int = Field(8_192, ge=1, description="Most tokens in a forward pass, but at least one row.")
    statistics_tokens: int = Field(
        500_000,
        ge=1,
        description="Tokens that maxima and quantiles are measured on first, if the dictionary has no statistics.",
    )
    checkpoint_minutes: float = Field(
        10.0, ge=0, description="Minutes between checkpoints, from which the same command goes on; 0: every pass."
    )

    # Contexts; those of each half of the documents, so that labels can be found in one half and tested in the other
    tokens_before: int = Field(16, ge=0, le=254, description="Tokens of a context before its peak.")
    tokens_after: int = Field(8, ge=0, le=254, description="Tokens of a context after its peak.")
    strongest: int = Field(10, ge=1, description="Strongest contexts kept of each half, at most one a document.")
    quantile_contexts: int = Field(2, ge=0, description="Contexts kept of each quantile and half.")
    random_contexts: int = Field(24, ge=0, description="Random activations kept of each half.")
    shown_strongest: int = Field(10, ge=1, description="Strongest contexts on a page.")
    shown_quantile: int = Field(2, ge=0, description="Contexts of each quantile on a page.")
    shown_random: int = Field(4, ge=0, description="Random activations on a page.")
    shown_silent: int = Field(2, ge=0, description="Random tokens without activation on a page.")
    sample_tokens: int = Field(
        32_768, ge=1, description="Tokens of random rows of which all activations are kept: silent tokens, co-firing."
    )
    labels: bool = Field(True, description="Find a label for every latent.")
    label_tokens: int = Field(24, ge=1, description="Tokens up to an example's token that a label may look at.")
    label_activations: int = Field(
        64, ge=0, description="Further random activations, in the half that labels are found on."
    )
    label_negatives: int = Field(96, ge=0, description="Random silent tokens of each half that labels are tested on.")
    label_hard_negatives: int = Field(
        48, ge=0, description="Tokens of each half on which near latents fire and the latent does not."
    )

    # Figures
    histogram_bins: int = Field(32, ge=1, description="Bins of the histogram of activations.")
    active_tokens: int = Field(12, ge=0, description="Most active tokens on a page.")
    token_pairs: int = Field(
        1 << 24,
        ge=1,
        description="Most (latent, token) pairs that are counted at a time, but at least 64 a latent; beyond them the "
        "least active tokens of each latent are forgotten.",
    )
    promoted_tokens: int = Field(10, ge=0, description="Promoted, and suppressed, tokens on a page.")
    neighbors: int = Field(8, ge=0, description="Nearest latents by decoder cosine, in each dictionary.")
    neighbor_dictionaries: tuple[str, ...] = Field(
        (), description="Other dictionaries of the backbone in which nearest latents are looked up."
    )
    together: int = Field(5, ge=0, description="Latents that fire on the same tokens.")

    # Effects
    effect_latents: int = Field(
        4_096, ge=0, description="Latents whose effects are measured, drawn from those that are alive."
    )
    effect_contexts: int = Field(4, ge=1, description="Contexts in which a latent is ablated, and in which it is set.")
    effect_window: int = Field(64, ge=2, description="Tokens of such a context.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind in ("strongest", "quantile", "random"):
            kept = self.strongest if kind == "strongest" else getattr(self, f"{kind}_contexts")
            shown = getattr(self, f"shown_{kind}")
            if shown > 2 * kept:
                raise ValueError(f"shown_{kind} is {shown}, more than are kept of both halves ({2 * kept})")
        torch.device(self.device)
        return self

    def recorded(self) -> dict[str, Any]:
        """The settings that decide what a catalogue holds; files by their names."""
        others = {"out", "device", "backbone", "checkpoint_minutes", "neighbor_dictionaries", "bad_documents"}
        kept = self.model_dump(mode="json", exclude=others)
        return kept | {"data": [Path(name).name for name in self.data]}


def complete_settings(settings: CatalogueSettings, dictionary: Dictionary) -> CatalogueSettings:
    """Fills what is not given from the dictionary's training."""
    manifest, origin = dictionary.manifest, dictionary.origin
    trained = manifest.provenance.config if manifest and manifest.provenance else {}
    recorded = manifest.context_length if manifest else origin.context_length if origin else None
    filled: dict[str, Any] = {"data": settings.data or (str(HELD_OUT),)}
    if settings.context_length is None:
        filled["context_length"] = trained.get("context_length") or recorded
    if settings.prepend_end_of_text is None:
        filled["prepend_end_of_text"] = bool(trained.get("prepend_end_of_text", False))
    return CatalogueSettings.model_validate(settings.model_dump() | filled)
