"""The manifest of a published dictionary (`dictionary.json`): its properties, origin and quality."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from sae_runtime.dictionary.dictionary import COMPETING, Activation
from sae_runtime.dictionary.normalization import Normalization
from sae_runtime.errors import DictionaryFormatError

SCHEMA_VERSION = 1
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class BackboneReference:
    """The model whose activations the dictionary was trained on."""

    name: str
    fingerprint: str  # Backbone.fingerprint
    tokenizer_fingerprint: str | None = None  # Backbone.tokenizer_fingerprint


@dataclass(frozen=True)
class Provenance:
    """How the dictionary was made, in enough detail to make it again."""

    code_version: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # the training job's settings
    seed: int | None = None
    tokens: int | None = None  # tokens trained on
    data: str = ""  # description or fingerprint of the text
    created: str = ""  # ISO 8601, UTC


@dataclass(frozen=True)
class Manifest:
    """Contents of `dictionary.json`. Unknown keys and newer schema versions are errors."""

    name: str
    backbone: BackboneReference
    site: str  # for example "8.resid_post_mlp"
    architecture: Activation  # at inference; the training family is in provenance.config
    d_in: int
    n_latents: int
    k: int | None  # latents kept per token, of "topk" and "groupmax"; else None
    normalization: Normalization  # of each input row before encoding
    tied: bool  # the decoder is the encoder's transpose and is not stored
    dtype: str  # of the stored encoder and decoder: "float16", "bfloat16" or "float32"
    context_length: int | None = None  # tokens per row in training; later positions are out of distribution
    postact: Literal["relu", "identity"] = "relu"  # what follows the top-k; "identity" keeps negative values
    transcoder: bool = False  # it decodes to another activation than the one it reads
    provenance: Provenance = field(default_factory=Provenance)
    evaluation: dict[str, float] = field(default_factory=dict)  # held-out figures: nmse, l0, loss_recovered, ...
    files: dict[str, str] = field(default_factory=dict)  # sha256 (hex) of each data file beside the manifest
    schema_version: int = SCHEMA_VERSION

    @property
    def weights_sha256(self) -> str | None:
        """The checksum of the weights file; None of a manifest that no folder was written with."""
        return self.files.get(WEIGHTS_FILE)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and validates; DictionaryFormatError says which key is wrong and what was expected."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DictionaryFormatError(f"manifest is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise DictionaryFormatError(f"manifest: found {type(raw).__name__}, expected a JSON object")
        version = raw.get("schema_version")
        if type(version) is not int or version < 1:
            raise DictionaryFormatError(f"manifest: schema_version is {version!r}, expected a positive integer")
        if version > SCHEMA_VERSION:
            raise DictionaryFormatError(
                f"manifest: schema_version is {version}, this saeserve reads up to {SCHEMA_VERSION}; upgrade it"
            )
        values = _parse(cls, raw, "manifest")
        for key, record in (("backbone", BackboneReference), ("provenance", Provenance)):
            if key in values:
                values[key] = record(**_parse(record, values[key], f"manifest.{key}"))
        for key, kind, meaning in (("evaluation", float, "numbers"), ("files", str, "strings")):
            if not all(_fits(value, kind) for value in values.get(key, {}).values()):
                raise DictionaryFormatError(
                    f"manifest.{key}: found {values[key]!r}, expected values that are {meaning}"
                )
        manifest = cls(**values)
        manifest._check()
        return manifest

    def _check(self) -> None:
        for name in ("d_in", "n_latents"):
            if getattr(self, name) < 1:
                raise DictionaryFormatError(f"manifest.{name} is {getattr(self, name)}, expected a positive integer")
        competing = self.architecture in COMPETING
        if competing and (self.k is None or not 1 <= self.k <= self.n_latents):
            expected = f"1 to n_latents = {self.n_latents} for {self.architecture}"
            raise DictionaryFormatError(f"manifest.k is {self.k}, expected {expected}")
        if not competing and self.k is not None:
            raise DictionaryFormatError(f"manifest.k is {self.k}, expected null for {self.architecture}")


def _parse(cls: type, raw: object, where: str) -> dict[str, Any]:
    """Checks keys and value types of one JSON object against a dataclass."""
    if not isinstance(raw, Mapping):
        raise DictionaryFormatError(f"{where}: found {raw!r}, expected a JSON object")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise DictionaryFormatError(f"{where}: unknown keys {unknown}, expected only {sorted(known)}")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in raw]
    if missing:
        raise DictionaryFormatError(f"{where}: missing keys {missing}")
    hints = get_type_hints(cls)
    for name, value in raw.items():
        if not _fits(value, hints[name]):
            shown = getattr(hints[name], "__name__", str(hints[name]))
            raise DictionaryFormatError(f"{where}.{name} is {value!r}, expected {shown}")
    return dict(raw)


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value fits an annotation; knows those of the dataclasses above."""
    options = get_args(hint)
    if getattr(hint, "__origin__", None) is Literal:
        return value in options
    if getattr(hint, "__origin__", None) is dict:
        return isinstance(value, dict)
    if options:  # a union
        return any(_fits(value, option) for option in options)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    if hint is type(None):
        return value is None
    return isinstance(value, dict if hint in (BackboneReference, Provenance) else hint)
