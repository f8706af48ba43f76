"""A plain reading of what edits mean: Hugging Face's model with forward hooks over whole sequences, in float64.

Nothing of sae_runtime's arithmetic is used: dictionaries are encoded from their weights by the equations of each
family, one token after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime import Backbone, Dictionary, Edit, LatentStatistics
from sae_runtime.edits import AfterText, AllOf, Condition, Reference, Where
from sae_runtime.edits.edit import terms

ORDER = ("resid_delta_attn", "mlp_post_act", "resid_delta_mlp", "resid_post_mlp")


def latents(d: Dictionary, x: Tensor) -> Tensor:
    """z [n_latents] of one token's activation x [d_in]."""
    if d.normalization == "layer_norm":
        x = (x - x.mean()) / (x.std() + 1e-5)
    elif d.normalization == "constant_norm":
        x = x / (x.square().mean().sqrt())
    p = d.encoder @ (x - d.pre_bias)
    pre = p + d.latent_bias
    if d.activation == "relu":
        return pre.relu()
    if d.activation == "jumprelu":
        assert d.threshold is not None
        return torch.where(pre > d.threshold, pre, 0).relu()
    if d.activation == "gated":
        assert d.magnitude_scale is not None
        assert d.magnitude_bias is not None
        return torch.where(pre > 0, (d.magnitude_scale * p + d.magnitude_bias).relu(), 0)
    assert d.k is not None
    if d.activation == "groupmax":
        groups = pre.view(d.k, -1)
        best = groups.argmax(dim=1, keepdim=True)
        return torch.zeros_like(groups).scatter(1, best, groups.gather(1, best)).view(-1).relu()
    kept = pre.topk(d.k).indices
    z = torch.zeros_like(pre).index_copy(0, kept, pre[kept])
    return z if d.postact == "identity" else z.relu()


def scale_of(d: Dictionary, x: Tensor) -> Tensor:
    """What the input normalisation divided by, without its eps."""
    if d.normalization == "layer_norm":
        return x.std()
    return x.square().mean().sqrt() if d.normalization == "constant_norm" else torch.ones((), dtype=x.dtype)


def reconstruction(d: Dictionary, z: Tensor, x: Tensor) -> Tensor:
    """decode(z) of one token, whose activation was x."""
    mean = x.mean() if d.normalization == "layer_norm" else 0.0
    bias = d.pre_bias if d.output_bias is None else d.output_bias
    y = mean + scale_of(d, x) * (z @ d.decoder + bias)
    return y if d.skip is None else y + d.skip @ x


class PlainModel:
    """Hugging Face's GPT-2 of a folder in float64, edited by hooks."""

    def __init__(self, folder: Path, backbone: Backbone, dictionaries: Mapping[str, Dictionary]) -> None:
        self.model: Any = GPT2LMHeadModel.from_pretrained(folder).double().eval()
        self.backbone = backbone
        self.dictionaries = dictionaries

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], prompt_length: int, edits: Sequence[Edit]) -> Tensor:
        """Float64 [T, vocab] with the edits on every token that they cover."""
        references = {i: self.reference_latents(e) for i, e in enumerate(edits) if e.reference is not None}
        seen: dict[tuple[str, int], Tensor] = {}  # by dictionary and position: z before any edit at its site
        named = {e.dictionary for e in edits} | {
            t.dictionary for e in edits for t in terms(e.condition) if t.dictionary
        }
        used = {name: d for name, d in self.dictionaries.items() if name in named}

        def hook_of(site: str) -> Any:
            here = [(name, d) for name, d in used.items() if d.site == site]

            def hook(_module: object, _inputs: object, output: Any) -> Any:
                h = output[0] if isinstance(output, tuple) else output
                edited = h.clone()
                for t in range(h.shape[1]):
                    for name, d in here:
                        seen[name, t] = latents(d, h[0, t])
                    for name, d in here:
                        edited[0, t] = self._edited(
                            name, d, h[0, t], edited[0, t], t, tokens, prompt_length, edits, references, seen
                        )
                return (edited, *output[1:]) if isinstance(output, tuple) else edited

            return hook

        handles = [
            self._module(site).register_forward_hook(hook_of(site)) for site in {str(d.site) for d in used.values()}
        ]
        try:
            return self.model(torch.tensor([list(tokens)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def _edited(
        self,
        name: str,
        d: Dictionary,
        h: Tensor,
        so_far: Tensor,
        t: int,
        tokens: Sequence[int],
        prompt_length: int,
        edits: Sequence[Edit],
        references: Mapping[int, Tensor],
        seen: Mapping[tuple[str, int], Tensor],
    ) -> Tensor:
        """One token: h' = so_far + decode(z') - decode(z), or decode(z') where the dictionary replaces it."""
        z = seen[name, t]
        changed, replaces = z.clone(), False
        for i, edit in enumerate(edits):
            if edit.dictionary != name or not self.covers(edit, t, tokens, prompt_length):
                continue
            if edit.condition is not None and not self._holds(edit.condition, name, t, seen):
                continue
            if edit.operation == "replace":
                replaces = True
            else:
                changed[edit.feature] = self._new_value(edit, d, z[edit.feature], t, references.get(i))
        if replaces:
            return reconstruction(d, changed, h)
        return so_far + scale_of(d, h) * ((changed - z) @ d.decoder)

    def _new_value(self, edit: Edit, d: Dictionary, old: Tensor, t: int, reference: Tensor | None) -> Tensor | float:
        statistics = d.statistics
        assert statistics is not None
        unit = float(statistics.max[edit.feature]) if edit.unit == "max" else 1.0
        match edit.operation:
            case "set":
                return edit.value * unit
            case "add":
                return old + edit.value * unit
            case "scale":
                return old * edit.value
            case "clamp":
                new = old
                if edit.minimum is not None:
                    new = max(new, old.new_tensor(edit.minimum * unit))
                if edit.maximum is not None:
                    new = min(new, old.new_tensor(edit.maximum * unit))
                return new
            case "ablate_zero":
                return 0.0
            case "ablate_mean":
                return float(statistics.mean[edit.feature])
        assert reference is not None
        assert edit.reference is not None
        match edit.reference.tokens:
            case "last":
                return reference[-1]
            case "mean":
                return reference.mean()
            case "max":
                return reference.max()
            case _:
                return reference[t] if t < len(reference) else old

    def _holds(self, where: Where, own: str, t: int, seen: Mapping[tuple[str, int], Tensor]) -> bool:
        if not isinstance(where, Condition):
            combine = all if isinstance(where, AllOf) else any
            return combine([self._holds(each, own, t, seen) for each in where.conditions])
        name = where.dictionary or own
        threshold = where.threshold
        if where.unit == "max":
            statistics = self.dictionaries[name].statistics
            assert statistics is not None
            threshold *= float(statistics.max[where.feature])
        z = float(seen[name, t][where.feature])
        return z > threshold if where.comparison == "above" else z <= threshold

    def covers(self, edit: Edit, t: int, tokens: Sequence[int], prompt_length: int) -> bool:
        positions = edit.positions
        if isinstance(positions, AfterText):
            return self._follows(positions, t, tokens)
        if isinstance(positions, tuple):
            return t in positions
        return {
            "all": True,
            "prompt": t < prompt_length,
            "generated": t >= prompt_length,
            "last": t == prompt_length - 1,
        }[positions]

    def _follows(self, rule: AfterText, t: int, tokens: Sequence[int]) -> bool:
        """Straight from the definition: look for the text in all bytes before each token's start."""
        starts = [sum(len(self.backbone.token_bytes(i)) for i in tokens[:n]) for n in range(len(tokens))]
        text, pattern = b"".join(map(self.backbone.token_bytes, tokens[:t])), rule.text.encode()
        ends = [i + len(pattern) for i in range(len(text)) if text[i : i + len(pattern)] == pattern]
        for end in ends[:1] if rule.occurrence == "first" else ends:
            first = next(n for n in range(len(tokens)) if starts[n] >= end)
            if rule.max_tokens is None or t < first + rule.max_tokens:
                return True
        return False

    def reference_latents(self, edit: Edit) -> Tensor:
        """The edit's latent on each token of its reference text, by a run without edits."""
        assert isinstance(edit.reference, Reference)
        text = edit.reference.text
        ids = self.backbone.encode_text(text).ids if isinstance(text, str) else list(text)
        d = self.dictionaries[edit.dictionary]
        caught: list[Tensor] = []

        def catch(_module: object, _inputs: object, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        handle = self._module(str(d.site)).register_forward_hook(catch)
        self.model(torch.tensor([ids]))
        handle.remove()
        return torch.stack([latents(d, x)[edit.feature] for x in caught[0].view(len(ids), -1)])

    def _module(self, site: str) -> Any:
        layer, location = site.split(".")
        block = self.model.transformer.h[int(layer)]
        return {
            "resid_delta_attn": block.attn,
            "mlp_post_act": block.mlp.act,
            "resid_delta_mlp": block.mlp,
            "resid_post_mlp": block,
        }[location]


def plain_dictionaries(d_model: int) -> dict[str, Dictionary]:
    """Every family, each normalisation, several sites, two of them at one; float64."""
    kinds: dict[str, dict[str, Any]] = {
        "relu": {"site": "0.mlp_post_act", "activation": "relu"},
        "jumprelu": {"site": "0.resid_post_mlp", "activation": "jumprelu", "normalization": "constant_norm"},
        "groupmax": {"site": "1.resid_delta_attn", "activation": "groupmax", "normalization": "layer_norm", "k": 8},
        "topk": {"site": "1.resid_post_mlp", "activation": "topk", "normalization": "layer_norm", "k": 10},
        "gated": {"site": "1.resid_post_mlp", "activation": "gated"},
        "signed": {"site": "1.resid_delta_mlp", "activation": "topk", "k": 10, "postact": "identity", "skip": True},
    }
    return {name: _dictionary(i, d_model, **kind) for i, (name, kind) in enumerate(kinds.items())}


def _dictionary(seed: int, d_model: int, *, site: str, skip: bool = False, **options: Any) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    n, d = 48, 4 * d_model if "mlp_post_act" in site else d_model

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    activation = options["activation"]
    if activation == "jumprelu":
        options["threshold"] = 0.3 * normal(n).abs()
    if activation == "gated":
        options |= {"magnitude_scale": normal(n).exp(), "magnitude_bias": 0.1 * normal(n)}
    if skip:
        options["skip"] = 0.1 * normal(d, d)
    largest = normal(n).abs() + 1
    statistics = LatentStatistics(
        torch.rand(n), (0.3 * largest).float(), largest.float(), largest.float(), torch.zeros(n, 1), torch.ones(1), 9
    )
    return Dictionary(
        encoder=normal(n, d) / d**0.5,
        decoder=normal(n, d) / d**0.5,
        pre_bias=0.2 * normal(d),
        latent_bias=0.2 * normal(n),
        output_bias=0.2 * normal(d),
        site=site,
        statistics=statistics,
        **options,
    )
