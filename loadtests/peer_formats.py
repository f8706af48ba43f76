"""Round trips through other projects' own code: `python -m loadtests.peer_formats --peers PYTHON [--openai CHECKOUT]`.

PYTHON is the interpreter of an environment in which the peers are installed, for example

    python -m venv build/peers
    build/peers/bin/python -m pip install torch==2.13.0 sae-lens dictionary-learning eai-sparsify

(torchvision, which comes with them, may not fit a CPU build of torch and can be uninstalled). Dictionaries have random
weights, 64 wide, 512 latents, and are tested on 256 rows of input, in two directions:

* ours to theirs: every family that a format can express, with every normalisation and every arrangement of the two
  biases, is exported and read by SAELens' loader, and by OpenAI's class if a checkout of its repository is given;
* theirs to ours: every class of SAELens, sparsify and dictionary_learning writes a dictionary, and `load_dictionary`
  reads it.

Latents and reconstructions of both sides are compared. The figure is the largest difference divided by the largest
value. The exit status is 1 if a figure exceeds 1e-5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import load_dictionary
from sae_runtime.dictionary.formats.openai import save_openai
from sae_runtime.dictionary.formats.saelens import save_saelens
from sae_runtime.dictionary.normalization import Normalization

WIDTH, N_LATENTS, K, ROWS = 64, 512, 16, 256
TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    parser.add_argument("--openai", type=Path, help="a checkout of openai/sparse_autoencoder")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows, versions = compare(Path(temporary), arguments.peers, arguments.openai)
    width = max(len(name) for name, _, _ in rows)
    for name, acts, recon in rows:
        print(f"{name:<{width}}  latents {acts:8.1e}  reconstruction {recon:8.1e}")
    worst = max(max(acts, recon) for _, acts, recon in rows)
    print(f"{len(rows)} dictionaries, largest difference {worst:.1e} of the largest value; {versions}")
    if arguments.json:
        figures = {name: {"latents": acts, "reconstruction": recon} for name, acts, recon in rows}
        arguments.json.write_text(json.dumps({"versions": versions, "differences": figures}, indent=1) + "\n")
    return 0 if worst <= TOLERANCE else 1


def compare(folder: Path, peers: Path, openai: Path | None) -> tuple[list[tuple[str, float, float]], dict[str, str]]:
    """Name and differences of every dictionary, and the peers' versions."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(ROWS, WIDTH, generator=generator) + 0.5
    save_file({"x": x}, folder / "x.safetensors")
    exported = {}
    jobs = []
    for name, dictionary in _dictionaries():
        for format_name, save in (("saelens", save_saelens), ("openai", save_openai)):
            if format_name == "openai" and openai is None:
                continue
            target = f"ours to {format_name}: {name}"
            path = folder / target.replace(": ", "-").replace(" ", "-")
            try:
                save(dictionary, path)
            except ValueError:  # the format cannot express it
                continue
            exported[target] = (dictionary, path.with_suffix(".out"))
            jobs.append({"format": format_name, "path": str(path), "out": str(path.with_suffix(".out"))})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "written").mkdir()
    driver = Path(__file__).with_name("peer_loaders.py")
    command = [peers, driver, folder, *([openai] if openai else [])]
    subprocess.run([str(argument) for argument in command], check=True, stdout=sys.stderr)
    rows = [(name, *_differences(ours, x, load_file(out))) for name, (ours, out) in exported.items()]
    for path in sorted((folder / "written").iterdir()):
        expected = load_file(path / "expected.safetensors")
        rows.append((f"{path.name} to ours", *_differences(load_dictionary(path), x, expected)))
    versions: dict[str, str] = json.loads((folder / "versions.json").read_text())
    return rows, versions


def _dictionaries() -> Iterator[tuple[str, Dictionary]]:
    """Every activation, normalisation and arrangement of the biases."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    families: dict[str, dict[str, Any]] = {
        "relu": {"activation": "relu"},
        "topk": {"activation": "topk", "k": K},
        "topk-identity": {"activation": "topk", "k": K, "postact": "identity"},
        "jumprelu": {"activation": "jumprelu", "threshold": normal(N_LATENTS) * 0.5 + 0.5},
        "gated": {
            "activation": "gated",
            "magnitude_scale": (0.3 * normal(N_LATENTS)).exp(),
            "magnitude_bias": 0.3 * normal(N_LATENTS),
        },
    }
    base: dict[str, Any] = {
        "encoder": normal(N_LATENTS, WIDTH) / WIDTH**0.5,
        "decoder": normal(N_LATENTS, WIDTH) / WIDTH**0.5,
        "latent_bias": 0.3 * normal(N_LATENTS),
        "site": "1.resid_post_mlp",
    }
    bias, second_bias = normal(WIDTH), normal(WIDTH)
    biases: dict[str, dict[str, Any]] = {
        "one-bias": {"pre_bias": bias},
        "not-subtracted": {"pre_bias": torch.zeros(WIDTH), "output_bias": bias},
        "two-biases": {"pre_bias": bias, "output_bias": second_bias},
    }
    normalizations: tuple[Normalization, ...] = ("none", "layer_norm", "constant_norm")
    for family, normalization, arrangement in product(families, normalizations, biases):
        dictionary = Dictionary(**base, **families[family], **biases[arrangement])
        yield f"{family} {normalization} {arrangement}", replace(dictionary, normalization=normalization)


def _differences(dictionary: Dictionary, x: Tensor, expected: dict[str, Tensor]) -> tuple[float, float]:
    features = dictionary.encode(x)
    actual = {"acts": features.to_dense(), "recon": dictionary.decode(features)}
    acts, recon = (
        float((actual[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in ("acts", "recon")
    )
    return acts, recon


if __name__ == "__main__":
    sys.exit(main())
