"""Names of published dictionaries.

openai/gpt2-small/<location>[_v4|_v5_32k|_v5_128k]/<layer>   OpenAI's dictionaries for GPT-2 small
<owner>/<repository>[@<revision>][/<folder>…]                a Hugging Face repository, or a folder in it
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPENAI_PREFIX = "openai/gpt2-small/"
OPENAI_PATH = "sparse-autoencoder/gpt2-small/{location}/autoencoders/{layer}.pt"
# Suffixes by location: v4 is ReLU with 32,768 latents, v5 is TopK with 2^15 and 2^17.
_OPENAI_LOCATIONS = {
    "mlp_post_act": ("", "_v4"),
    "resid_delta_mlp": ("", "_v4", "_v5_32k", "_v5_128k"),
    "resid_delta_attn": ("_v5_32k", "_v5_128k"),
    "resid_post_attn": ("_v5_32k", "_v5_128k"),
    "resid_post_mlp": ("_v5_32k", "_v5_128k"),
}
_N_LAYERS = 12
# SAELens' files that do not say that the residual stream was centred, which SAELens' own table of releases does.
_CENTRED = (
    "jbloom/GPT2-Small-SAEs-Reformatted",
    "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "tommmcgrath/gpt2-small-mlp-out-saes",
)
_SEGMENT = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class OpenAIName:
    """One of OpenAI's dictionaries for GPT-2 small."""

    location: str
    """With its suffix, as in the address, for example "resid_post_mlp_v5_32k"."""
    layer: int

    @property
    def site(self) -> str:
        return f"{self.layer}.{self.location.partition('_v')[0]}"

    @property
    def path(self) -> str:
        """The file's path in OpenAI's storage."""
        return OPENAI_PATH.format(location=self.location, layer=self.layer)


@dataclass(frozen=True)
class HubName:
    """A folder in a Hugging Face model repository."""

    repository: str
    """"owner/name"."""
    revision: str
    folder: str
    """Without slashes at the ends; "" is the repository itself."""

    @property
    def centred(self) -> bool:
        """Whether its dictionaries read a centred residual stream without saying so in their files."""
        return self.repository in _CENTRED


def parse_name(name: str) -> OpenAIName | HubName:
    """The dictionary that a name stands for.

    Raises:
        ValueError: the name has another form, or OpenAI published no such dictionary; lists those it published.
    """
    if name.startswith(OPENAI_PREFIX):
        return _openai(name)
    owner, _, rest = name.strip("/").partition("/")
    repository_at_revision, _, folder = rest.partition("/")
    repository, at, revision = repository_at_revision.partition("@")
    segments = [owner, repository, *([revision] if at else []), *(folder.split("/") if folder else [])]
    if any(not _SEGMENT.fullmatch(segment) or segment in (".", "..") for segment in segments):
        raise ValueError(
            f"{name!r} is not the name of a dictionary; expected {OPENAI_PREFIX}<location>/<layer> or "
            "<owner>/<repository>[@<revision>][/<folder>]"
        )
    return HubName(f"{owner}/{repository}", revision or "main", folder)


def _openai(name: str) -> OpenAIName:
    location, _, layer = name.removeprefix(OPENAI_PREFIX).partition("/")
    known = [base + suffix for base, suffixes in _OPENAI_LOCATIONS.items() for suffix in suffixes]
    if location not in known:
        raise ValueError(f"{name!r}: OpenAI published {', '.join(known)} for GPT-2 small, not {location!r}")
    if not layer.isascii() or not layer.isdigit() or int(layer) >= _N_LAYERS:
        raise ValueError(f"{name!r}: layer is {layer!r}, expected 0 to {_N_LAYERS - 1}")
    return OpenAIName(location, int(layer))
