"""What the tests of this folder share: random dictionaries of every family, and Hugging Face's model as a reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.evaluation.logistic_probes import RIDGE

MODULES = {"0.resid_post_mlp": ("transformer.h.0", 16), "1.mlp_post_act": ("transformer.h.1.mlp.act", 64)}
"""Site, and the module of transformers' GPT2LMHeadModel whose output it is, with its width."""

FAMILIES = ("topk", "relu", "jumprelu", "gated", "groupmax")


def random_dictionary(
    family: str = "topk", site: str = "0.resid_post_mlp", normalization: str = "layer_norm", n_latents: int = 48
) -> Dictionary:
    """Random weights; the last eight latents never fire (of groupmax the last group's)."""
    width = MODULES[site][1]
    generator = torch.Generator().manual_seed(1)
    decoder = F.normalize(torch.randn(n_latents, width, generator=generator), dim=1)
    bias = torch.cat([torch.zeros(n_latents - 8), torch.full((8,), -100.0)])
    extra: dict[str, Any] = {}
    if family in ("topk", "groupmax"):
        extra["k"] = 6
    if family == "jumprelu":
        extra["threshold"] = torch.full((n_latents,), 0.3)
    if family == "gated":
        extra |= {"magnitude_scale": torch.full((n_latents,), 1.2), "magnitude_bias": torch.full((n_latents,), 0.05)}
    return Dictionary(
        encoder=decoder * 0.5,
        decoder=decoder,
        pre_bias=0.1 * torch.randn(width, generator=generator),
        latent_bias=bias,
        activation=family,  # type: ignore[arg-type]
        normalization=normalization,  # type: ignore[arg-type]
        site=site,
        name=f"random-{family}",
        **extra,
    )


def random_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 257, (n,), generator=generator).tolist() for n in lengths]


class HookedModel:
    """transformers' model in float64, one row at a time, with a site read or replaced by a hook."""

    def __init__(self, folder: Path, site: str) -> None:
        from transformers import GPT2LMHeadModel

        self._model = GPT2LMHeadModel.from_pretrained(folder).eval().double()
        self._module = self._model.get_submodule(MODULES[site][0])

    def __call__(self, row: list[int], replace: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Logits [T, vocab] with the site's activation [T, d] replaced, and the activation before that; float64."""
        seen = []

        def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden[0].clone())
            if replace is None:
                return output
            new = replace(hidden[0])[None].double()
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self._module.register_forward_hook(hook)
        with torch.no_grad():
            logits = self._model(torch.tensor([row])).logits[0]
        handle.remove()
        return logits, seen[0]


def reconstruct(dictionary: Dictionary, x: Tensor) -> Tensor:
    """Row by row; float64."""
    rows = [dictionary.decode(dictionary.encode(token[None].float()))[0] for token in x]
    return torch.stack(rows).double()


def fit_slowly(values: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Weight, bias and loss of one column, by L-BFGS of torch on the definition."""
    largest = np.abs(values).max() or 1.0
    z, y = torch.tensor(values / largest), torch.tensor(labels, dtype=torch.float64)
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        p = torch.sigmoid(parameters[0] * z + parameters[1])
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean() + RIDGE / 2 * parameters[0] ** 2

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)
    w, b = parameters.tolist()
    return w / largest, b, float(objective().detach()) - RIDGE / 2 * w**2
