"""sparsify's folders (github.com/EleutherAI/sparsify, 1.3.0, commit 9d3b136): <hookpoint>/cfg.json, sae.safetensors.

    encode   z = act(encoder (x - b_dec) + encoder.bias); with `transcode` b_dec is not subtracted
    decode   W_dec^T z + b_dec + W_skip x, where W_skip exists only with a skip connection and x is the raw input

act is topk or groupmax, followed by ReLU. num_latents 0 means d_in * expansion_factor. As in the project, keys that
cfg.json lacks have defaults. multi_topk and normalize_decoder concern training only. Keys of other versions and of the
project's branches, such as signed (the k largest by absolute value), must have the value that changes nothing.
(With multi_topk the project's forward() returns the reconstruction from 4k latents that its loss uses. Its encode and
decode do not change.) The folder's name is the hookpoint, for example "h.8.mlp". The dictionary reads and decodes to
the output of that module. With `transcode` it reads the module's input and decodes to the output.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats.hooks import site_of_module
from sae_runtime.dictionary.formats.keys import check_keys, key_set
from sae_runtime.dictionary.formats.origin import Origin
from sae_runtime.dictionary.formats.weights import (
    build_dictionary,
    check_tensors,
    convert,
    integer,
    read_config,
    read_safetensors,
)
from sae_runtime.errors import DictionaryFormatError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
EXPECTED = f"sparsify's folder ({CONFIG_FILE} and {WEIGHTS_FILE})"
_TRAINING = key_set(
    """
    normalize_decoder multi_topk naive_decoder decoder_xformers init_method freeze_encoder train_post_encoder
    e2e_kl_coeff e2e_mse_coeff e2e_start
    """
)
# Of the project's branches: what switches another encoder or decoder on, and the settings of what is off.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "signed": (False,),
    "normalize_encoder": (False,),
    "normalize_io": (False,),
    "optimized_encoder_config": ("None_",),
    "coalesce_topk": ("none",),
    "num_layers": (1,),
} | dict.fromkeys(
    key_set(
        """
    monet encoder_monarch encoder_mpnet encoder_halut encoder_pkm encoder_kron matching_pursuit ito slice_encoder
    slice_decoder post_encoder_scale tied_decoder matryoshka ste_thresh_est per_step_loss n_targets n_sources
    post_neurons logic_layers
    """
    ),
    (False, 0),
)
_SETTINGS_OF_WHAT_IS_OFF = key_set(
    """
    monet_config monarch_inner_dim monarch_mul pkm_pad pkm_rand pkm_softmax pkm_heads pkm_bias pkm_init_scale pkm_config
    topk_separate kron_in_group kron_out_group kron_u kron_lora kronecker_config fff_config mp_encoder mp_detach
    mp_untie mp_aux divide_cross_layer topk_coalesced ste ste_temperature matryoshka_groups post_l1_alpha residual_mode
    narrowing group_max_k
    """
)
_DEFAULTS: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "num_latents": 0,
    "k": 32,
    "skip_connection": False,
    "transcode": False,
}


def load_sparsify(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Dictionary:
    """A dictionary from a hookpoint's folder; DictionaryFormatError says what is wrong with the folder."""
    folder = Path(path)
    file = folder / CONFIG_FILE
    raw = read_config(file, EXPECTED)
    check_keys(file, raw, {"d_in", *_DEFAULTS} | _TRAINING | _SETTINGS_OF_WHAT_IS_OFF, _NEUTRAL)
    config: dict[str, Any] = _DEFAULTS | raw
    for key in ("skip_connection", "transcode"):
        if not isinstance(config[key], bool):
            raise DictionaryFormatError(f"{file}: {key} is {config[key]!r}, expected true or false")
    if config["activation"] not in ("topk", "groupmax"):
        raise DictionaryFormatError(f"{file}: activation is {config['activation']!r}, expected topk or groupmax")
    d_in = integer(file, config, "d_in")
    n_latents = integer(file, config, "num_latents", minimum=0) or d_in * integer(file, config, "expansion_factor")
    weights = read_safetensors(folder / WEIGHTS_FILE)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (n_latents, d_in),
        "encoder.bias": (n_latents,),
        "W_dec": (n_latents, d_in),
        "b_dec": (d_in,),
    }
    if config["skip_connection"]:
        shapes["W_skip"] = (d_in, d_in)
    check_tensors(folder / WEIGHTS_FILE, weights, shapes)
    if unknown := sorted(set(weights) - set(shapes)):
        raise DictionaryFormatError(f"{folder / WEIGHTS_FILE}: unknown tensors {unknown}, expected {sorted(shapes)}")
    tensors = {key: convert(tensor, dtype, device) for key, tensor in weights.items()}
    transcode = config["transcode"]
    return build_dictionary(
        folder,
        encoder=tensors["encoder.weight"],
        latent_bias=tensors["encoder.bias"],
        decoder=tensors["W_dec"],
        pre_bias=torch.zeros_like(tensors["b_dec"]) if transcode else tensors["b_dec"],
        output_bias=tensors["b_dec"] if transcode else None,
        skip=tensors.get("W_skip"),
        activation=config["activation"],
        k=integer(file, config, "k"),
        transcoder=transcode,
        site=site_of_module(folder.resolve().name, reads_input=transcode),
        name=folder.resolve().name,
        origin=Origin("sparsify", hook=folder.resolve().name, config=raw),
    )
