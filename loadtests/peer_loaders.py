"""Runs in the peers' own environment (see peer_formats.py): reads and writes dictionaries with the peers' own code.

    python peer_loaders.py FOLDER [OPENAI_CHECKOUT]

FOLDER/jobs.json lists the dictionaries to read: {"format", "path", "out"}. The loader of its project loads each of
them, it is applied to the tensor x of FOLDER/x.safetensors, and latents and reconstructions are written to `out` (acts,
recon). Then the classes of every project write dictionaries of random weights into FOLDER/written/<format>-<family>,
with latents and reconstructions in expected.safetensors. This file does not import the project that it checks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor
Encode = Callable[[Tensor], Tensor]


def main() -> None:
    folder = Path(sys.argv[1])
    openai = _openai_class(Path(sys.argv[2])) if len(sys.argv) > 2 else None
    x = load_file(folder / "x.safetensors")["x"]
    versions = {}
    with torch.no_grad():
        for job in json.loads((folder / "jobs.json").read_text()):
            if job["format"] == "saelens":
                acts, recon = _read_saelens(job["path"], x)
            else:
                assert openai is not None
                acts, recon = _read_openai(openai, job["path"], x)
            _save(Path(job["out"]), acts, recon)
        for write in (_saelens, _sparsify, _dictionary_learning):
            for name, acts, recon in write(folder / "written", x):
                _save(folder / "written" / name / "expected.safetensors", acts, recon)
    for package in ("sae-lens", "eai-sparsify", "dictionary-learning", "torch"):
        versions[package] = importlib.metadata.version(package)
    (folder / "versions.json").write_text(json.dumps(versions))


def _save(file: Path, acts: Tensor, recon: Tensor) -> None:
    save_file({"acts": acts.float().contiguous(), "recon": recon.float().contiguous()}, file)


def _read_saelens(path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(path)
    acts = sae.encode(x)
    return acts, sae.decode(acts)


def _openai_class(checkout: Path) -> Any:
    """`Autoencoder` from model.py in a checkout of OpenAI's repository, which is not on a package index."""
    spec = importlib.util.spec_from_file_location("openai_model", checkout / "sparse_autoencoder" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Autoencoder


def _read_openai(autoencoder: Any, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    model = autoencoder.from_state_dict(torch.load(path, weights_only=True))
    acts, info = model.encode(x)
    return acts, model.decode(acts, info)


def _randomise(module: torch.nn.Module, seed: int) -> None:
    """Makes every parameter random: weights with rows of about unit norm, biases around 0, thresholds around 0.5."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if name == "threshold":
            parameter.add_(0.5)


def _saelens(folder: Path, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    d_in, n_latents = x.shape[1], 8 * x.shape[1]
    families: dict[str, dict[str, Any]] = {
        "standard": {},
        "topk": {"k": 16},
        "topk-rescaled": {"k": 16, "rescale_acts_by_decoder_norm": True},
        "jumprelu": {},
        "gated": {},
    }
    for seed, (family, options) in enumerate(families.items()):
        for normalize in ("none", "layer_norm", "constant_norm_rescale"):
            for subtract in (True, False):
                config = {
                    "architecture": family.partition("-")[0],
                    "d_in": d_in,
                    "d_sae": n_latents,
                    "apply_b_dec_to_input": subtract,
                    "normalize_activations": normalize,
                    "metadata": {"hook_name": "blocks.1.hook_resid_post"},
                }
                sae = SAE.from_dict(config | options)
                _randomise(sae, seed)
                name = f"saelens-{family}-{normalize}-{'sub' if subtract else 'nosub'}"
                sae.save_model(folder / name)
                acts = sae.encode(x)
                yield name, acts, sae.decode(acts)
    classes = {
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=n_latents, k=16)),
        "matryoshka": (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig(d_in=d_in, d_sae=n_latents, k=16, matryoshka_widths=[32, n_latents]),
        ),
    }
    for family, (kind, settings) in classes.items():
        training = kind(settings)
        _randomise(training, 11)
        training.topk_threshold.fill_(0.9)
        name = f"saelens-{family}"
        training.save_inference_model(folder / name)
        sae = SAE.load_from_disk(folder / name)
        acts = sae.encode(x)
        yield name, acts, sae.decode(acts)


def _sparsify(folder: Path, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    from sparsify import SparseCoder, SparseCoderConfig

    n_latents = 8 * x.shape[1]
    families: dict[str, dict[str, Any]] = {
        "topk": {},
        "groupmax": {"activation": "groupmax"},
        "transcode": {"transcode": True},
        "skip": {"skip_connection": True},
        "transcode-skip": {"transcode": True, "skip_connection": True},
        "expansion": {"num_latents": 0, "expansion_factor": 8},
    }
    for family, options in families.items():
        config = SparseCoderConfig(**({"num_latents": n_latents, "k": 16} | options))
        coder = SparseCoder(x.shape[1], config)
        _randomise(coder, 21)
        name = f"sparsify-{family}"
        coder.save_to_disk(folder / name)
        encoded = coder.encode(x)
        acts = torch.zeros(len(x), n_latents).scatter(1, encoded.top_indices.long(), encoded.top_acts)
        yield name, acts, coder(x).sae_out


def _dictionary_learning(folder: Path, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    d_in, n_latents = x.shape[1], 8 * x.shape[1]
    made = [
        dictionary.AutoEncoder(d_in, n_latents),
        dictionary.AutoEncoderNew(d_in, n_latents),
        dictionary.GatedAutoEncoder(d_in, n_latents),
        dictionary.JumpReluAutoEncoder(d_in, n_latents),
        top_k.AutoEncoderTopK(d_in, n_latents, 16),
        batch_top_k.BatchTopKSAE(d_in, n_latents, 16),
        matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(d_in, n_latents, 16, [32, n_latents - 32]),
    ]
    for module in made:
        _randomise(module, 31)
        if isinstance(getattr(module, "threshold", None), Tensor) and module.threshold.ndim == 0:
            module.threshold.fill_(0.9)
        kind = type(module).__name__
        name = f"dictionary_learning-{kind}"
        (folder / name).mkdir(parents=True)
        torch.save(module.state_dict(), folder / name / "ae.pt")
        trainer = {"dict_class": kind, "submodule_name": "resid_post_layer_1", "lm_name": "gpt2"}
        (folder / name / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
        acts = module.encode(x)
        yield name, acts, module.decode(acts)


if __name__ == "__main__":
    main()
