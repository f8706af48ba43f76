"""Every figure against a slow, separate computation on Hugging Face's own model, one row and one token at a time."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime import Backbone
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.figures.held_out import held_out_figures

SITES = {"0.resid_post_mlp": ("transformer.h.0", 16), "1.mlp_post_act": ("transformer.h.1.mlp.act", 64)}


def random_dictionary(site: str, width: int, normalize: bool, relu: bool = False) -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    decoder = F.normalize(torch.randn(48, width, generator=generator), dim=1)
    return Dictionary(
        encoder=decoder * 0.5,
        decoder=decoder,
        pre_bias=0.1 * torch.randn(width, generator=generator),
        latent_bias=torch.cat([torch.zeros(40), torch.full((8,), -100.0)]),  # eight latents never fire
        activation="relu" if relu else "topk",
        k=None if relu else 6,
        normalization="layer_norm" if normalize else "none",
        site=site,
    )


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 257, (n,), generator=generator).tolist() for n in (32, 20, 7, 32, 2)]


def reference(folder: Path, dictionary: Dictionary, rows: list[list[int]]) -> dict[str, float]:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert dictionary.site is not None
    module = model.get_submodule(SITES[dictionary.site][0])

    def loss(row: list[int], replacement: Tensor | None) -> tuple[float, Tensor]:
        """Summed next-token loss of one row, and the site's activation."""
        seen = []

        def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden[0].clone())
            if replacement is None:
                return output
            new = replacement[None]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0]
        handle.remove()
        nats = -sum(float(logits[i].log_softmax(0)[row[i + 1]]) for i in range(len(row) - 1))
        return nats, seen[0]

    xs, reconstructions, dense = [], [], []
    totals = {"clean": 0.0, "spliced": 0.0, "ablated": 0.0}
    for row in rows:
        clean, x = loss(row, None)
        z = dictionary.encode_dense(x)
        reconstruction = torch.stack([dictionary.decode(dictionary.encode(token[None]))[0] for token in x])
        totals["clean"] += clean
        totals["spliced"] += loss(row, reconstruction)[0]
        totals["ablated"] += loss(row, torch.zeros_like(x))[0]
        xs.append(x)
        reconstructions.append(reconstruction)
        dense.append(z)
    x, y, z = torch.cat(xs).double(), torch.cat(reconstructions).double(), torch.cat(dense)
    predictions = sum(len(row) - 1 for row in rows)
    ce = {name: total / predictions for name, total in totals.items()}
    std, mean = x.std(1, keepdim=True), x.mean(1, keepdim=True)
    inner_x, inner_y = ((x - mean) / std, (y - mean) / std) if dictionary.normalizes_input else (x, y)

    def nmse(a: Tensor, b: Tensor) -> float:
        return float((b - a).square().mean() / (a - a.mean(0)).square().mean())

    return {
        "nmse": nmse(x, y),
        "relative_error": float((y - x).square().sum() / x.square().sum()),
        "nmse_normalized": nmse(inner_x, inner_y),
        "l0": float((z > 0).sum(1).double().mean()),
        "dead_fraction": float((z > 0).sum(0).eq(0).double().mean()),
        "dense_fraction": float((z > 0).double().mean(0).gt(0.1).double().mean()),
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_ablated": ce["ablated"],
        "loss_recovered": (ce["ablated"] - ce["spliced"]) / (ce["ablated"] - ce["clean"]),
        "n_tokens": len(x),
    }


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("normalize", "relu"), [(True, False), (False, False), (False, True)])
def test_figures_equal_the_slow_computation(
    tiny_backbone_folder: Path, tiny_backbone: Backbone, rows: list[list[int]], site: str, normalize: bool, relu: bool
) -> None:
    dictionary = random_dictionary(site, SITES[site][1], normalize, relu)
    figures = held_out_figures(tiny_backbone, dictionary, rows, tokens_per_pass=60)
    expected = reference(tiny_backbone_folder, dictionary, rows)
    # The loss recovered divides by a difference of losses, here a small one.
    tight = {name: value for name, value in figures.items() if name in expected and name != "loss_recovered"}
    assert tight.keys() == expected.keys() - {"loss_recovered"}
    assert tight == pytest.approx({name: expected[name] for name in tight}, rel=1e-4)
    assert figures["loss_recovered"] == pytest.approx(expected["loss_recovered"], rel=1e-2)
    assert figures["dead_fraction"] >= 8 / 48
    assert figures["delta_ce"] == pytest.approx(expected["ce_spliced"] - expected["ce_clean"], rel=1e-3)


def test_a_perfect_dictionary_recovers_all_and_a_silent_one_explains_nothing(
    tiny_backbone: Backbone, rows: list[list[int]]
) -> None:
    eye = torch.eye(16)
    perfect = Dictionary(
        encoder=torch.cat([eye, -eye]),
        decoder=torch.cat([eye, -eye]),
        pre_bias=torch.zeros(16),
        latent_bias=torch.zeros(32),
        activation="relu",
        site="0.resid_post_mlp",
    )
    figures = held_out_figures(tiny_backbone, perfect, rows)
    assert figures["nmse"] == pytest.approx(0, abs=1e-6)
    assert figures["loss_recovered"] == pytest.approx(1, abs=1e-4)
    silent = Dictionary(
        encoder=eye,
        decoder=eye,
        pre_bias=torch.zeros(16),
        latent_bias=torch.full((16,), -1e6),
        activation="relu",
        site="0.resid_post_mlp",
    )
    figures = held_out_figures(tiny_backbone, silent, rows)
    assert figures["relative_error"] == pytest.approx(1)
    assert figures["dead_fraction"] == 1
    assert figures["loss_recovered"] == pytest.approx(0, abs=1e-4)


def test_errors(tiny_backbone: Backbone) -> None:
    dictionary = random_dictionary("0.resid_post_mlp", 16, False)
    with pytest.raises(ValueError, match="at least one row of two tokens"):
        held_out_figures(tiny_backbone, dictionary, [[5]])
    with pytest.raises(ValueError, match="does not say which site"):
        held_out_figures(tiny_backbone, dictionary.__class__(**{**vars(dictionary), "site": None}), [[5, 6]])
