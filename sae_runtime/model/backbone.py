"""The backbone: a GPT-2 whose activations can be read and edited, on packed rows.

Weights and tokenizer are Hugging Face files. The forward pass is the project's own: it runs rows without padding, stops
after the last site that is needed, and lets activations be replaced on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sae_runtime.model.attention import AttentionPlan
from sae_runtime.model.devices import check_device, check_dtype
from sae_runtime.model.families.gpt2 import weights as gpt2_weights
from sae_runtime.model.families.gpt2.config import GPT2Settings
from sae_runtime.model.families.gpt2.model import GPT2
from sae_runtime.model.folders import find_folder
from sae_runtime.model.forward import BRANCHES, EditFunction, ForwardResult, PausedForward, Taps
from sae_runtime.model.kv_cache import KVCache
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import LOCATIONS, Site
from sae_runtime.model.tokenization import TextTokenizer, TokenizedText, switch_off_dropout

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast


class Backbone:
    """A GPT-2 on one device. Weights never change. Several threads may run forwards at once, but not on one cache."""

    def __init__(
        self,
        *,
        name: str,
        settings: GPT2Settings,
        weights: gpt2_weights.GPT2Weights,
        fingerprint: str,
        tokenizer: PreTrainedTokenizerFast | Path | None = None,
    ) -> None:
        """Use `Backbone.load` or `Backbone.random`. A `tokenizer` given as a folder is read when it is first needed."""
        self.name = name
        self.settings = settings
        self.fingerprint = fingerprint
        """sha256 over the weights cast to float16, so that it does not depend on the dtype they are loaded as."""
        self._model = GPT2(settings, weights)
        self._tokenizer = tokenizer
        self.n_layers: int = settings.n_layer
        self.d_model: int = settings.n_embd
        self.context_length: int = settings.n_positions
        self.vocab_size: int = settings.vocab_size
        self.dtype: torch.dtype = weights.wte.dtype
        self.device: torch.device = weights.wte.device

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "builtin",
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Backbone:
        """Loads "builtin", a Hugging Face folder, or a hub name such as "openai-community/gpt2". Safetensors only.

        Raises:
            FileNotFoundError: the folder or its files do not exist.
            ConnectionError: a hub name that is not cached, and the hub cannot be reached or has no such model.
            ValueError: not a GPT-2, pickled weights only, weights that do not fit or are not finite in that dtype, or
                an unknown dtype or device.

        Warns (UserWarning) of stored weights that are not used and of settings that contradict the weights.
        """
        dtype, device = check_dtype(dtype), check_device(device)
        folder = find_folder(str(name_or_path))
        settings, state = gpt2_weights.read_folder(folder)
        try:
            weights = gpt2_weights.assemble(state, settings.n_layer, dtype, device)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        return cls(
            name=str(name_or_path),
            settings=settings,
            weights=weights,
            fingerprint=gpt2_weights.fingerprint(state, settings),
            tokenizer=folder,
        )

    @classmethod
    def random(
        cls,
        *,
        n_layers: int = 2,
        d_model: int = 32,
        n_heads: int = 4,
        vocab_size: int = 100,
        context_length: int = 64,
        seed: int = 0,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: PreTrainedTokenizerFast | Path | None = None,
    ) -> Backbone:
        """Random weights of any shape, for tests and measurements. The same seed gives the same weights."""
        dtype, device = check_dtype(dtype), check_device(device)
        settings = GPT2Settings(
            vocab_size=vocab_size,
            n_positions=context_length,
            n_embd=d_model,
            n_layer=n_layers,
            n_head=n_heads,
            bos_token_id=0,
            eos_token_id=0,
        )
        state = gpt2_weights.random_state(settings, seed)
        return cls(
            name=f"random-{n_layers}x{d_model}-seed{seed}",
            settings=settings,
            weights=gpt2_weights.assemble(state, n_layers, dtype, device),
            fingerprint=gpt2_weights.fingerprint(state, settings),
            tokenizer=tokenizer,
        )

    @classmethod
    def random_gpt2_small(
        cls, seed: int = 0, *, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
    ) -> Backbone:
        """Random weights of GPT-2 small's shape (124M parameters), for measurements."""
        return cls.random(
            n_layers=12,
            d_model=768,
            n_heads=12,
            vocab_size=50257,
            context_length=1024,
            seed=seed,
            dtype=dtype,
            device=device,
        )

    @property
    def config(self) -> GPT2Config:
        """transformers' object of the same settings."""
        return self.settings.to_transformers()

    # Sites

    def check_site(self, site: Site | str) -> Site:
        """The site, if this backbone has it.

        Raises:
            ValueError: unknown location or layer; lists the known ones.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        if site.layer >= self.n_layers:
            raise ValueError(f"site {site}: backbone {self.name!r} has layers 0 to {self.n_layers - 1}")
        return site

    def site_width(self, site: Site | str) -> int:
        """Size of one token's activation at the site."""
        site = self.check_site(site)
        return self.settings.d_mlp if site.location == "mlp_post_act" else self.d_model

    # Text

    @property
    def has_tokenizer(self) -> bool:
        """Whether the backbone came with tokenizer files."""
        if not isinstance(self._tokenizer, Path):
            return self._tokenizer is not None
        return (self._tokenizer / "tokenizer.json").exists() or (
            (self._tokenizer / "vocab.json").exists() and (self._tokenizer / "merges.txt").exists()
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """transformers' tokenizer, or None when the backbone came without tokenizer files. Not safe for threads."""
        if not isinstance(self._tokenizer, Path) or not self.has_tokenizer:
            return None if isinstance(self._tokenizer, Path) else self._tokenizer
        from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

        reader = PreTrainedTokenizerFast if (self._tokenizer / "tokenizer.json").exists() else GPT2Tokenizer
        tokenizer: PreTrainedTokenizerFast = reader.from_pretrained(self._tokenizer, local_files_only=True)
        switch_off_dropout(tokenizer.backend_tokenizer)
        return tokenizer

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """Exact spans and token bytes; safe for threads.

        Raises:
            ValueError: the backbone came without a tokenizer, or it is one that `TextTokenizer` refuses.
        """
        if not self.has_tokenizer:
            raise ValueError(f"backbone {self.name!r} has no tokenizer files; give token ids instead of text")
        if isinstance(self._tokenizer, Path) and (self._tokenizer / "tokenizer.json").exists():
            return TextTokenizer.from_file(self._tokenizer / "tokenizer.json")  # without transformers: a quick start
        assert self.tokenizer is not None
        return TextTokenizer.copy_of(self.tokenizer.backend_tokenizer)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """sha256 of vocabulary and merges; empty without a tokenizer."""
        return self.text_tokenizer.fingerprint if self.has_tokenizer else ""

    def encode_text(self, text: str) -> TokenizedText:
        """Token ids with exact byte and character spans, without special tokens (see TextTokenizer.encode).

        A tokenizer may know tokens that the embedding has no row for: see `check_tokens`.
        """
        return self.text_tokenizer.encode(text)

    def check_tokens(self, tokenized: TokenizedText) -> None:
        """Checks that the embedding has a row for every token of a text; it may lack those added to the tokenizer.

        Raises:
            ValueError: names the first token that has none, its bytes and its place.
        """
        if self.text_tokenizer.n_ids <= self.vocab_size:
            return
        for token, start in zip(tokenized.ids, tokenized.byte_starts, strict=True):
            if token >= self.vocab_size:
                spelt = self.token_bytes(token).decode(errors="replace")
                raise ValueError(
                    f"holds {spelt!r} at byte {start}, token id {token} of the tokenizer, which is outside the model's "
                    f"vocabulary of {self.vocab_size}"
                )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (see TextTokenizer.token_bytes)."""
        return self.text_tokenizer.token_bytes(token_id)

    # Forward pass

    def new_cache(self, n_slots: int, max_length: int | None = None, max_tokens: int | None = None) -> KVCache:
        """An empty cache of `n_slots` rows of up to `max_length` tokens (default: the context length).

        With `max_tokens` it holds that many tokens in all, and slots need `KVCache.reserve` before they are used.
        """
        max_length = self.context_length if max_length is None else max_length
        if max_length > self.context_length:
            raise ValueError(f"max_length {max_length} is over the backbone's context length of {self.context_length}")
        return KVCache(
            n_layers=self.n_layers,
            n_slots=n_slots,
            n_heads=self.settings.n_head,
            max_length=max_length,
            head_dim=self.d_model // self.settings.n_head,
            dtype=self.dtype,
            device=self.device,
            max_tokens=max_tokens,
        )

    @property
    def decode_bytes(self) -> int:
        """Bytes of weights that decoding one token reads: those of the blocks and of the LM head."""
        return self._model.decode_bytes

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory that one token takes in a cache: keys and values of every block."""
        return 2 * self.n_layers * self.d_model * self.dtype.itemsize

    @torch.inference_mode()
    def activations(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, sites: Sequence[Site | str] = ()
    ) -> dict[str, Tensor]:
        """Activations of a padded batch; computes up to the last block that `sites` need.

        Args:
            input_ids: integers [B, T].
            attention_mask: [B, T], 1 at real tokens and 0 at padding, on either side; positions count real tokens.
            sites: where to read.

        Returns:
            [B, T, width] in the backbone's dtype for each site, by its text; zeros at padding.

        Raises:
            ValueError: an unknown site, wrong shapes, a hole in a row's mask, an id outside the vocabulary, or a row
                over the context length.
        """
        sites_by_name = {str(self.check_site(site)): self.check_site(site) for site in sites}
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}, expected integers [B, T]")
        input_ids = input_ids.to(self.device, torch.int64)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)}, expected the shape of input_ids, "
                    f"{list(input_ids.shape)}"
                )
            real = attention_mask.to(self.device) != 0
            if (real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any():
                raise ValueError("attention_mask has padding between real tokens; it may only be at the ends of a row")
        results = {
            name: torch.zeros(*input_ids.shape, self.site_width(site), dtype=self.dtype, device=self.device)
            for name, site in sites_by_name.items()
        }
        lengths = tuple(n for n in real.sum(1).tolist() if n)  # rows of padding alone have no tokens to run
        if lengths and results:
            packed = PackedTokens(ids=input_ids[real], lengths=lengths, past=(0,) * len(lengths))
            captured = self.forward(packed, capture=sites_by_name.values()).activations
            for name, site in sites_by_name.items():
                results[name][real] = captured[site]
        return results

    def forward(
        self,
        packed: PackedTokens,
        *,
        capture: Collection[Site | str] = (),
        edit: EditFunction | None = None,
        edit_sites: Collection[Site | str] = (),
        cache: KVCache | None = None,
        logits: Literal["none", "last", "all"] = "none",
        pause: Collection[Site | str] = (),
        start: PausedForward | None = None,
    ) -> ForwardResult:
        """Runs packed rows as far as needed for captured, paused and edited sites, the cache, and logits.

        Args:
            packed: B rows, N tokens. With a cache, a row may bring a whole prompt (past 0), a piece of one, or one
                decoded token. A batch may mix them.
            capture: sites whose activations are returned, after any edit there.
            edit: called at each of `edit_sites`, in order of computation.
            cache: keys and values of each row's past; those of this batch are added. Every block then runs.
            logits: of no token, of each row's last token, or of all tokens. The LM head runs only for these.
            pause: sites returned as they are before any edit, so that other forwards can start from them.
            start: a paused forward to start from, instead of the embedding. Its tokens are those of `packed`. Captured,
                paused and edited sites may not come before its site, and there can be no cache.

        Raises:
            ValueError: an unknown site, an id outside the vocabulary, a row over the context length, rows that do not
                fit the cache, an edit that changes shape or dtype, or a start that does not fit the rest.
        """
        if logits not in ("none", "last", "all"):
            raise ValueError(f"logits is {logits!r}; expected 'none', 'last' or 'all'")
        if edit_sites and edit is None:
            raise ValueError("edit_sites are named but there is no edit")
        taps = Taps(
            capture=frozenset(map(self.check_site, capture)),
            edit=edit,
            edit_sites=frozenset(map(self.check_site, edit_sites)),
            last=self._last_site((*capture, *pause), edit_sites, cache is not None, logits != "none"),
            pause=frozenset(map(self.check_site, pause)),
        )
        self._check_rows(packed, cache)
        if start is not None:
            self._check_start(start, packed, taps, cache)
        if taps.last is None:
            return ForwardResult({}, None)
        packed = packed.to(self.device)
        plan = AttentionPlan.of(packed, self.dtype, cache)
        if start is None:
            x = self._model.embed(packed)  # [N, d]
        else:
            x = start.activation if start.residual is None else start.residual
        first_layer = 0 if start is None else start.site.layer
        for layer in range(first_layer, taps.last.layer + 1):
            x = self._model.block(layer, x, plan, cache, taps, start if layer == first_layer else None)
        scores = None
        if logits != "none":
            if logits == "last" and not packed.one_token_each:
                x = x[packed.row_ends]
            scores = self.unembed(x).float()
        return ForwardResult(taps.captured, scores, taps.paused)

    def unembed(self, x: Tensor) -> Tensor:
        """Logits [n, vocab] from the last block's output x [n, d_model]; float32, or float64 for a float64 backbone."""
        return self._model.unembed(x)

    def direct_logits(self, site: Site | str, rows: Tensor) -> Tensor:
        """What adding rows [n, width] at a site does to the logits [n, vocab] by itself, without the blocks after it.

        The final layer norm is linear here: it centres and multiplies by its gain, but does not divide by the size of
        its input. So the changes of one row compare with one another.
        """
        site = self.check_site(site)
        return self._model.direct_logits(site.layer, site.location, rows)

    def _last_site(
        self, capture: Collection[Site | str], edit_sites: Collection[Site | str], cache: bool, logits: bool
    ) -> Site | None:
        """The last site, in order of computation, that is needed; None if nothing is needed."""
        needed = [self.check_site(site) for site in (*capture, *edit_sites)]
        if logits:
            needed.append(Site(self.n_layers - 1, LOCATIONS[-1]))
        if cache:
            needed.append(Site(self.n_layers - 1, "resid_delta_attn"))
        return max(needed, default=None)

    def _check_start(self, start: PausedForward, packed: PackedTokens, taps: Taps, cache: KVCache | None) -> None:
        self.check_site(start.site)
        if cache is not None or any(packed.past):
            raise ValueError("a forward that starts at a site cannot use a cache")
        early = [str(site) for site in sorted(taps.capture | taps.edit_sites | taps.pause) if site < start.site]
        if early:
            raise ValueError(f"{', '.join(early)}: before the site {start.site} where the forward starts")
        expected = (len(packed), self.site_width(start.site))
        if start.activation.shape != expected or start.activation.dtype != self.dtype:
            actual = f"{start.activation.dtype} {list(start.activation.shape)}"
            raise ValueError(f"the activation to start from is {actual}, expected {self.dtype} {list(expected)}")
        if (start.residual is not None) != (start.site.location in BRANCHES):
            raise ValueError(f"a start at {start.site} has {'a' if start.residual is not None else 'no'} residual")

    def _check_rows(self, packed: PackedTokens, cache: KVCache | None) -> None:
        for past, length in zip(packed.past, packed.lengths, strict=True):
            if past + length > self.context_length:
                raise ValueError(
                    f"a row of {past + length} tokens is over the backbone's context length of {self.context_length}"
                )
        if cache is None and packed.slots is not None:
            raise ValueError("packed rows name cache slots, but no cache was given")
        low, high = (int(bound) for bound in packed.ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
