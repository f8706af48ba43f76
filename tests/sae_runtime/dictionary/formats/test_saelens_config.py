"""SAELens' cfg.json: the processing of the backbone, keys that change the function, and what is left open."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_runtime import Backbone, DictionaryFormatError, load_dictionary
from sae_runtime.dictionary.formats.hooks import hook_of_site
from sae_runtime.dictionary.publish import publish
from tests.sae_runtime.dictionary.formats.test_saelens import D, N, write

PROCESSING = "model_from_pretrained_kwargs"
RESIDUAL = "blocks.0.hook_resid_pre"
SITES = [
    f"1.{location}"
    for location in (
        "resid_pre",
        "resid_delta_attn",
        "resid_post_attn",
        "mlp_post_act",
        "resid_delta_mlp",
        "resid_post_mlp",
    )
]


def metadata(hook: str = RESIDUAL, **processing: Any) -> dict[str, Any]:
    return {"metadata": {"sae_lens_version": "6.54.12", "hook_name": hook, PROCESSING: processing}}


@pytest.fixture(scope="module")
def centred_backbone(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The tiny backbone as TransformerLens centres it: every weight that writes to the residual stream has mean 0."""
    folder = Path(shutil.copytree(tiny_backbone_folder, tmp_path_factory.mktemp("centred") / "model"))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if any(part in name for part in ("wte", "wpe", "c_proj")):  # [..., width], weights and biases
            weights[name] = tensor - tensor.mean(-1, keepdim=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Backbone.load(folder)


@pytest.mark.parametrize("site", SITES)
def test_latents_are_those_on_the_processed_model(
    site: str, tiny_backbone: Backbone, centred_backbone: Backbone, tmp_path: Path
) -> None:
    """Raw activations with the flag give what activations of the centred model give without it."""
    ids = torch.randint(1, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    raw = tiny_backbone.activations(ids, sites=[site])[site].flatten(0, 1)
    processed = centred_backbone.activations(ids, sites=[site])[site].flatten(0, 1)
    width, n_latents = raw.shape[1], 32
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "W_enc": torch.randn(width, n_latents, generator=generator) + 0.3,
        "W_dec": torch.randn(n_latents, width, generator=generator),
        "b_enc": torch.zeros(n_latents),
        "b_dec": torch.randn(width, generator=generator),
        "threshold": None,
    }
    config = {"architecture": "standard", "d_in": width, "d_sae": n_latents}
    plain = load_dictionary(write(tmp_path / "plain", config | metadata(hook_of_site(site)), tensors))
    flags = {"center_writing_weights": True, "fold_ln": True, "fold_value_biases": True, "center_unembed": True}
    dictionary = load_dictionary(write(tmp_path / "flags", config | metadata(hook_of_site(site), **flags), tensors))
    expected, actual = plain.encode(processed), dictionary.encode(raw)
    torch.testing.assert_close(actual.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-4)
    # What the processed model lacks is in the reconstruction, so the error of reconstruction is the same vector.
    torch.testing.assert_close(
        dictionary.decode(actual) - raw, plain.decode(expected) - processed, rtol=1e-4, atol=1e-4
    )
    publish(dictionary, tmp_path / "published", tiny_backbone)
    again = load_dictionary(tmp_path / "published", backbone=tiny_backbone)
    assert again.normalization == dictionary.normalization == ("none" if site.endswith("act") else "centred")
    assert torch.equal(again.encode_dense(raw), dictionary.encode_dense(raw))


@pytest.mark.parametrize(
    ("config", "normalization"),
    [
        (metadata(), "none"),
        (metadata(center_writing_weights=False), "none"),
        (metadata(center_writing_weights=None), "none"),
        (metadata(fold_ln=True, device="cuda", dtype="bfloat16", n_devices=2), "none"),
        (metadata(center_writing_weights=True), "centred"),
        (metadata(center_writing_weights=True) | {"normalize_activations": "layer_norm"}, "layer_norm"),
        (metadata("blocks.0.mlp.hook_post", center_writing_weights=True), "none"),
        # Before version 6 the configuration itself said it. Other keys of the metadata are free.
        ({"metadata": {}, "hook_point": RESIDUAL, PROCESSING: {"center_writing_weights": True}}, "centred"),
        ({"metadata": {"hook_name": RESIDUAL, "center_writing_weights": True, "note": "mine"}}, "centred"),
    ],
)
def test_processing_of_the_backbone_is_applied(config: dict[str, Any], normalization: str, tmp_path: Path) -> None:
    assert load_dictionary(write(tmp_path / "d", config, {})).normalization == normalization


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (metadata(center_writing_weights="true"), "center_writing_weights is 'true', expected true or false"),
        (metadata(center_writing_weights=1), "center_writing_weights is 1, expected true or false"),
        (metadata(rotate_residual=True), rf"{PROCESSING}\.rotate_residual is True, an unknown key"),
        ({"metadata": {PROCESSING: ["fold_ln"]}}, rf"{PROCESSING} is \['fold_ln'\], expected an object"),
        (metadata("blocks.0.attn.hook_z", fold_value_biases=True), r"fold_value_biases is true, .*\.hook_z'"),
        (metadata("blocks.0.ln1.hook_normalized", center_writing_weights=True), "center_writing_weights is true, and"),
        (
            metadata(center_writing_weights=True) | {"normalize_activations": "constant_norm_rescale"},
            "true together with normalize_activations constant_norm_rescale, which is not supported",
        ),
        ({"center_writing_weights": True}, "center_writing_weights is True, which is not supported"),
        ({"activation_normalization_factor": 0.5}, "factor is 0.5, which is not supported; expected 1 or null"),
        ({"is_transcoder": True}, "is_transcoder is True, which is not supported; expected false or null"),
        ({"d_out": 8}, "d_out is 8, which is not supported; expected null"),
        ({"temperature": 0.5}, r"cfg\.json: temperature is 0\.5, an unknown key, which may change what"),
        ({"activation_fn_str": "tanh-relu"}, "activation function is 'tanh-relu', expected relu or topk"),
        (
            {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}},
            r"activation_fn_kwargs\.signed is True, an unknown key",
        ),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1, expected true or false"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DictionaryFormatError, match=message):
        load_dictionary(write(tmp_path / "d", config, {}))


def test_a_configuration_of_the_first_versions_is_read(tmp_path: Path) -> None:
    """The keys of gpt2-small-res-jb."""
    config = {
        "metadata": None,
        "architecture": None,
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_layer": 8,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "use_cached_activations": False,
        "cached_activations_path": "activations",
        "n_batches_in_buffer": 128,
        "total_training_tokens": 300000000,
        "store_batch_size": 32,
        "device": "mps",
        "seed": 42,
        "dtype": "torch.float32",
        "b_dec_init_method": "geometric_median",
        "expansion_factor": 32,
        "from_pretrained_path": None,
        "l1_coefficient": 8e-05,
        "lr": 0.0004,
        "lr_scheduler_name": None,
        "lr_warm_up_steps": 5000,
        "train_batch_size": 4096,
        "use_ghost_grads": True,
        "feature_sampling_window": 1000,
        "feature_sampling_method": None,
        "resample_batches": 1028,
        "feature_reinit_scale": 0.2,
        "dead_feature_window": 5000,
        "dead_feature_estimation_method": "no_fire",
        "dead_feature_threshold": 1e-06,
        "log_to_wandb": True,
        "wandb_project": "saes",
        "wandb_entity": None,
        "wandb_log_frequency": 100,
        "n_checkpoints": 10,
        "checkpoint_path": "checkpoints",
        "tokens_per_buffer": 67108864,
        "run_name": "a run",
    }
    folder = write(tmp_path / "d", config, {"threshold": None})
    with pytest.warns(UserWarning, match=r"d/cfg\.json: the file does not say how the model was processed"):
        dictionary = load_dictionary(folder)
    assert (dictionary.site, dictionary.normalization, dictionary.activation) == ("8.resid_pre", "none", "relu")


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({"metadata": None, "hook_point": RESIDUAL}, True),
        ({"metadata": None, "hook_point": RESIDUAL, "sae_lens_training_version": "3.19.1"}, True),
        ({"metadata": None, "hook_point": RESIDUAL, PROCESSING: {}, "sae_lens_training_version": "2.0.0"}, True),
        ({"metadata": None, "hook_point": RESIDUAL, "sae_lens_training_version": "3.19.2"}, False),
        ({"metadata": None, "hook_point": RESIDUAL, PROCESSING: {"center_writing_weights": False}}, False),
        ({"metadata": None, "hook_point": RESIDUAL, "normalize_activations": "layer_norm"}, False),
        ({"metadata": None, "hook_point": "blocks.0.mlp.hook_post"}, False),
        ({"metadata": {"hook_name": RESIDUAL}}, False),
    ],
)
def test_a_file_from_before_processing_was_recorded_warns(config: dict[str, Any], warned: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", config, {})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_dictionary(folder)
    assert [str(warning.message).startswith(f"{folder / 'cfg.json'}: the file does not say") for warning in seen] == (
        [True] if warned else []
    )


@pytest.mark.parametrize("normalize", [None, False, "none"])
def test_no_normalisation(normalize: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {"normalize_activations": normalize}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_dictionary(folder).normalization == "none"


@pytest.mark.parametrize("normalize", [True, "expected_average_only_in"])
def test_a_scale_that_is_not_folded_warns(normalize: object, tmp_path: Path) -> None:
    """SAELens writes "none" where it folds the scale; the weights are read as they are, as it does."""
    folder = write(tmp_path / "d", {"normalize_activations": normalize}, {})
    with pytest.warns(UserWarning, match=r"d/cfg\.json: .* not folded .* fold_activation_norm_scaling_factor"):
        dictionary = load_dictionary(folder)
    assert dictionary.normalization == "none"
    assert torch.equal(dictionary.encoder.T, load_file(folder / "sae_weights.safetensors")["W_enc"])
    assert dictionary.encoder.shape == (N, D)
    assert json.loads((folder / "cfg.json").read_text())["normalize_activations"] == normalize
