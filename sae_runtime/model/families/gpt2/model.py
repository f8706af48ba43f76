"""GPT-2's forward pass: embedding, block, logits (Radford et al. 2019, as Hugging Face computes it)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sae_runtime.kernels.products import linear
from sae_runtime.model.attention import AttentionPlan
from sae_runtime.model.families.gpt2.config import ACTIVATIONS, FUNCTIONS, GPT2Settings
from sae_runtime.model.families.gpt2.weights import GPT2Weights
from sae_runtime.model.forward import PausedForward, Taps
from sae_runtime.model.kv_cache import KVCache
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import LOCATIONS


class GPT2:
    """The steps of a forward pass, with weights on one device."""

    def __init__(self, settings: GPT2Settings, weights: GPT2Weights) -> None:
        self.settings = settings
        self._weights = weights
        self._activation = FUNCTIONS[ACTIVATIONS[settings.activation_function]]
        self.dtype = weights.wte.dtype
        self.device = weights.wte.device

    @property
    def decode_bytes(self) -> int:
        """Bytes of weights that decoding one token reads: those of the blocks and of the LM head."""
        return self._weights.lm_head.nbytes + sum(tensor.nbytes for block in self._weights.blocks for tensor in block)

    def embed(self, packed: PackedTokens) -> Tensor:
        """The residual stream before the first block, [N, d_model]."""
        return F.embedding(packed.ids, self._weights.wte) + F.embedding(packed.positions, self._weights.wpe)

    def block(
        self,
        layer: int,
        x: Tensor,
        plan: AttentionPlan,
        cache: KVCache | None,
        taps: Taps,
        start: PausedForward | None = None,
    ) -> Tensor:
        """One block on the residual stream x [N, d]; returns early after the last site that is needed.

        With `start`, which is at a site of this block, the block begins there, and x is the stream at that site.
        """
        w, config, d = self._weights.blocks[layer], self.settings, (self.settings.n_embd,)
        scale = (d[0] // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1

        # x is the residual stream, h the branch. `first` is the location, of the six in LOCATIONS, to begin at.
        first = 0 if start is None else LOCATIONS.index(start.site.location)
        h = x if start is None else start.activation
        if first <= 0:
            x = taps.pass_through(layer, "resid_pre", x)
            if taps.end_at(layer, "resid_pre"):
                return x
            h = F.layer_norm(x, d, w.ln_1_weight, w.ln_1_bias, config.layer_norm_epsilon)
            h = w.attn_c_attn(h).contiguous()  # [N, 3 d]: queries, keys, values
            h = plan.attend(h, config.n_head, scale, layer, cache)  # [N, d]
            h = w.attn_c_proj(h)
        if first <= 1:
            h = taps.pass_through(layer, "resid_delta_attn", h, x)
            x = x + h
        if first <= 2:
            x = taps.pass_through(layer, "resid_post_attn", x)
            if taps.end_at(layer, "resid_post_attn"):
                return x
            h = F.layer_norm(x, d, w.ln_2_weight, w.ln_2_bias, config.layer_norm_epsilon)
            h = w.mlp_c_fc(h)  # [N, d_mlp]
            h = self._activation(h)
        if first <= 3:
            h = taps.pass_through(layer, "mlp_post_act", h, x)
            if taps.end_at(layer, "mlp_post_act"):
                return x
            h = w.mlp_c_proj(h)  # [N, d]
        if first <= 4:
            h = taps.pass_through(layer, "resid_delta_mlp", h, x)
            x = x + h
        return taps.pass_through(layer, "resid_post_mlp", x)

    def unembed(self, x: Tensor) -> Tensor:
        """Logits [n, vocab] from the last block's output x [n, d_model]; float32, or float64 for float64 weights."""
        w, d = self._weights, (self.settings.n_embd,)
        x = F.layer_norm(x, d, w.ln_f_weight, w.ln_f_bias, self.settings.layer_norm_epsilon)
        logits = linear(x, w.lm_head).contiguous()
        return logits if logits.dtype.itemsize == 8 else logits.float()

    def direct_logits(self, layer: int, location: str, rows: Tensor) -> Tensor:
        """What adding rows [n, width] at a site adds to the logits if no later block and no normalising scale changes.

        With d the rows in the residual stream (those of mlp_post_act go through the block's mlp.c_proj), g the gain of
        the final layer norm and U the LM head: U (g (d - mean(d))). The layer norm's division is left out.
        """
        w = self._weights
        rows = rows.to(self.device, self.dtype)
        if location == "mlp_post_act":
            rows = linear(rows, w.blocks[layer].mlp_c_proj.weight)
        logits = linear((rows - rows.mean(-1, keepdim=True)) * w.ln_f_weight, w.lm_head).contiguous()
        return logits if logits.dtype.itemsize == 8 else logits.float()
