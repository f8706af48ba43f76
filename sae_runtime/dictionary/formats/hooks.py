"""Converts other projects' names of places in a model to sites, and back."""

from __future__ import annotations

import re

# TransformerLens' hook names (SAELens). Without folding or centring, their values are those of Hugging Face's modules.
_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_attn_out": "resid_delta_attn",
    "hook_resid_mid": "resid_post_attn",
    "mlp.hook_post": "mlp_post_act",
    "hook_mlp_out": "resid_delta_mlp",
    "hook_resid_post": "resid_post_mlp",
}
# Outputs and inputs of Hugging Face's GPT-2 modules (sparsify).
_MODULE_OUTPUT = {
    "": "resid_post_mlp",
    "attn": "resid_delta_attn",
    "mlp": "resid_delta_mlp",
    "mlp.act": "mlp_post_act",
}
_MODULE_INPUT = {
    "": "resid_pre",
    "ln_1": "resid_pre",
    "ln_2": "resid_post_attn",
    "mlp.c_proj": "mlp_post_act",
}


def site_of_hook(name: str) -> str | None:
    """The site of a TransformerLens hook such as "blocks.8.hook_resid_pre"; None for any other name."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    location = _TRANSFORMER_LENS.get(match[2]) if match else None
    return f"{int(match[1])}.{location}" if match and location else None


def hook_of_site(site: str) -> str:
    """The TransformerLens hook of a site, the inverse of `site_of_hook`."""
    layer, _, location = site.partition(".")
    names = {location: hook for hook, location in _TRANSFORMER_LENS.items()}
    return f"blocks.{layer}.{names[location]}"


def site_of_module(name: str, *, reads_input: bool = False) -> str | None:
    """The site of a GPT-2 module's output ("h.8.mlp"), or of its input with `reads_input`; None if it is no site."""
    match = re.fullmatch(r"(?:transformer\.)?h\.(\d+)(?:\.(.+))?", name)
    location = (_MODULE_INPUT if reads_input else _MODULE_OUTPUT).get(match[2] or "") if match else None
    return f"{int(match[1])}.{location}" if match and location else None
