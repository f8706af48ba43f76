"""A plain reading of what edits mean: one token and one edit at a time, in Hugging Face's model by forward hooks.

Written from the documents of edits (edits.proto, sae_runtime/edits/__init__.py) alone. Of the product it uses the
classes that describe edits and hold a dictionary's tensors, and none of its arithmetic: dictionaries are encoded from
their weights by the equations of each family, in the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import AfterText, AllOf, Condition, Edit, Where

TokenBytes = Callable[[int], bytes]


def latents(d: Dictionary, x: Tensor) -> Tensor:
    """z [T, n_latents] of activations x [T, d_in]."""
    if d.normalization == "layer_norm":
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    elif d.normalization == "centred":
        x = x - x.mean(1, keepdim=True)
    elif d.normalization == "constant_norm":
        x = x / x.square().mean(1, keepdim=True).sqrt()
    p = (x - d.pre_bias) @ d.encoder.T
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
        groups = pre.view(len(x), d.k, -1)
        best = groups.argmax(dim=2, keepdim=True)
        return torch.zeros_like(groups).scatter(2, best, groups.gather(2, best)).view(pre.shape).relu()
    kept = pre.topk(d.k, dim=1).indices
    z = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))
    return z if d.postact == "identity" else z.relu()


def scale_of(d: Dictionary, x: Tensor) -> Tensor:
    """What the input normalisation divided one token's x [d_in] by, without its eps."""
    if d.normalization == "layer_norm":
        return x.std()
    return x.square().mean().sqrt() if d.normalization == "constant_norm" else torch.ones((), dtype=x.dtype)


def reconstruction(d: Dictionary, z: Tensor, x: Tensor) -> Tensor:
    """decode(z) of one token, whose activation was x."""
    mean = x.mean() if d.normalization in ("centred", "layer_norm") else 0.0
    bias = d.pre_bias if d.output_bias is None else d.output_bias
    y = mean + scale_of(d, x) * (z @ d.decoder + bias)
    return y if d.skip is None else y + d.skip @ x


class EditedRow:
    """The edits of one row, on the tokens that run now. Resample edits are to be made "set" ones before."""

    def __init__(
        self,
        edits: Sequence[Edit],
        dictionaries: Mapping[str, Dictionary],
        prompt_length: int,
        token_bytes: TokenBytes | None = None,
    ) -> None:
        self.edits, self.dictionaries, self.prompt_length = edits, dictionaries, prompt_length
        self.token_bytes = token_bytes
        self.tokens: list[int] = []
        """The row's ids so far; needed by edits after a text."""
        self.first = 0
        """Position of the first token that runs now."""
        self._latents: dict[str, Tensor] = {}  # [T, n_latents] of each dictionary on these tokens, before any edit

    @property
    def read(self) -> set[str]:
        """Dictionaries that the edits and their conditions read."""
        named = {edit.dictionary for edit in self.edits}
        return named | {t.dictionary or e.dictionary for e in self.edits for t in thresholds(e.condition)}

    def apply(self, site: str, h: Tensor) -> Tensor:
        """The edited activations of a site, h [T, width]; sites in their order of computation."""
        edited = h.clone()
        here = sorted(name for name in self.read if self.dictionaries[name].site == site)
        for name in here:
            self._latents[name] = latents(self.dictionaries[name], h)
        for t in range(len(h)):
            for name in here:
                acting = [edit for edit in self.edits if edit.dictionary == name and self._acts(edit, t)]
                if acting:
                    edited[t] += self._change(name, acting, h[t], t)
        return edited

    def _change(self, name: str, edits: Sequence[Edit], h: Tensor, t: int) -> Tensor:
        """What the edits of one dictionary add to one token: scale (z' - z) decoder, or decode(z') - h."""
        d, z = self.dictionaries[name], self._latents[name][t]
        new = z.clone()
        for edit in edits:
            if edit.operation != "replace":
                new[edit.feature] = self._value(edit, d, z[edit.feature], self.first + t)
        if any(edit.operation == "replace" for edit in edits):
            return reconstruction(d, new, h) - h
        return scale_of(d, h) * ((new - z) @ d.decoder)

    def _value(self, edit: Edit, d: Dictionary, old: Tensor, position: int) -> Tensor | float:
        assert d.statistics is not None
        unit = float(d.statistics.max[edit.feature]) if edit.unit == "max" else 1.0
        match edit.operation:
            case "set":
                return (edit.value if edit.values is None else edit.values[position]) * unit
            case "add":
                return old + edit.value * unit
            case "scale":
                return old * edit.value
            case "clamp":
                low = old if edit.minimum is None else max(old, old.new_tensor(edit.minimum * unit))
                return low if edit.maximum is None else min(low, old.new_tensor(edit.maximum * unit))
            case "ablate_zero":
                return 0.0
            case _:
                assert edit.operation == "ablate_mean"
                return float(d.statistics.mean[edit.feature])

    def _acts(self, edit: Edit, t: int) -> bool:
        position = self.first + t
        if edit.values is not None and position >= len(edit.values):
            return False
        return self._covers(edit, position) and self._holds(edit.condition, edit.dictionary, t)

    def _covers(self, edit: Edit, position: int) -> bool:
        rule = edit.positions
        if isinstance(rule, tuple):
            return position in rule
        if isinstance(rule, AfterText):
            return self._follows(rule, position)
        return {
            "all": True,
            "prompt": position < self.prompt_length,
            "generated": position >= self.prompt_length,
            "last": position == self.prompt_length - 1,
        }[rule]

    def _follows(self, rule: AfterText, position: int) -> bool:
        """Whether a token starts at the end of an occurrence of the text in what precedes it, or later."""
        assert self.token_bytes is not None
        pieces = [self.token_bytes(token) for token in self.tokens]
        starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
        text, sought = b"".join(pieces[:position]), rule.text.encode()
        ends = [i + len(sought) for i in range(len(text)) if text[i : i + len(sought)] == sought]
        for end in ends[:1] if rule.occurrence == "first" else ends:
            after = [i for i, start in enumerate(starts) if start >= end]
            if position in after[: rule.max_tokens]:
                return True
        return False

    def _holds(self, where: Where | None, edited: str, t: int) -> bool:
        if where is None:
            return True
        if not isinstance(where, Condition):
            met = [self._holds(inner, edited, t) for inner in where.conditions]
            return all(met) if isinstance(where, AllOf) else any(met)
        name, threshold = where.dictionary or edited, where.threshold
        if where.unit == "max":
            statistics = self.dictionaries[name].statistics
            assert statistics is not None
            threshold *= float(statistics.max[where.feature])
        above = float(self._latents[name][t, where.feature]) > threshold
        return above if where.comparison == "above" else not above


class EditedModel:
    """Hugging Face's GPT-2, edited by hooks, one row at a time; `token_bytes` and `encode` are the tokenizer's."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        dictionaries: Mapping[str, Dictionary],
        token_bytes: TokenBytes | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self.model: Any = model.eval()
        self.model.generation_config.eos_token_id = None  # no token ends a generation
        self.dictionaries, self.token_bytes, self.encode = dictionaries, token_bytes, encode

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], prompt_length: int, edits: Sequence[Edit] = ()) -> Tensor:
        """[T, vocab] with the edits on every token that they cover, all tokens at once."""
        return self._hooked(edits, prompt_length, lambda: self.model(torch.tensor([list(tokens)])).logits[0])

    def next_logits(self, tokens: Sequence[int], prompt_length: int, edits: Sequence[Edit] = ()) -> Tensor:
        """Those after the last token, [vocab]."""
        return self.logits(tokens, prompt_length, edits)[-1]

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], n: int, edits: Sequence[Edit] = ()) -> tuple[list[int], list[float]]:
        """The n likeliest tokens, one after the other with a key-value cache, and their log-probabilities."""
        ids = torch.tensor([list(prompt)])
        options = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
        made = self._hooked(
            edits,
            len(prompt),
            lambda: self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **options),
        )
        sampled = made.sequences[0, len(prompt) :].tolist()
        logprobs = [float(z[0].log_softmax(0)[i]) for z, i in zip(made.logits, sampled, strict=True)]
        return sampled, logprobs

    def _hooked(self, edits: Sequence[Edit], prompt_length: int, run: Callable[[], Any]) -> Any:
        row = EditedRow([self._resampled(edit) for edit in edits], self.dictionaries, prompt_length, self.token_bytes)

        def note_tokens(_module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
            row.first = len(row.tokens)
            row.tokens += inputs[0][0].tolist()

        def hook_of(site: str) -> Any:
            def hook(_module: object, _inputs: object, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (row.apply(site, output[0][0])[None], *output[1:])
                return row.apply(site, output[0])[None]

            return hook

        handles = [self.model.transformer.wte.register_forward_hook(note_tokens)]
        sites = {str(self.dictionaries[name].site) for name in row.read}
        handles += [self._module(site).register_forward_hook(hook_of(site)) for site in sites]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def _resampled(self, edit: Edit) -> Edit:
        """A resample edit as a set edit, from an unedited run of its reference text."""
        reference = edit.reference
        if reference is None:
            return edit
        text = reference.text
        if isinstance(text, str):
            assert self.encode is not None
            text = tuple(self.encode(text))
        caught: list[Tensor] = []
        d = self.dictionaries[edit.dictionary]
        handle = self._module(str(d.site)).register_forward_hook(
            lambda _m, _i, output: caught.append((output[0] if isinstance(output, tuple) else output)[0])
        )
        try:
            self.model(torch.tensor([list(text)]))
        finally:
            handle.remove()
        z = latents(d, caught[0])[:, edit.feature].tolist()
        same = {"positions": edit.positions, "condition": edit.condition}
        if reference.tokens == "aligned":
            return Edit(edit.dictionary, edit.feature, "set", values=tuple(z), **same)
        value = {"last": z[-1], "mean": sum(z) / len(z), "max": max(z)}[reference.tokens]
        return Edit(edit.dictionary, edit.feature, "set", value, **same)

    def _module(self, site: str) -> Any:
        layer, location = site.split(".")
        block = self.model.transformer.h[int(layer)]
        return {
            "resid_delta_attn": block.attn,
            "mlp_post_act": block.mlp.act,
            "resid_delta_mlp": block.mlp,
            "resid_post_mlp": block,
        }[location]


def thresholds(where: Where | None) -> Iterable[Condition]:
    """The single conditions of a combination."""
    if isinstance(where, Condition):
        yield where
    elif where is not None:
        for inner in where.conditions:
            yield from thresholds(inner)
