"""SAELens' cfg.json: what of it changes the function, checked, and the processing of the backbone that it records.

Configurations before 6.0 have hook_point or hook_name at the top, activation_fn_str with activation_fn_kwargs.k (which
makes "standard" a topk), and a boolean normalize_activations. They lack keys for what could not be chosen yet.

normalize_activations: layer_norm and constant_norm_rescale act at inference. expected_average_only_in does not. SAELens
writes "none" when it folds that scale into the weights at the end of training, so a file that still says
expected_average_only_in has weights in units of the scaled activations. SAELens reads such a file as it is, and so does
this project, with a warning.

model_from_pretrained_kwargs says how TransformerLens processed the model. At the sites of this project

    center_writing_weights   takes the mean off every row of the residual stream and of what is added to it: the
                             normalisation "centred", or nothing with layer_norm, which takes it off anyway;
                             mlp.hook_post is behind a normalisation that takes it off in any case
    fold_ln, fold_value_biases, center_unembed, refactor_factored_attn_matrices   change no value

A file without the key is read as of an unprocessed model, as SAELens does. Before 3.19.2 (September 2024) SAELens
trained on the processed model and did not record it, so such a file gives a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_runtime.dictionary.dictionary import Activation
from sae_runtime.dictionary.formats.hooks import site_of_hook
from sae_runtime.dictionary.formats.keys import check_keys, key_set
from sae_runtime.dictionary.formats.weights import integer, read_config
from sae_runtime.dictionary.normalization import Normalization
from sae_runtime.errors import DictionaryFormatError
from sae_runtime.model.sites import Site

ACTIVATIONS: dict[str, Activation] = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
NORMALIZATIONS: dict[str, Normalization] = {
    "none": "none",
    "expected_average_only_in": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
PROCESSING = "model_from_pretrained_kwargs"
CENTRING = "center_writing_weights"
UNRECORDED_PROCESSING = ".*: the file does not say how the model was processed"  # a pattern of the warning's text
_TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
_RECORDS_PROCESSING = (3, 19, 2)  # the first version of SAELens whose files say how the model was processed

# Keys of SAELens 0.1 to 6.54 that are read here, or that describe the training and its data.
_KNOWN = key_set(
    """
    act_store_device activation_fn activation_fn_kwargs activation_fn_str activations_mixing_fraction adam_beta1
    adam_beta2 apply_b_dec_to_input architecture autocast autocast_dtype autocast_lm aux_loss_coefficient
    b_dec_init_method begin_batch_token begin_sequence_token cached_activations_path checkpoint_path
    coefficient_warm_up_steps compile_llm compile_sae context_size d_in d_sae data dataset_path
    dataset_trust_remote_code dead_feature_estimation_method dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device
    disable_concat_sequences dtype end_pos_offset eval_batch_size_prompts eval_every_n_wandb_logs
    exclude_bos_between_sequences exclude_special_tokens expansion_factor feature_reinit_scale
    feature_sampling_method feature_sampling_window finetuning_method finetuning_scaling_factor finetuning_tokens
    fisher_lambda_term from_pretrained_path hook_eval hook_head_index hook_layer hook_name hook_point hook_point_eval
    hook_point_head_index hook_point_layer include_final_checkpoint init_encoder_as_decoder_transpose
    initial_threshold is_dataset_tokenized jumprelu_bandwidth jumprelu_init_threshold jumprelu_kernel
    jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale k l0_coefficient l0_lambda l0_warm_up_steps
    l1_coefficient l1_normalization_fn l1_warm_up_steps l1_warmup_steps llm_compilation_mode llm_device
    log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb logger logging
    lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps matryoshka_widths meta metadata model
    model_class model_class_name model_from_pretrained_kwargs model_kwargs model_name mse_loss_normalization
    n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches n_eval_seqs n_restart_cycles
    neuronpedia_id noise_scale normalize_activations normalize_sae_decoder output_path pre_act_loss_coefficient
    prefetch_llm_batches prepend_bos resample_batches resampling rescale_acts_by_decoder_norm reshape_activations
    resume resume_from_checkpoint run_name sae sae_compilation_mode sae_lens_training_version sae_lens_version
    sae_metadata save_final_checkpoint scale_sparsity_penalty_by_decoder_norm seed seqpos_slice
    sequence_separator_token shuffle_buffer_size sparse_intermediate sparsity_coefficient start_pos_offset
    store_batch_size store_batch_size_prompts streaming system target_l0 threshold tokens_per_buffer topk_threshold_lr
    total_training_samples total_training_steps total_training_tokens train_batch_size train_batch_size_samples
    train_batch_size_tokens training training_tokens use_cached_activations use_chat_formatting use_fisher
    use_ghost_grads use_matryoshka_aux_loss use_sparse_activations uses_scaling_factor verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project
    """
)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "activation_normalization_factor": (1,),
    "hook_names": ([],),
    "hook_layers": ([],),
    "is_transcoder": (False,),
    "normalize_decoder": (False,),
    "out_hook_point": (),
    "out_hook_point_layer": (),
    "d_out": (),
    "sae_class_name": ("SparseAutoencoder",),
    "sae_type": ("sae",),
    "variant": ("baseline",),
    CENTRING: (False,),
    "fold_ln": (False,),
}
_PROCESSING_FLAGS = (
    CENTRING,
    "fold_ln",
    "fold_value_biases",
    "center_unembed",
    "refactor_factored_attn_matrices",
)
# Arguments of from_pretrained that say which model is loaded, and where and how, but do not process it.
_LOADING = key_set(
    """
    attn_implementation cache_dir checkpoint_index checkpoint_label checkpoint_value default_padding_side
    default_prepend_bos device device_map dtype first_n_layers force_download local_files_only low_cpu_mem_usage
    move_to_device n_ctx n_devices revision subfolder token torch_dtype trust_remote_code use_auth_token
    use_safetensors
    """
)


@dataclass(frozen=True)
class SaelensConfig:
    """What a cfg.json says about the function, and where the activations come from."""

    architecture: str
    d_in: int
    n_latents: int
    k: int | None
    normalization: Normalization
    subtracts_bias: bool
    rescales: bool
    hook: object
    raw: Mapping[str, Any]
    metadata: Mapping[str, Any]

    @property
    def site(self) -> str | None:
        return site_of_hook(self.hook) if isinstance(self.hook, str) else None

    def said(self, key: str) -> Any:
        """What the metadata or, before version 6, the configuration itself says; None if nothing."""
        value = self.metadata.get(key)
        return self.raw.get(key) if value is None else value


def read_saelens_config(file: Path, expected: str) -> SaelensConfig:
    """The configuration in a cfg.json; DictionaryFormatError says what is wrong with it, `expected` what it should be.

    Warns (UserWarning) where the file leaves open what the dictionary reads.
    """
    raw = read_config(file, expected)
    check_keys(file, raw, _KNOWN, _NEUTRAL)
    metadata = raw.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise DictionaryFormatError(f"{file}: metadata is {metadata!r}, expected an object")
    architecture, k = _architecture(file, raw)
    subtracts = raw.get("apply_b_dec_to_input", True)
    rescales = architecture == "topk" and raw.get("rescale_acts_by_decoder_norm", False)
    for key, value in (("apply_b_dec_to_input", subtracts), ("rescale_acts_by_decoder_norm", rescales)):
        if not isinstance(value, bool):
            raise DictionaryFormatError(f"{file}: {key} is {value!r}, expected true or false")
    config = SaelensConfig(
        architecture=architecture,
        d_in=integer(file, raw, "d_in"),
        n_latents=integer(file, raw, "d_sae"),
        k=k,
        normalization=_normalization(file, raw),
        subtracts_bias=subtracts,
        rescales=rescales,
        hook=metadata.get("hook_name") or raw.get("hook_name") or raw.get("hook_point"),
        raw=raw,
        metadata=metadata,
    )
    return _processed(file, config)


def _architecture(file: Path, raw: Mapping[str, Any]) -> tuple[str, int | None]:
    """SAELens' name of the architecture, and k if it is topk."""
    architecture = raw.get("architecture", "standard")
    function = raw.get("activation_fn_str", raw.get("activation_fn"))
    options = raw.get("activation_fn_kwargs") or {}
    if function == "topk" and isinstance(options, Mapping) and architecture in ("standard", "topk"):
        check_keys(file, options, ("k",), where="activation_fn_kwargs.")
        return "topk", integer(file, {"k": raw.get("k"), **options}, "k")  # as before version 6
    if architecture in _TRAINING_ONLY:
        raise DictionaryFormatError(
            f"{file}: architecture is {architecture!r}, a training checkpoint; expected the inference form (jumprelu) "
            "that save_inference_model writes"
        )
    if not isinstance(architecture, str) or architecture not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise DictionaryFormatError(f"{file}: architecture is {architecture!r}, expected one of {known}")
    if function not in (None, "relu"):
        raise DictionaryFormatError(f"{file}: activation function is {function!r}, expected relu or topk")
    return architecture, integer(file, raw, "k") if architecture == "topk" else None


def _normalization(file: Path, raw: Mapping[str, Any]) -> Normalization:
    normalize = raw.get("normalize_activations") or "none"
    if normalize is True:
        normalize = "expected_average_only_in"
    if not isinstance(normalize, str) or normalize not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise DictionaryFormatError(f"{file}: normalize_activations is {normalize!r}, expected one of {known}")
    if normalize == "expected_average_only_in":
        warnings.warn(
            f"{file}: normalize_activations is expected_average_only_in, so the scale that training put on the "
            "activations is not folded into the weights: latents and reconstructions are wrong by that scale. It is "
            "sqrt(d_in) over the mean norm of an activation; fold it with SAELens' fold_activation_norm_scaling_factor "
            "and save again. If it is folded already, set normalize_activations to none",
            stacklevel=2,
        )
    return NORMALIZATIONS[normalize]


def _processed(file: Path, config: SaelensConfig) -> SaelensConfig:
    """The configuration, with the processing of the model applied to its normalisation."""
    options = config.said(PROCESSING)
    if options is not None and not isinstance(options, Mapping):
        raise DictionaryFormatError(f"{file}: {PROCESSING} is {options!r}, expected an object")
    # Metadata is free text, except for what it says about processing.
    flags = {flag: config.metadata[flag] for flag in _PROCESSING_FLAGS if flag in config.metadata} | dict(options or {})
    check_keys(file, flags, {*_PROCESSING_FLAGS, *_LOADING}, where=f"{PROCESSING}.")
    for flag in _PROCESSING_FLAGS:
        if not isinstance(flags.get(flag) or False, bool):
            raise DictionaryFormatError(f"{file}: {PROCESSING}.{flag} is {flags[flag]!r}, expected true or false")
    applied = [flag for flag in _PROCESSING_FLAGS if flags.get(flag)]
    if config.site is None:
        if applied:
            raise DictionaryFormatError(
                f"{file}: {PROCESSING}.{applied[0]} is true, and what it changes is known at the sites of this project "
                f"only; the hook is {config.hook!r}"
            )
        return config
    if Site.parse(config.site).location == "mlp_post_act" or config.normalization == "layer_norm":
        return config
    if CENTRING not in flags and _may_be_centred(config):
        warnings.warn(
            f"{file}: the file does not say how the model was processed, and SAELens before 3.19.2 took the mean "
            f"off every row of the residual stream; it is read as if it had not. If it had, as for gpt2-small-res-jb, "
            f'add "{PROCESSING}": {{"{CENTRING}": true}}; if not, the same with false',
            stacklevel=2,
        )
    if CENTRING not in applied:
        return config
    if config.normalization == "constant_norm":
        raise DictionaryFormatError(
            f"{file}: {PROCESSING}.{CENTRING} is true together with normalize_activations constant_norm_rescale, "
            "which is not supported"
        )
    return replace(config, normalization="centred")


def _may_be_centred(config: SaelensConfig) -> bool:
    """Whether the file is of a version of SAELens that trained on the processed model without recording it."""
    version = config.said("sae_lens_training_version") or config.said("sae_lens_version")
    if version is None:
        return "metadata" not in config.raw
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    return numbers is not None and tuple(map(int, numbers.groups())) < _RECORDS_PROCESSING
