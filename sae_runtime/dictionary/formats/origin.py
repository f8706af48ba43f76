"""What a file of another project says about a dictionary beyond its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Everything as the file has it, so that what this project has no word for is not lost."""

    format: str  # "openai", "saelens", "sparsify" or "dictionary_learning"
    hook: str | None = None  # the file's own name for the site, for example "blocks.8.hook_resid_pre"
    model: str | None = None  # the file's own name for the model
    context_length: int | None = None  # tokens per row in training
    prepend_bos: bool | None = None  # whether each row of the training text began with a BOS token
    config: Mapping[str, Any] = field(default_factory=dict)  # its configuration file, whole

    @classmethod
    def of(
        cls,
        format: str,
        *,
        hook: object,
        model: object,
        context_length: object,
        config: Mapping[str, Any],
        prepend_bos: object = None,
    ) -> Origin:
        """From the values of a configuration file; a value of an unexpected type counts as absent."""
        return cls(
            format,
            hook=hook if isinstance(hook, str) and hook else None,
            model=model if isinstance(model, str) and model else None,
            context_length=context_length if type(context_length) is int and context_length > 0 else None,
            prepend_bos=prepend_bos if isinstance(prepend_bos, bool) else None,
            config=config,
        )
