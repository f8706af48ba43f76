"""The forward pass against the golden vectors and against plain forward hooks on Hugging Face's GPT-2."""

from __future__ import annotations

import concurrent.futures
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae_runtime import Backbone, PackedTokens, Site
from sae_runtime.model.families.gpt2 import weights as gpt2_weights
from sae_runtime.model.families.gpt2.config import GPT2Settings
from sae_runtime.model.sites import LOCATIONS
from tests.sae_runtime.model.tiny_gpt2 import GOLDEN

ALL_SITES = [Site(layer, location) for layer in range(3) for location in LOCATIONS]
ROWS = [[1, 2, 3], [7], list(range(40, 60)), [9] * 19, [5, 4], list(range(64))]  # lengths 3, 1, 20, 19, 2, 64

Edit = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def hf_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(GOLDEN, use_safetensors=True).eval()


@contextmanager
def hf_hooks(model: GPT2LMHeadModel, seen: dict[Site, Tensor], edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Plain forward hooks that record every site, and replace the activation where there is an edit."""

    def visit(site: Site, x: Tensor) -> Tensor:
        seen[site] = edits[site](x) if site in edits else x
        return seen[site]

    def on_block(stack: ExitStack, layer: int, block: Any) -> None:
        def before_block(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (visit(Site(layer, "resid_pre"), inputs[0]), *inputs[1:])

        def after_attention(_: Any, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # The block adds its own input to what attn returns, so that input is taken off again.
            before = seen[Site(layer, "resid_pre")]
            delta = visit(Site(layer, "resid_delta_attn"), output[0])
            site = Site(layer, "resid_post_attn")
            if site in edits:
                delta = edits[site](before + delta) - before
            return (delta, *output[1:])

        def before_ln_2(_: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[Site(layer, "resid_post_attn")] = inputs[0]

        def after(location: str) -> Callable[..., Tensor]:
            return lambda _module, _inputs, output: visit(Site(layer, location), output)

        stack.callback(block.register_forward_pre_hook(before_block).remove)
        stack.callback(block.attn.register_forward_hook(after_attention).remove)
        stack.callback(block.ln_2.register_forward_pre_hook(before_ln_2).remove)
        stack.callback(block.mlp.act.register_forward_hook(after("mlp_post_act")).remove)
        stack.callback(block.mlp.register_forward_hook(after("resid_delta_mlp")).remove)
        stack.callback(block.register_forward_hook(after("resid_post_mlp")).remove)

    with ExitStack() as stack:
        for layer, block in enumerate(model.transformer.h):
            on_block(stack, layer, block)
        yield


@torch.inference_mode()
def hf_reference(
    model: GPT2LMHeadModel, rows: list[list[int]], edits: Mapping[Site, Edit] | None = None
) -> tuple[dict[Site, Tensor], Tensor]:
    """Activations and logits of every row run alone, packed: {site: [N, width]}, [N, vocab]."""
    by_row: list[tuple[dict[Site, Tensor], Tensor]] = []
    for row in rows:
        seen: dict[Site, Tensor] = {}
        with hf_hooks(model, seen, edits or {}):
            logits = model(torch.tensor([row])).logits[0]
        by_row.append(({site: x[0] for site, x in seen.items()}, logits))
    activations = {site: torch.cat([seen[site] for seen, _ in by_row]) for site in by_row[0][0]}
    return activations, torch.cat([logits for _, logits in by_row])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


# Equality with the golden vectors and with Hugging Face


@pytest.mark.parametrize("batch", ["", "right.", "left."])
def test_golden_vectors(backbone: Backbone, batch: str) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    mask = expected.get(f"{batch}attention_mask")
    sites = [site for site in ALL_SITES if site.location != "resid_pre"]
    actual = backbone.activations(expected[f"{batch}input_ids"], mask, sites)
    assert list(actual) == list(map(str, sites))
    for site in sites:
        # Both sides are zero at padding.
        golden_values = expected[f"{batch}{site.location}.{site.layer}"]
        torch.testing.assert_close(actual[str(site)], golden_values, atol=5e-5, rtol=1e-5)


def test_golden_logits(backbone: Backbone) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    packed = PackedTokens.from_rows(expected["input_ids"].tolist())
    logits = backbone.forward(packed, logits="all").logits
    assert logits is not None
    torch.testing.assert_close(logits.view_as(expected["logits"]), expected["logits"], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_batches_equal_hooks_on_each_row_alone(backbone: Backbone, hf_model: GPT2LMHeadModel, side: str) -> None:
    width = 70  # wider than the context length, which only real tokens have to respect
    ids, mask = torch.full((len(ROWS), width), 3), torch.zeros(len(ROWS), width, dtype=torch.int64)
    for i, row in enumerate(ROWS):
        start = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    expected, _ = hf_reference(hf_model, ROWS)
    actual = backbone.activations(ids, mask, sites=list(map(str, ALL_SITES)))
    for site in ALL_SITES:
        close(actual[str(site)][mask == 1], expected[site])
        assert not actual[str(site)][mask == 0].any()


def test_a_batch_without_mask(backbone: Backbone, hf_model: GPT2LMHeadModel) -> None:
    rows = [[1, 2, 3, 4], [4, 3, 2, 1]]
    expected, _ = hf_reference(hf_model, rows)
    actual = backbone.activations(torch.tensor(rows, dtype=torch.int32), sites=ALL_SITES)
    for site in ALL_SITES:
        close(actual[str(site)].flatten(0, 1), expected[site])


def test_rows_of_padding_alone_are_zeros(backbone: Backbone) -> None:
    actual = backbone.activations(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 0], [1, 1]]), ["0.resid_pre"])
    assert not actual["0.resid_pre"][0].any()
    assert actual["0.resid_pre"][1].all()
    nothing = backbone.activations(torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), ["0.resid_pre"])
    assert not nothing["0.resid_pre"].any()


def test_packed_rows_of_many_lengths(backbone: Backbone, hf_model: GPT2LMHeadModel) -> None:
    rng = random.Random(1)
    rows = [[rng.randrange(120) for _ in range(rng.choice([1, 2, 30, 31, 40, 50, 63, 64]))] for _ in range(24)]
    expected, logits = hf_reference(hf_model, rows)
    packed = PackedTokens.from_rows(rows)
    result = backbone.forward(packed, capture=ALL_SITES, logits="all")
    assert result.logits is not None
    close(result.logits, logits)
    for site in ALL_SITES:
        close(result.activations[site], expected[site])
    last = backbone.forward(packed, logits="last").logits
    assert last is not None
    close(last, logits[packed.row_ends])


def variant_config(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    return GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 24},
        {"activation_function": "relu"},
        {"activation_function": "silu"},
        {"activation_function": "quick_gelu"},
        {"activation_function": "gelu_python"},
        {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-2},
        {"scale_attn_weights": False},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_settings_of_gpt2_that_change_the_computation(tmp_path: Path, changes: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = GPT2LMHeadModel(variant_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path)
    expected, logits = hf_reference(model, [[1, 2, 3], [4] * 9])
    result = backbone.forward(PackedTokens.from_rows([[1, 2, 3], [4] * 9]), capture=ALL_SITES, logits="all")
    assert result.logits is not None
    close(result.logits, logits)
    for site in ALL_SITES:
        close(result.activations[site], expected[site])
        assert result.activations[site].shape[1] == backbone.site_width(site)


# Edits


def an_edit(x: Tensor) -> Tensor:
    """Depends on nothing but the token's own activation, and changes it much."""
    return 0.6 * x + 0.5 * x.roll(1, -1) + 0.1


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
def test_an_edit_flows_on_as_in_hugging_face(backbone: Backbone, hf_model: GPT2LMHeadModel, site: Site) -> None:
    expected, logits = hf_reference(hf_model, ROWS, {site: an_edit})
    result = backbone.forward(
        PackedTokens.from_rows(ROWS),
        capture=ALL_SITES,
        edit=lambda _, x: an_edit(x),
        edit_sites=[site],
        logits="all",
    )
    assert result.logits is not None
    close(result.logits, logits)
    for other in ALL_SITES:
        close(result.activations[other], expected[other])


def test_edits_at_several_sites_come_in_order_of_computation(backbone: Backbone, hf_model: GPT2LMHeadModel) -> None:
    sites = [Site(2, "mlp_post_act"), Site(0, "resid_post_mlp"), Site(1, "resid_post_attn"), Site(0, "resid_pre")]
    calls: list[Site] = []

    def edit(site: Site, x: Tensor) -> Tensor:
        calls.append(site)
        return an_edit(x)

    result = backbone.forward(PackedTokens.from_rows(ROWS), edit=edit, edit_sites=sites, logits="all")
    _, logits = hf_reference(hf_model, ROWS, dict.fromkeys(sites, an_edit))
    assert calls == sorted(sites)
    assert result.logits is not None
    close(result.logits, logits)


def test_an_edit_that_changes_nothing_is_bit_identical(backbone: Backbone) -> None:
    packed = PackedTokens.from_rows(ROWS)
    plain = backbone.forward(packed, logits="all").logits
    same = backbone.forward(packed, logits="all", edit=lambda _, x: x, edit_sites=ALL_SITES).logits
    assert plain is not None
    assert same is not None
    assert torch.equal(plain, same)


def test_rows_without_edits_are_bitwise_unaffected(backbone: Backbone) -> None:
    packed = PackedTokens.from_rows(ROWS)
    row = 3

    def edit(_: Site, x: Tensor) -> Tensor:
        # A replacement that ruins row 3 altogether stays in that row.
        return torch.where((packed.row_of_token == row)[:, None], torch.nan, x)

    plain = backbone.forward(packed, logits="all").logits
    edited = backbone.forward(packed, logits="all", edit=edit, edit_sites=ALL_SITES).logits
    assert plain is not None
    assert edited is not None
    others = packed.row_of_token != row
    assert torch.equal(plain[others], edited[others])
    assert edited[~others].isnan().all()


def test_an_edit_must_keep_shape_and_dtype(backbone: Backbone) -> None:
    packed = PackedTokens.from_rows([[1, 2]])
    for edit in (lambda _, x: x[:1], lambda _, x: x.double()):
        with pytest.raises(ValueError, match=r"edit at 1\.resid_pre returned"):
            backbone.forward(packed, edit=edit, edit_sites=["1.resid_pre"])
    with pytest.raises(ValueError, match="no edit"):
        backbone.forward(packed, edit_sites=["1.resid_pre"])


def test_gradients_flow_through_edits() -> None:
    backbone = Backbone.random(n_layers=2, d_model=8, n_heads=2, vocab_size=20, context_length=8, dtype="float64")
    packed = PackedTokens.from_rows([[1, 2, 3], [4, 5]])
    target = Site(1, "resid_post_mlp")

    def run(delta: Tensor) -> Tensor:
        result = backbone.forward(
            packed, capture=[target], edit=lambda _, x: x + delta, edit_sites=[Site(0, "resid_delta_mlp")]
        )
        return result.activations[target]

    assert torch.autograd.gradcheck(run, torch.zeros(5, 8, dtype=torch.float64, requires_grad=True))


# No work that nobody asked for


def backbone_that_fails_after(site: Site) -> Backbone:
    """Every weight that is first needed after `site` is empty, so that computing with it raises."""
    settings = GPT2Settings.from_mapping(variant_config().to_dict())
    state = gpt2_weights.random_state(settings, seed=0)
    first_used_at = {
        "ln_1": "resid_delta_attn",
        "attn": "resid_delta_attn",
        "ln_2": "mlp_post_act",
        "mlp.c_fc": "mlp_post_act",
        "mlp.c_proj": "resid_delta_mlp",
    }
    for name in state:
        if name.startswith("transformer.h."):
            layer = int(name.split(".")[2])
            module = next(module for module in first_used_at if f".{module}." in name)
            if site < Site(layer, first_used_at[module]):
                state[name] = torch.empty(0)
        elif "ln_f" in name:
            state[name] = torch.empty(0)
    weights = gpt2_weights.assemble(state, settings.n_layer, torch.float32, torch.device("cpu"))
    return Backbone(name="fails", settings=settings, weights=weights, fingerprint="")


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
def test_stops_after_the_last_site_needed(site: Site) -> None:
    backbone, packed = backbone_that_fails_after(site), PackedTokens.from_rows([[1, 2, 3]])
    assert backbone.forward(packed, capture=[site]).activations[site].isfinite().all()
    earlier = backbone.activations(torch.tensor([[1, 2]]), sites=["0.resid_pre", site])
    assert set(earlier) == {"0.resid_pre", str(site)}
    assert backbone.forward(packed, edit=lambda _, x: x, edit_sites=[site]).activations == {}
    with pytest.raises(RuntimeError):  # the weights do fail where they are used
        backbone.forward(packed, logits="last")


def test_nothing_asked_for_is_nothing_computed() -> None:
    result = backbone_that_fails_after(Site(0, "resid_pre")).forward(PackedTokens.from_rows([[1, 2]]))
    assert result.activations == {}
    assert result.logits is None


# Dtypes, threads, errors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(backbone: Backbone, dtype: str) -> None:
    other = Backbone.load(GOLDEN, dtype=dtype)
    assert other.dtype == getattr(torch, dtype)
    assert other.fingerprint == backbone.fingerprint
    packed = PackedTokens.from_rows(ROWS)
    expected = backbone.forward(packed, capture=ALL_SITES, logits="all")
    actual = other.forward(packed, capture=ALL_SITES, logits="all")
    assert actual.logits is not None
    assert expected.logits is not None
    assert actual.logits.dtype == torch.float32
    # bfloat16 keeps 8 bits of the mantissa, float16 11: a few roundings of relative size 2^-9 and 2^-12.
    tolerance = {"bfloat16": 0.04, "float16": 0.005, "float64": 1e-5}[dtype]
    for site in ALL_SITES:
        assert actual.activations[site].dtype == other.dtype
        error = (actual.activations[site].double() - expected.activations[site].double()).norm()
        assert error < tolerance * expected.activations[site].double().norm()
    assert (actual.logits - expected.logits).norm() < tolerance * expected.logits.norm()


def test_bfloat16_is_as_close_as_hugging_face(backbone: Backbone, hf_model: GPT2LMHeadModel) -> None:
    _, exact = hf_reference(hf_model, ROWS)
    _, theirs = hf_reference(
        GPT2LMHeadModel.from_pretrained(GOLDEN, use_safetensors=True, dtype=torch.bfloat16).eval(), ROWS
    )
    ours = Backbone.load(GOLDEN, dtype=torch.bfloat16).forward(PackedTokens.from_rows(ROWS), logits="all").logits
    assert ours is not None
    assert (ours - exact).norm() < 1.2 * (theirs.float() - exact).norm()


def test_concurrent_forwards_do_not_mix(backbone: Backbone) -> None:
    batches = [PackedTokens.from_rows([[i, i + 1, 2], [i] * (i + 1)]) for i in range(24)]

    def run(packed: PackedTokens) -> Tensor:
        return backbone.forward(packed, capture=[Site(2, "resid_post_mlp")]).activations[Site(2, "resid_post_mlp")]

    alone = list(map(run, batches))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for actual, expected in zip(pool.map(run, batches), alone, strict=True):
            close(actual, expected)


def test_errors_say_what_is_there(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"layers 0 to 2"):
        backbone.activations(torch.tensor([[1]]), sites=["3.resid_pre"])
    with pytest.raises(ValueError, match="unknown location"):
        backbone.activations(torch.tensor([[1]]), sites=["0.resid_mid"])
    with pytest.raises(ValueError, match="context length of 64"):
        backbone.activations(torch.ones(1, 65, dtype=torch.int64), sites=["0.resid_pre"])
    with pytest.raises(ValueError, match="token id 120 is outside the vocabulary of 120"):
        backbone.activations(torch.tensor([[1, 120]]), sites=["0.resid_pre"])
    with pytest.raises(ValueError, match="token id -1"):
        backbone.forward(PackedTokens.from_rows([[-1]]), logits="last")
    with pytest.raises(ValueError, match=r"expected integers \[B, T\]"):
        backbone.activations(torch.tensor([1, 2]), sites=["0.resid_pre"])
    with pytest.raises(ValueError, match="attention_mask"):
        backbone.activations(torch.tensor([[1, 2]]), torch.tensor([[1]]), sites=["0.resid_pre"])
    with pytest.raises(ValueError, match="between real tokens"):
        backbone.activations(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), sites=["0.resid_pre"])
    with pytest.raises(ValueError, match="'none', 'last' or 'all'"):
        backbone.forward(PackedTokens.from_rows([[1]]), logits="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float12"):
        Backbone.load(GOLDEN, dtype="float12")
    with pytest.raises(ValueError, match="int8"):
        Backbone.load(GOLDEN, dtype=torch.int8)
    with pytest.raises(ValueError, match="cannot be used"):
        Backbone.load(GOLDEN, device="abacus")


def test_random_backbones_repeat_and_keep_the_global_random_state() -> None:
    state = torch.get_rng_state()
    first, second, other = Backbone.random(seed=1), Backbone.random(seed=1), Backbone.random(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert (first.n_layers, first.d_model, first.vocab_size, first.context_length) == (2, 32, 100, 64)
    with pytest.raises(ValueError, match="multiple of n_head"):
        Backbone.random(d_model=30, n_heads=4)


def test_imports_are_light() -> None:
    program = (
        "import sys, sae_runtime; assert 'torch' not in sys.modules\n"
        "import sae_runtime.model.backbone; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
