"""Budgets of the engine: how much runs at once, and how much may wait."""

from __future__ import annotations

import logging
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

logger = logging.getLogger(__name__)


class EngineSettings(BaseModel):
    """Settings of one replica's engine. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_tokens: int = Field(
        2048,
        ge=1,
        description="Tokens that run in one batch. A single longer text runs alone; a longer request is split.",
    )
    batch_window_ms: float = Field(
        2.0,
        ge=0,
        le=1000,
        description="Longest wait for more requests after a batch that held several, if fewer tokens are queued than "
        "that batch had. Without concurrent requests nothing ever waits.",
    )
    split_batch_tokens: int = Field(
        256,
        ge=0,
        description="On the CPU, twice this many waiting tokens run as two batches instead of one, so that replies are "
        "made, and the next requests read, while the model computes. 0 never splits.",
    )
    max_queued_tokens: int = Field(
        65_536,
        ge=1,
        description="Tokens that may wait; beyond it requests are refused. One request may always wait alone.",
    )
    max_concurrent_generations: int = Field(
        16,
        ge=1,
        description="Sequences that decode together; more of them wait. A request's samples are a sequence each.",
    )
    max_queued_generations: int = Field(64, ge=0, description="Generate requests that may wait for a slot.")
    max_cache_tokens: int = Field(
        16_384,
        ge=2,
        description="Tokens that the key-value cache holds, which bounds its memory. A request reserves room for its "
        "prompt and new tokens, times its sequences, before it starts, and waits until there is room.",
    )
    max_sequence_tokens: int = Field(
        0,
        ge=0,
        description="Prompt and new tokens of one sequence. 0 is the backbone's context length; max_cache_tokens "
        "bounds it as well.",
    )
    prefill_chunk_tokens: int = Field(
        512,
        ge=1,
        description="Most prompt tokens that run in one generation step. While other sequences decode there are fewer: "
        "as many as take about 0.2 s, or four times a step without prompts. The prompt with the fewest tokens left "
        "goes first.",
    )
    generation_steps_per_batch: int = Field(
        4,
        ge=1,
        description="Generation steps between two batches of other work, while both wait.",
    )
    shared_batch_tokens: int = Field(
        512,
        ge=1,
        description="As max_batch_tokens while generations run: how much other work goes between their tokens.",
    )
    torch_threads: int = Field(
        0, ge=0, description="CPU threads of the model thread's operations; 0 is torch's choice."
    )
    batch_lanes: int = Field(
        0,
        ge=0,
        description="On the CPU, threads that share out the texts of an extraction, each on one core; 0 is as many as "
        "torch_threads, 1 lets torch split single operations instead.",
    )
    decode_threads: int = Field(0, ge=0, description="Does nothing any more: torch_threads holds for all.")

    @model_validator(mode="after")
    def _say_what_does_nothing(self) -> Self:
        """Files, variables and flags of earlier versions still work."""
        if "decode_threads" in self.model_fields_set:
            description = type(self).model_fields["decode_threads"].description
            logger.warning("the setting engine.decode_threads is gone: %s", description)
        return self
