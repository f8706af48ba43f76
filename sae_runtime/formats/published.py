"""The project's own published form: a folder with a manifest, safetensors weights, statistics and checksums.

dictionary.json       Manifest, with the sha256 of the two data files
weights.safetensors   encoder [n_latents, d_in], decoder [n_latents, d_in] (absent when tied), pre_bias, latent_bias
stats.safetensors     LatentStatistics
CARD.md               optional, for people; not part of the checksums
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_runtime.autoencoder import Dictionary
from sae_runtime.errors import DictionaryFormatError
from sae_runtime.formats.manifest import BackboneReference, Manifest, Provenance
from sae_runtime.formats.weights import build_dictionary, check_tensors, convert
from sae_runtime.statistics import LatentStatistics

MANIFEST_FILE = "dictionary.json"
WEIGHTS_FILE = "weights.safetensors"
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
    """Write a dictionary as a folder and return its manifest.

    The folder appears complete or not at all: it is written beside its place, flushed to disk and renamed. With
    `overwrite` an existing one is moved aside first and removed afterwards. `dtype` is that of the stored encoder and
    decoder ("float16", "bfloat16", "float32"); biases are stored as float32.

    ValueError: no statistics, no site, an unknown dtype, or weights that overflow it. FileExistsError.
    """
    path = Path(path)
    statistics = statistics or dictionary.statistics
    if statistics is None or statistics.n_latents != dictionary.n_latents:
        found = "none" if statistics is None else f"those of {statistics.n_latents} latents"
        raise ValueError(f"publishing needs statistics of {dictionary.n_latents} latents, found {found}")
    if dictionary.site is None:
        raise ValueError("publishing needs the dictionary's site")
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(STORED_DTYPES)}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; remove it or overwrite it on purpose")
    manifest = Manifest(
        name=name or dictionary.name or path.name,
        backbone=backbone,
        site=dictionary.site,
        architecture=dictionary.activation,
        d_in=dictionary.d_in,
        n_latents=dictionary.n_latents,
        k=dictionary.k,
        normalize=dictionary.normalize,
        tied=dictionary.tied,
        dtype=dtype,
        context_length=context_length,
        postact=dictionary.postact,
        provenance=provenance or Provenance(),
        evaluation=dict(evaluation or {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        save_file(_stored_weights(dictionary, STORED_DTYPES[dtype]), building / WEIGHTS_FILE)
        save_file(statistics.to_tensors(), building / STATISTICS_FILE)
        files = {file: _sha256(building / file) for file in (WEIGHTS_FILE, STATISTICS_FILE)}
        manifest = replace(manifest, files=files)
        (building / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        if card is not None:
            (building / CARD_FILE).write_text(card, encoding="utf-8")
        for file in building.iterdir():
            file.chmod(0o644)
            _flush(file)
        building.chmod(0o755)
        _flush(building)
        _put_in_place(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return manifest


def load_published(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Dictionary:
    """Read and verify a published dictionary; DictionaryFormatError says what was found and what was expected."""
    path = Path(path)
    manifest = read_manifest(path)
    for required in (WEIGHTS_FILE, STATISTICS_FILE):
        if required not in manifest.files:
            raise DictionaryFormatError(f"{path / MANIFEST_FILE}: no checksum of {required} under files")
    for file, expected_sum in manifest.files.items():
        if Path(file).name != file:
            raise DictionaryFormatError(f"{path / MANIFEST_FILE}: files names {file!r}, expected names in the folder")
        _verify(path / file, expected_sum)
    weights = _read_tensors(path / WEIGHTS_FILE)
    shapes: dict[str, tuple[int, ...]] = {"encoder": (manifest.n_latents, manifest.d_in)}
    if not manifest.tied:
        shapes["decoder"] = shapes["encoder"]
    shapes |= {"pre_bias": (manifest.d_in,), "latent_bias": (manifest.n_latents,)}
    check_tensors(path / WEIGHTS_FILE, weights, shapes)
    unknown = sorted(set(weights) - set(shapes))
    if unknown:
        raise DictionaryFormatError(f"{path / WEIGHTS_FILE}: unknown tensors {unknown}, expected {sorted(shapes)}")
    try:
        statistics = LatentStatistics.from_tensors(_read_tensors(path / STATISTICS_FILE))
    except ValueError as error:
        raise DictionaryFormatError(f"{path / STATISTICS_FILE}: {error}") from error
    tensors = {name: convert(tensor, dtype, device) for name, tensor in weights.items()}
    return build_dictionary(
        path,
        encoder=tensors["encoder"],
        decoder=tensors.get("decoder", tensors["encoder"]),
        pre_bias=tensors["pre_bias"],
        latent_bias=tensors["latent_bias"],
        activation=manifest.architecture,
        k=manifest.k,
        normalize=manifest.normalize,
        postact=manifest.postact,
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


def _stored_weights(dictionary: Dictionary, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {"encoder": dictionary.encoder.to(device="cpu", dtype=dtype)}
    if not dictionary.tied:
        tensors["decoder"] = dictionary.decoder.to(device="cpu", dtype=dtype)
    tensors["pre_bias"] = dictionary.pre_bias.to(device="cpu", dtype=torch.float32)
    tensors["latent_bias"] = dictionary.latent_bias.to(device="cpu", dtype=torch.float32)
    for name, tensor in tensors.items():
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{name} holds values that are not finite in {tensor.dtype}")
    # Clones, because safetensors refuses tensors that share memory.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DictionaryFormatError(f"{file}: cannot be read as safetensors: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify(file: Path, expected: str) -> None:
    try:
        found = _sha256(file)
    except OSError as error:
        raise DictionaryFormatError(f"{file}: cannot be read, but the manifest lists it: {error}") from error
    if found != expected:
        size = file.stat().st_size
        raise DictionaryFormatError(
            f"{file}: found sha256 {found} ({size} bytes), the manifest expects {expected}; truncated or changed?"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(building: Path, path: Path) -> None:
    aside: Path | None = None
    if path.exists():
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        os.rename(path, aside)
    try:
        os.rename(building, path)
    except OSError:
        if aside is not None:
            os.rename(aside, path)
        raise
    with suppress(OSError):  # not every file system lets a folder be flushed
        _flush(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
