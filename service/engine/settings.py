"""Budgets of the engine: how much runs at once, and how much may wait."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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
    max_queued_tokens: int = Field(
        65_536,
        ge=1,
        description="Tokens that may wait; beyond it requests are refused. One request may always wait alone.",
    )
    max_concurrent_generations: int = Field(
        16, ge=1, description="Generations that decode together (slots of the key-value cache); more of them wait."
    )
    max_queued_generations: int = Field(64, ge=0, description="Generations that may wait for a slot.")
    max_sequence_tokens: int = Field(
        0,
        ge=0,
        description="Prompt and new tokens of one generation: the length of each slot of the key-value cache. "
        "0 is the backbone's context length.",
    )
    prefill_chunk_tokens: int = Field(
        512,
        ge=1,
        description="Prompt tokens that run in one generation step: a long prompt does not stall other streams.",
    )
    generation_steps_per_batch: int = Field(
        4,
        ge=1,
        description="Generation steps between two batches of other work, while both wait.",
    )
    torch_threads: int = Field(
        0, ge=0, description="CPU threads of the model thread's operations; 0 is torch's choice."
    )
