"""Edited generation the plain way: Hugging Face's `generate` with forward hooks, one request at a time.

Written from the documents of edits (edits.proto) alone; of the product it uses the classes that describe edits and
hold a dictionary's tensors, and none of its code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import AfterText, AllOf, Condition, Edit, Where


class HookedGenerator:
    """Greedy decoding with a key-value cache, edits acting in hooks."""

    def __init__(
        self, model: GPT2LMHeadModel, dictionaries: Mapping[str, Dictionary], token_bytes: Callable[[int], bytes]
    ) -> None:
        self.model = model.eval()
        assert self.model.generation_config is not None
        self.model.generation_config.eos_token_id = None  # no token ends a generation
        self.dictionaries = dictionaries
        self.token_bytes = token_bytes
        self._tokens: list[int] = []
        self._first = 0  # position of the first token that is run now
        self._latents: dict[str, Tensor] = {}  # [T, n_latents] of each dictionary on those tokens, before any edit

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], n: int, edits: Sequence[Edit] = (), **options: Any) -> list[int]:
        """n tokens, whatever they are; `options` go to `generate`."""
        edits = [self._resampled(edit) for edit in edits]
        self._tokens, self._first = [], 0
        handles = [self.model.transformer.wte.register_forward_hook(self._note_tokens)]
        sites: dict[str, list[Edit]] = {}
        for edit in edits:
            sites.setdefault(self._site(edit.dictionary), []).append(edit)
            for leaf in _leaves(edit.condition):
                sites.setdefault(self._site(leaf.dictionary or edit.dictionary), [])
        for site, own in sites.items():
            handles.append(self._module(site).register_forward_hook(self._hook(site, own, edits, len(prompt))))
        try:
            ids = torch.tensor([list(prompt)])
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        finally:
            for handle in handles:
                handle.remove()
        return out[0, len(prompt) :].tolist()

    def _note_tokens(self, module: object, inputs: tuple[Tensor], output: object) -> None:
        self._first = len(self._tokens)
        self._tokens += inputs[0][0].tolist()

    def _site(self, name: str) -> str:
        site = self.dictionaries[name].site
        assert site is not None
        return site

    def _module(self, site: str) -> torch.nn.Module:
        layer, location = site.split(".")
        block = self.model.transformer.h[int(layer)]
        return {"resid_post_mlp": block, "mlp_post_act": block.mlp.act, "resid_delta_attn": block.attn}[location]

    def _hook(self, site: str, edits: Sequence[Edit], all_edits: Sequence[Edit], prompt_length: int) -> Any:
        read = {edit.dictionary for edit in edits}
        for edit in all_edits:
            read |= {leaf.dictionary or edit.dictionary for leaf in _leaves(edit.condition)}
        read = {name for name in read if self._site(name) == site}

        def hook(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            edited = h.clone()
            for name in read:
                self._latents[name] = torch.stack([latents(self.dictionaries[name], x) for x in h[0]])
            for name in {edit.dictionary for edit in edits}:
                for t in range(h.shape[1]):
                    acting = [e for e in edits if e.dictionary == name and self._acts(e, t, prompt_length)]
                    if acting:
                        edited[0, t] += self._change(self.dictionaries[name], acting, h[0, t], t)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    def _acts(self, edit: Edit, t: int, prompt_length: int) -> bool:
        position = self._first + t
        if edit.values is not None and position >= len(edit.values):
            return False
        return self._covers(edit, position, prompt_length) and self._holds(edit.condition, edit.dictionary, t)

    def _covers(self, edit: Edit, position: int, prompt_length: int) -> bool:
        rule = edit.positions
        if isinstance(rule, tuple):
            return position in rule
        if isinstance(rule, AfterText):
            return self._after(rule, position)
        return {
            "all": True,
            "prompt": position < prompt_length,
            "generated": position >= prompt_length,
            "last": position == prompt_length - 1,
        }[rule]

    def _after(self, rule: AfterText, position: int) -> bool:
        """Whether a token starts at the end of an occurrence of the text in what precedes it, or later."""
        pieces = [self.token_bytes(token) for token in self._tokens]
        starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
        text, sought = b"".join(pieces[:position]), rule.text.encode()
        ends = [i + len(sought) for i in range(len(text)) if text[i : i + len(sought)] == sought]
        for end in ends[:1] if rule.occurrence == "first" else ends:
            after = [i for i, start in enumerate(starts) if start >= end]
            if position in after[: rule.max_tokens]:
                return True
        return False

    def _holds(self, where: Where | None, own: str, t: int) -> bool:
        if where is None:
            return True
        if isinstance(where, Condition):
            name = where.dictionary or own
            threshold = where.threshold
            if where.unit == "max":
                threshold *= float(self.dictionaries[name].statistics.max[where.feature])
            above = bool(self._latents[name][t, where.feature] > threshold)
            return above if where.comparison == "above" else not above
        met = [self._holds(inner, own, t) for inner in where.conditions]
        return all(met) if isinstance(where, AllOf) else any(met)

    def _change(self, dictionary: Dictionary, edits: Sequence[Edit], h: Tensor, t: int) -> Tensor:
        """What the edits of one dictionary add to one token's activation h [d]."""
        z = latents(dictionary, h)
        new = z.clone()
        for edit in edits:
            if edit.operation != "replace":
                new[edit.feature] = self._value(dictionary, edit, z[edit.feature], self._first + t)
        normalizes = dictionary.normalization == "layer_norm"
        mean, std = (h.mean(), h.std()) if normalizes else (torch.tensor(0.0), torch.tensor(1.0))
        if any(edit.operation == "replace" for edit in edits):
            return (new @ dictionary.decoder + dictionary.pre_bias) * std + mean - h
        return (new - z) @ dictionary.decoder * std

    def _value(self, dictionary: Dictionary, edit: Edit, old: Tensor, position: int) -> Tensor | float:
        statistics = dictionary.statistics
        unit = float(statistics.max[edit.feature]) if edit.unit == "max" else 1.0
        match edit.operation:
            case "set":
                return (edit.value if edit.values is None else edit.values[position]) * unit
            case "add":
                return old + edit.value * unit
            case "scale":
                return old * edit.value
            case "clamp":
                low = old if edit.minimum is None else max(old, torch.tensor(edit.minimum * unit))
                return low if edit.maximum is None else min(low, torch.tensor(edit.maximum * unit))
            case "ablate_zero":
                return 0.0
            case _:
                assert edit.operation == "ablate_mean"
                return float(statistics.mean[edit.feature])

    def _resampled(self, edit: Edit) -> Edit:
        """A resample edit as a set edit, from a run of its reference text (token ids)."""
        reference = edit.reference
        if reference is None:
            return edit
        dictionary, found = self.dictionaries[edit.dictionary], []
        handle = self._module(self._site(edit.dictionary)).register_forward_hook(
            lambda m, i, o: found.append(o[0] if isinstance(o, tuple) else o)
        )
        try:
            self.model(torch.tensor([list(reference.text)]))
        finally:
            handle.remove()
        z = [float(latents(dictionary, x)[edit.feature]) for x in found[0][0]]
        common = {
            "dictionary": edit.dictionary,
            "feature": edit.feature,
            "operation": "set",
            "positions": edit.positions,
            "condition": edit.condition,
        }
        if reference.tokens == "aligned":
            return Edit(**common, values=tuple(z))
        return Edit(**common, value={"last": z[-1], "mean": sum(z) / len(z), "max": max(z)}[reference.tokens])


def latents(dictionary: Dictionary, h: Tensor) -> Tensor:
    """z [n_latents] of one activation, by the equations in autoencoder.py (ReLU and TopK)."""
    x = h
    if dictionary.normalization == "layer_norm":
        x = (h - h.mean()) / (h.std() + 1e-5)
    z = dictionary.encoder @ (x - dictionary.pre_bias) + dictionary.latent_bias
    if dictionary.k is not None:
        kept = z.topk(dictionary.k).indices
        z = torch.zeros_like(z).index_copy(0, kept, z[kept])
    return z.relu()


def _leaves(where: Where | None) -> list[Condition]:
    if where is None:
        return []
    if isinstance(where, Condition):
        return [where]
    return [leaf for inner in where.conditions for leaf in _leaves(inner)]
