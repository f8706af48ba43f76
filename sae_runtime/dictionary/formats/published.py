"""The project's own published form: a folder with a manifest, safetensors weights, statistics and checksums.

dictionary.json       Manifest, with the sha256 of the data files
weights.safetensors   encoder [n_latents, d_in], decoder [n_latents, d_in] (absent when tied), pre_bias, latent_bias;
                      threshold of jumprelu, magnitude_scale and magnitude_bias of gated; output_bias and skip if any
stats.safetensors     LatentStatistics, if they are known
CARD.md               optional, for people; not part of the checksums
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_runtime.atomic import atomic_folder
from sae_runtime.dictionary.dictionary import OPTIONAL_TENSORS, Dictionary
from sae_runtime.dictionary.formats.weights import build_dictionary, check_tensors, convert, read_safetensors
from sae_runtime.dictionary.manifest import WEIGHTS_FILE, BackboneReference, Manifest, Provenance
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.errors import DictionaryFormatError

MANIFEST_FILE = "dictionary.json"
STATISTICS_FILE = "stats.safetensors"
CARD_FILE = "CARD.md"
STORED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def save_dictionary(
    dictionary: Dictionary,
    path: str | os.PathLike[str],
    *,
    backbone: BackboneReference,
    statistics: LatentStatistics | None = None,
    name: str | None = None,
    dtype: str = "float16",
    context_length: int | None = None,
    provenance: Provenance | None = None,
    evaluation: Mapping[str, float] | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes a dictionary as a folder and returns its manifest.

    The folder appears complete or not at all: it is written beside its place, flushed to disk and renamed. With
    `overwrite` an existing folder is moved aside first and removed afterwards.

    Args:
        statistics: those of the dictionary if not given. Without any, edits in units of the maximum and ablation to the
            mean fail.
        dtype: "float16", "bfloat16" or "float32", of the stored encoder, decoder and skip connection. The other tensors
            are stored as float32.

    Raises:
        ValueError: no site, statistics of another size, an unknown dtype, or weights that overflow it.
        FileExistsError: the folder exists, without `overwrite`.
    """
    path = Path(path)
    statistics = statistics or dictionary.statistics
    if statistics is not None and statistics.n_latents != dictionary.n_latents:
        raise ValueError(f"statistics are of {statistics.n_latents} latents, expected {dictionary.n_latents}")
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(STORED_DTYPES)}")
    manifest = Manifest(
        name=name or dictionary.name or path.name,
        backbone=backbone,
        site=str(dictionary.require_site()),
        architecture=dictionary.activation,
        d_in=dictionary.d_in,
        n_latents=dictionary.n_latents,
        k=dictionary.k,
        normalization=dictionary.normalization,
        tied=dictionary.tied,
        dtype=dtype,
        context_length=context_length,
        postact=dictionary.postact,
        transcoder=dictionary.transcoder,
        provenance=provenance or Provenance(),
        evaluation=dict(evaluation or {}),
    )
    with atomic_folder(path, overwrite=overwrite) as building:
        save_file(_stored_weights(dictionary, STORED_DTYPES[dtype]), building / WEIGHTS_FILE)
        if statistics is not None:
            save_file(statistics.to_tensors(), building / STATISTICS_FILE)
        manifest = replace(manifest, files={file.name: _sha256(file) for file in sorted(building.iterdir())})
        (building / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        if card is not None:
            (building / CARD_FILE).write_text(card, encoding="utf-8")
    return manifest


def load_published(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Dictionary:
    """Reads and verifies a published dictionary; DictionaryFormatError says what was found and what was expected."""
    path = Path(path)
    manifest = read_manifest(path)
    if WEIGHTS_FILE not in manifest.files:
        raise DictionaryFormatError(f"{path / MANIFEST_FILE}: no checksum of {WEIGHTS_FILE} under files")
    if (path / STATISTICS_FILE).exists() and STATISTICS_FILE not in manifest.files:
        raise DictionaryFormatError(f"{path / MANIFEST_FILE}: no checksum of {STATISTICS_FILE} under files")
    for file, expected_sum in manifest.files.items():
        if Path(file).name != file:
            raise DictionaryFormatError(f"{path / MANIFEST_FILE}: files names {file!r}, expected names in the folder")
        _verify(path / file, expected_sum)
    weights = read_safetensors(path / WEIGHTS_FILE)
    shapes: dict[str, tuple[int, ...]] = {"encoder": (manifest.n_latents, manifest.d_in)}
    if not manifest.tied:
        shapes["decoder"] = shapes["encoder"]
    shapes |= {"pre_bias": (manifest.d_in,), "latent_bias": (manifest.n_latents,)}
    per_latent = {"jumprelu": ["threshold"], "gated": ["magnitude_scale", "magnitude_bias"]}
    shapes |= dict.fromkeys(per_latent.get(manifest.architecture, []), (manifest.n_latents,))
    optional = {"output_bias": (manifest.d_in,), "skip": (manifest.d_in, manifest.d_in)}
    shapes |= {name: shape for name, shape in optional.items() if name in weights}
    check_tensors(path / WEIGHTS_FILE, weights, shapes)
    unknown = sorted(set(weights) - set(shapes))
    if unknown:
        raise DictionaryFormatError(f"{path / WEIGHTS_FILE}: unknown tensors {unknown}, expected {sorted(shapes)}")
    statistics = read_statistics(path / STATISTICS_FILE) if STATISTICS_FILE in manifest.files else None
    tensors = {name: convert(tensor, dtype, device) for name, tensor in weights.items()}
    return build_dictionary(
        path,
        **({"decoder": tensors["encoder"]} | tensors),
        activation=manifest.architecture,
        k=manifest.k,
        normalization=manifest.normalization,
        postact=manifest.postact,
        transcoder=manifest.transcoder,
        site=manifest.site,
        name=manifest.name,
        manifest=manifest,
        statistics=statistics,
    )


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a published dictionary's folder, without its weights."""
    file = Path(path) / MANIFEST_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DictionaryFormatError(
            f"{file}: cannot be read, expected a published dictionary's manifest: {error}"
        ) from error
    try:
        return Manifest.from_json(text)
    except DictionaryFormatError as error:
        raise DictionaryFormatError(f"{file}: {error}") from error


def read_statistics(file: str | os.PathLike[str]) -> LatentStatistics:
    """The statistics in a `stats.safetensors`; DictionaryFormatError if they are damaged or incomplete."""
    tensors = read_safetensors(Path(file))
    try:
        return LatentStatistics.from_tensors(tensors)
    except ValueError as error:
        raise DictionaryFormatError(f"{file}: {error}") from error


def _stored_weights(dictionary: Dictionary, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {"encoder": dictionary.encoder.to(device="cpu", dtype=dtype)}
    if not dictionary.tied:
        tensors["decoder"] = dictionary.decoder.to(device="cpu", dtype=dtype)
    for name in ("pre_bias", "latent_bias", *OPTIONAL_TENSORS):
        tensor = getattr(dictionary, name)
        if tensor is not None:
            tensors[name] = tensor.to(device="cpu", dtype=dtype if name == "skip" else torch.float32)
    for name, tensor in tensors.items():
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{name} holds values that are not finite in {tensor.dtype}")
    # Clones, because safetensors refuses tensors that share memory.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify(file: Path, expected: str) -> None:
    try:
        actual = _sha256(file)
    except OSError as error:
        raise DictionaryFormatError(f"{file}: cannot be read, but the manifest lists it: {error}") from error
    if actual != expected:
        size = file.stat().st_size
        raise DictionaryFormatError(
            f"{file}: found sha256 {actual} ({size} bytes), the manifest expects {expected}; truncated or changed?"
        )
