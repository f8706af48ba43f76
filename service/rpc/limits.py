"""Bounds that requests must keep to; the fields of the message `saeserve.v1.Limits`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

_MAX_UINT32 = 2**32 - 1


class Limits(BaseModel):
    """What a request may ask for. Every bound can be lowered or raised; GetServerInfo reports them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_inputs: int = Field(default=128, ge=1, le=_MAX_UINT32)
    """Inputs in one ExtractFeatures, Score or AblateFeatures call."""
    max_tokens_per_input: int = Field(default=_MAX_UINT32, ge=1, le=_MAX_UINT32)
    """Tokens in one input; lowered to the backbone's context length where it is larger."""
    max_tokens_per_request: int = Field(default=8_192, ge=1, le=_MAX_UINT32)
    """Tokens in all inputs of one call. Keeps replies under the 4 MiB that gRPC clients accept by default."""
    max_text_bytes: int = Field(default=32_768, ge=1, le=_MAX_UINT32)
    """Bytes of text in one input: bounds the time that tokenizing it can take."""
    max_activation_rows: int = Field(default=1_024, ge=1, le=_MAX_UINT32)
    """Rows in one EncodeActivations or DecodeFeatures call; tokens times sites in one GetActivations call."""
    max_dictionaries: int = Field(default=16, ge=1, le=_MAX_UINT32)
    """Dictionaries, or sites of GetActivations, in one call."""
    max_selected_features: int = Field(default=4_096, ge=1, le=_MAX_UINT32)
    """Feature numbers in one selection, top_k, and features of a row on average in DecodeFeatures."""
    max_new_tokens: int = Field(default=512, ge=1, le=_MAX_UINT32)
    """New tokens of one Generate call."""
    max_edits: int = Field(default=64, ge=1, le=_MAX_UINT32)
    """Edits in one call, those of presets included."""
    max_edit_strength: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    """Largest size of a strength in multiples of the recorded maximum, where it is known."""
    max_relative_change: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Largest size of what edits add to a token's activation, in multiples of the activation's size; 0: no bound."""
    max_stop_strings: int = Field(default=16, ge=1, le=_MAX_UINT32)
    """Stop strings in one call."""
    max_stop_bytes: int = Field(default=256, ge=1, le=_MAX_UINT32)
    """Bytes in one stop string."""
    max_samples: int = Field(default=8, ge=1, le=_MAX_UINT32)
    """Samples of one Generate call; the slots of a replica (max_concurrent_generations) bound them as well."""
    max_top_logprobs: int = Field(default=20, ge=0, le=_MAX_UINT32)
    """Likeliest tokens that a Generate call returns at each place."""
    max_ablated_features: int = Field(default=64, ge=1, le=_MAX_UINT32)
    """Features in one AblateFeatures call."""
    max_variant_tokens: int = Field(default=1_048_576, ge=1, le=_MAX_UINT32)
    """Tokens of all inputs of an AblateFeatures call, times features, ablations and (1 + single_tokens)."""
    max_logit_tokens: int = Field(default=16, ge=0, le=_MAX_UINT32)
    """Tokens in logit_tokens of one call."""
    max_attributions: int = Field(default=256, ge=1, le=_MAX_UINT32)
    """Pairs of a feature and a token that AttributeFeatures returns and ablates."""
    max_contrast_texts: int = Field(default=512, ge=2, le=_MAX_UINT32)
    """Texts in each set of a ContrastFeatures call."""
    max_contrast_tokens: int = Field(default=65_536, ge=1, le=_MAX_UINT32)
    """Tokens in both sets of a ContrastFeatures call."""
    default_new_tokens: int = Field(default=64, ge=1, le=_MAX_UINT32)
    """New tokens of a Generate call that does not say (fewer where the context or max_new_tokens ends earlier)."""

    def for_context(self, context_length: int, max_sequence_tokens: int) -> Limits:
        """The same limits, without what the backbone's context and the engine's key-value cache do not hold."""
        return self.model_copy(
            update={
                "max_tokens_per_input": min(self.max_tokens_per_input, context_length),
                "max_new_tokens": max(1, min(self.max_new_tokens, max_sequence_tokens - 1)),
            }
        )
