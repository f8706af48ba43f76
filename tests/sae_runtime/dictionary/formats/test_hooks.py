"""Names of places in other projects, as sites. The values behind them are compared in test_backbone."""

import pytest

from sae_runtime.dictionary.formats.hooks import hook_of_site, site_of_hook, site_of_module
from sae_runtime.model.sites import LOCATIONS


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.8.hook_resid_pre", "8.resid_pre"),
        ("blocks.0.hook_attn_out", "0.resid_delta_attn"),
        ("blocks.11.hook_resid_mid", "11.resid_post_attn"),
        ("blocks.8.mlp.hook_post", "8.mlp_post_act"),
        ("blocks.8.hook_mlp_out", "8.resid_delta_mlp"),
        ("blocks.8.hook_resid_post", "8.resid_post_mlp"),
        ("blocks.8.attn.hook_z", None),
        ("blocks.x.hook_resid_pre", None),
        ("hook_embed", None),
        ("", None),
    ],
)
def test_transformer_lens_hooks(hook: str, site: str | None) -> None:
    assert site_of_hook(hook) == site


def test_every_site_has_a_hook() -> None:
    for location in LOCATIONS:
        assert site_of_hook(hook_of_site(f"7.{location}")) == f"7.{location}"


@pytest.mark.parametrize(
    ("module", "output", "read"),
    [
        ("h.8", "8.resid_post_mlp", "8.resid_pre"),
        ("transformer.h.8", "8.resid_post_mlp", "8.resid_pre"),
        ("h.3.attn", "3.resid_delta_attn", None),
        ("transformer.h.3.mlp", "3.resid_delta_mlp", None),
        ("h.3.mlp.act", "3.mlp_post_act", None),
        ("h.3.mlp.c_proj", None, "3.mlp_post_act"),
        ("h.3.ln_2", None, "3.resid_post_attn"),
        ("layers.8", None, None),  # another architecture
        ("h.x", None, None),
    ],
)
def test_modules(module: str, output: str | None, read: str | None) -> None:
    assert site_of_module(module) == output
    assert site_of_module(module, reads_input=True) == read
