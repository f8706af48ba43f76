"""Compiles what edits need before the first of them, which would wait for it."""

from __future__ import annotations

import torch

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits.batch import RowEdits, plan_edits
from sae_runtime.edits.edit import Edit
from sae_runtime.kernels.topk_membership import SMALL_LATENTS


def compile_edits() -> None:
    """Runs edits of made-up dictionaries on the CPU; takes 5 to 10 s once, and a second in later processes."""
    generator = torch.Generator().manual_seed(0)
    for n_latents in (64, 2 * SMALL_LATENTS):
        encoder = torch.randn(n_latents, 8, generator=generator)
        encoder[::2] = encoder[0]  # equals, among which bytes cannot tell
        dictionary = Dictionary(
            encoder=encoder,
            decoder=encoder,
            pre_bias=torch.zeros(8),
            latent_bias=torch.zeros(n_latents),
            activation="topk",
            k=32,
            site="0.resid_post_mlp",
            name="made up",
        ).with_screen()
        for n in (1, 3):  # products by row and by column, see few_rows_linear
            plan = plan_edits([RowEdits((Edit("made up", 0, "scale", 0.0),), n, 0, n)], {"made up": dictionary})
            plan.apply(plan.sites[0], encoder[:1].repeat(n, 1))
