"""SAELens' folders (SAELens 6.54 and the shapes before 6.0): cfg.json, sae_weights.safetensors.

    encode   z = act(x' W_enc + b_enc), where x' is the normalised input minus b_dec
             (without the subtraction if apply_b_dec_to_input is false; the default is true)
    decode   z W_dec + b_dec, un-normalised

Architectures:

    standard   act is ReLU
    jumprelu   threshold [n]; BatchTopK and Matryoshka are stored so too
    gated      b_gate, r_mag and b_mag instead of b_enc; magnitudes are relu(x' W_enc exp(r_mag) + b_mag)
    topk       k. With rescale_acts_by_decoder_norm latents are multiplied by the norms of the decoder rows before the
               top-k, and divided by them when decoding. The factor is read into the encoder, its inverse into the
               decoder.

What cfg.json says is read in `saelens_config`. sparsity.safetensors, a table of firing rates, is not read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_runtime.atomic import atomic_folder
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats.hooks import hook_of_site
from sae_runtime.dictionary.formats.origin import Origin
from sae_runtime.dictionary.formats.saelens_config import (
    ACTIVATIONS,
    CENTRING,
    PROCESSING,
    SaelensConfig,
    read_saelens_config,
)
from sae_runtime.dictionary.formats.weights import (
    build_dictionary,
    check_tensors,
    convert,
    latent_bias_without_pre_bias,
    read_safetensors,
)
from sae_runtime.errors import DictionaryFormatError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"
EXPECTED = f"SAELens' folder ({CONFIG_FILE} and {WEIGHTS_FILE})"
# The version whose loader was checked to read what `save_saelens` writes. The version in a file decides how SAELens
# reads its configuration.
WRITTEN_FOR = "6.54.12"


def load_saelens(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Dictionary:
    """A dictionary from SAELens' folder; DictionaryFormatError says what is wrong with the folder."""
    folder = Path(path)
    config = read_saelens_config(folder / CONFIG_FILE, EXPECTED)
    tensors = _tensors(folder / WEIGHTS_FILE, config, dtype, device)
    b_dec = tensors.pop("b_dec")
    return build_dictionary(
        folder,
        **tensors,
        pre_bias=b_dec if config.subtracts_bias else torch.zeros_like(b_dec),
        output_bias=None if config.subtracts_bias else b_dec,
        activation=ACTIVATIONS[config.architecture],
        k=config.k,
        normalization=config.normalization,
        site=config.site,
        name=folder.resolve().name,
        origin=Origin.of(
            "saelens",
            hook=config.hook,
            model=config.said("model_name"),
            context_length=config.said("context_size"),
            prepend_bos=config.said("prepend_bos"),
            config=config.raw,
        ),
    )


def save_saelens(dictionary: Dictionary, path: str | os.PathLike[str]) -> None:
    """Writes a dictionary as SAELens' folder in float32. The folder appears complete or not at all.

    The format has one bias for both ends. If the dictionary subtracts another bias before encoding than it adds after
    decoding, the subtracted one is multiplied with the encoder into b_enc. Known firing rates go into
    sparsity.safetensors as log10, as SAELens has them.

    Raises:
        ValueError: the format cannot express the dictionary: groupmax, a top-k without ReLU, a skip connection, a
            transcoder, a gate with a magnitude scale of 0, or the normalisation "centred" at a site that is not of the
            residual stream.
        FileExistsError: the folder exists.
    """
    _check_expressible(dictionary)
    architecture = {activation: name for name, activation in ACTIVATIONS.items()}[dictionary.activation]
    subtract = dictionary.output_bias is None
    latent_bias = dictionary.latent_bias if subtract else latent_bias_without_pre_bias(dictionary)
    tensors = {"W_enc": dictionary.encoder.T, "W_dec": dictionary.decoder}
    tensors["b_dec"] = dictionary.pre_bias if dictionary.output_bias is None else dictionary.output_bias
    if dictionary.activation == "gated":
        assert dictionary.magnitude_scale is not None
        assert dictionary.magnitude_bias is not None
        magnitude_bias = dictionary.magnitude_bias.double()
        if not subtract:  # the pre-bias shifts the encoder's product, here in the units of the magnitudes
            magnitude_bias = magnitude_bias + (latent_bias - dictionary.latent_bias) * dictionary.magnitude_scale
        tensors |= {"b_gate": latent_bias, "r_mag": dictionary.magnitude_scale.double().log(), "b_mag": magnitude_bias}
    else:
        tensors["b_enc"] = latent_bias
    if dictionary.threshold is not None:
        tensors["threshold"] = dictionary.threshold
    with atomic_folder(Path(path)) as folder:
        save_file({name: _stored(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        config = json.dumps(_config(dictionary, architecture, subtract), indent=1)
        (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        if dictionary.statistics is not None:
            sparsity = torch.log10(dictionary.statistics.firing_rate + 1e-10)
            save_file({"sparsity": _stored(sparsity)}, folder / SPARSITY_FILE)


def _tensors(file: Path, config: SaelensConfig, dtype: torch.dtype, device: str | torch.device) -> dict[str, Tensor]:
    """Tensors by the names of `Dictionary`'s fields, and b_dec."""
    architecture, n_latents, d_in = config.architecture, config.n_latents, config.d_in
    weights = read_safetensors(file)
    scaling = weights.pop("scaling_factor", None)
    if scaling is not None and not torch.equal(scaling, torch.ones_like(scaling)):
        raise DictionaryFormatError(f"{file}: scaling_factor is not all 1; expected a file without finetuning factors")
    keys = {"encoder": "W_enc", "decoder": "W_dec", "b_dec": "b_dec", "latent_bias": "b_enc"}
    if architecture == "jumprelu":
        keys["threshold"] = "threshold"
    elif architecture == "gated":
        keys |= {"latent_bias": "b_gate", "magnitude_scale": "r_mag", "magnitude_bias": "b_mag"}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(keys.values(), (n_latents,))
    shapes |= {"W_enc": (d_in, n_latents), "W_dec": (n_latents, d_in), "b_dec": (d_in,)}
    check_tensors(file, weights, shapes)
    if unknown := sorted(set(weights) - set(shapes)):
        raise DictionaryFormatError(
            f"{file}: unknown tensors {unknown}, expected {sorted(shapes)} of architecture {architecture}"
        )
    tensors = {name: weights[key] for name, key in keys.items()}
    tensors["encoder"] = tensors["encoder"].T
    if config.rescales:
        norm = torch.linalg.vector_norm(tensors["decoder"].double(), dim=1)
        tensors["encoder"] = tensors["encoder"] * norm[:, None]
        tensors["latent_bias"] = tensors["latent_bias"] * norm
        # A latent whose decoder row is 0 has factor 0 and is never active.
        tensors["decoder"] = tensors["decoder"] / norm.masked_fill(norm == 0, 1)[:, None]
    if architecture == "gated":
        tensors["magnitude_scale"] = tensors["magnitude_scale"].double().exp()
    return {name: convert(tensor, dtype, device) for name, tensor in tensors.items()}


def _check_expressible(dictionary: Dictionary) -> None:
    inexpressible = {
        "groupmax": dictionary.activation == "groupmax",
        "a top-k without ReLU": dictionary.postact != "relu",
        "a skip connection": dictionary.skip is not None,
        "a transcoder": dictionary.transcoder,
        "a gate with a magnitude scale of 0": dictionary.magnitude_scale is not None
        and not bool((dictionary.magnitude_scale > 0).all()),
        "the normalisation 'centred' outside the residual stream": dictionary.normalization == "centred"
        and (dictionary.site is None or dictionary.require_site().location == "mlp_post_act"),
    }
    if present := [name for name, is_present in inexpressible.items() if is_present]:
        raise ValueError(f"SAELens' format cannot express {' and '.join(present)}")


def _config(dictionary: Dictionary, architecture: str, subtract: bool) -> dict[str, Any]:
    origin, manifest = dictionary.origin, dictionary.manifest
    hook = origin.hook if origin is not None and origin.format == "saelens" else None
    if hook is None and dictionary.site is not None:
        hook = hook_of_site(dictionary.site)
    model = manifest.backbone.name if manifest is not None else origin.model if origin is not None else None
    context = manifest.context_length if manifest is not None else origin.context_length if origin is not None else None
    metadata: dict[str, Any] = {
        "model_name": model,
        "hook_name": hook,
        "context_size": context,
        "prepend_bos": dictionary.prepend_bos,
    }
    if dictionary.normalization == "centred":  # SAELens leaves it to the model to take the mean off
        metadata[PROCESSING] = {CENTRING: True}
    config = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtract,
        "normalize_activations": {"constant_norm": "constant_norm_rescale", "centred": "none"}.get(
            dictionary.normalization, dictionary.normalization
        ),
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": WRITTEN_FOR, "sae_lens_training_version": None}
        | {key: value for key, value in metadata.items() if value is not None},
    }
    if dictionary.k is not None:
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    return config


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
