"""Settings of the offline job: one object that a YAML file and command-line flags of the same names fill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from sae_runtime.data.bad_documents import BadDocumentRule
from sae_runtime.model.sites import Site
from sae_runtime.settings import SettingsError, SettingValues, read_mapping

DTypeName = Literal["float32", "bfloat16", "float16"]
DTypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
Family = Literal["topk", "batch_topk", "matryoshka", "relu", "relu_decoder_norm", "jumprelu", "gated"]
FAMILIES: tuple[Family, ...] = get_args(Family)
PENALISED: tuple[Family, ...] = ("relu", "relu_decoder_norm", "jumprelu", "gated")
"""Families that are sparse because of a penalty, not by choosing k latents."""
PRESETS = Path(__file__).parent / "presets"


class TrainingConfig(BaseModel):
    """How dictionaries are trained, measured and published: one for each site, all of one family and size.

    The defaults suit a laptop and a small backbone; descriptions give the values of Gao et al. 2024 for GPT-2 small
    ("paper": n_latents 32768, k 32) where they differ. Unknown keys are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # What is trained on what
    sites: tuple[str, ...] = Field(
        (), description="Several sites trained in one pass over the model, in place of site; one dictionary for each."
    )
    site: str | None = Field(
        None, description="Where activations are read, <layer>.<location>, for example 8.resid_post_mlp."
    )
    data: tuple[Path, ...] = Field(
        min_length=1,
        description="Training text: .txt, .md or .jsonl files (records hold `text`; also .xz, .gz or .zst), .parquet "
        "files, or one folder that `saeserve tokenize` wrote.",
    )
    out: Path = Field(
        description="Folder that the published dictionary is written to, with sites that of one folder a site; "
        "it must not exist yet.",
    )
    name: str | None = Field(None, description="Name of the published dictionary; the folder's name if not given.")
    backbone: str = Field("builtin", description="Backbone: builtin, a Hugging Face folder or a hub name.")
    bad_documents: BadDocumentRule = "stop"
    held_out: tuple[Path, ...] = Field(
        (), description="Held-out text for evaluation and statistics; if not given, a fraction of the training text."
    )
    held_out_fraction: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Share of documents (chosen by a hash of their text) that training never sees and evaluation uses, "
        "when held_out is not given.",
    )

    # The dictionary
    family: Family = Field(
        "topk",
        description="Kind of dictionary: topk, batch_topk, matryoshka (nested BatchTopK), relu (L1 penalty, unit-norm "
        "decoder), relu_decoder_norm (L1 penalty scaled by decoder norms), jumprelu or gated.",
    )
    n_latents: int | None = Field(None, ge=1, description="Number of latents; or give expansion_factor.")
    expansion_factor: float = Field(
        16, gt=0, description="Latents per input dimension, used when n_latents is not given (paper: 42.7)."
    )
    k: int = Field(
        32,
        ge=1,
        description="Latents active on a token: always (topk), on average over a batch (batch_topk, matryoshka), or "
        "what the penalty is steered to (the others, unless sparsity_coefficient is given).",
    )
    normalize: bool = Field(
        True, description="Layer-normalise the input (mean and standard deviation of each token), undone when decoding."
    )

    # Tokens
    tokens: int = Field(4_000_000, ge=1, description="Tokens to train on, rounded up to whole batches (paper: 1.3e9).")
    context_length: int | None = Field(
        None,
        ge=2,
        description="Tokens in a row given to the backbone; its own context length if not given (paper: 64).",
    )
    rows: Literal["packed", "documents"] = Field(
        "packed",
        description="packed: documents joined by end-of-text and cut into full rows; documents: every row belongs to "
        "one document.",
    )
    prepend_end_of_text: bool = Field(
        False, description="Begin every row with an end-of-text token, which is not trained on."
    )

    # Data
    buffer_tokens: int = Field(
        131_072,
        ge=2,
        description="Activations in the shuffle buffers of all workers together; half of each is replaced at a time.",
    )
    backbone_tokens: int = Field(8_192, ge=1, description="Tokens in one forward pass of the backbone.")
    data_lanes: int | None = Field(
        None,
        ge=1,
        description="Streams that the text is dealt to, a multiple of the number of workers; with the same streams any "
        "number of workers trains on the same batches. The largest of 8, 4, 2 and 1 that divides batch_tokens "
        "if not given.",
    )
    backbone_device: str | None = Field(
        None, description="Device of the backbone while training; that of the dictionary if not given."
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Read activations ahead in a thread while training goes on, up to half the buffer more in memory; "
        "the result is the same. auto: where backbone and dictionary are on different devices.",
    )
    cache: Path | None = Field(
        None, description="Folder that activations are kept in for later epochs and other trainings; none if not given."
    )
    cache_gb: float = Field(20.0, gt=0, description="Most that the folder may hold, in GB (1e9 bytes).")
    cache_dtype: DTypeName | None = Field(
        None,
        description="Type of the cached activations, which are then trained on in that type, cached or not; the "
        "backbone's if not given.",
    )

    # Optimisation
    batch_tokens: int = Field(2_048, ge=1, description="Tokens in one optimiser step (paper: 131072).")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens whose gradient is computed at a time and added up to a step; bounds memory, changes the "
        "result by rounding only. All at once if not given.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Adam's learning rate; 2e-4 / sqrt(n_latents / 2^14) times 2.5 if not given, which suits the small "
        "default batches (paper: 1e-4 at 32768 latents).",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay rate.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second decay rate.")
    adam_eps: float = Field(6.25e-10, gt=0, description="Adam's epsilon (paper: 6.25e-10).")
    warmup_steps: int = Field(50, ge=0, description="Steps over which the learning rate rises from 0 (paper: none).")
    decay_fraction: float = Field(
        0.25, ge=0, le=1, description="Last share of the steps over which the learning rate falls to 0 (paper: 0)."
    )
    gradient_clip: float | None = Field(1.0, gt=0, description="Largest norm of the gradient; none to switch off.")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Publish a bias-corrected moving average of the weights with this decay (paper: 0.999).",
    )

    # What belongs to single families
    multi_topk_coefficient: float = Field(
        0.0, ge=0, description="topk: weight of a second loss with 4·k latents (Multi-TopK, paper: 1/8); 0 for none."
    )
    matryoshka_fractions: tuple[float, ...] = Field(
        (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2),
        description="matryoshka: sizes of the nested groups of latents as shares of n_latents, together 1.",
    )
    threshold_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="batch_topk, matryoshka: decay of the running average of the least chosen activation of each "
        "batch, which becomes the published threshold; such that it spans the last 2 % of the steps if not given.",
    )
    sparsity_coefficient: float | None = Field(
        None,
        ge=0,
        description="relu, relu_decoder_norm, jumprelu, gated: weight of the sparsity penalty beside an error that is "
        "1 for predicting the mean; if not given it is steered until k latents are active.",
    )
    sparsity_warmup_fraction: float = Field(
        0.05, ge=0, le=1, description="First share of the steps over which a given sparsity_coefficient rises from 0."
    )
    jumprelu_penalty: Literal["l0", "tanh"] = Field(
        "l0",
        description="jumprelu: penalise the number of active latents, or the sum of tanh(tanh_scale · activation · "
        "decoder norm), which is smooth and reaches the encoder too.",
    )
    tanh_scale: float = Field(4.0, gt=0, description="jumprelu: slope of the tanh penalty at 0.")
    jumprelu_bandwidth: float = Field(
        0.5,
        gt=0,
        description="jumprelu: width of the kernel through which thresholds learn, for inputs of mean square 1.",
    )

    # Dead latents
    aux_k: int = Field(
        128, ge=0, description="Dead latents that model the residual of each token; 0 switches off (paper: 512)."
    )
    aux_coefficient: float = Field(1 / 32, ge=0, description="Weight of that auxiliary loss (paper: 1/32).")
    dead_after_tokens: int = Field(
        200_000, ge=1, description="A latent that did not fire for this many tokens is dead (paper: 10,000,000)."
    )
    dead_threshold: float = Field(1e-3, ge=0, description="Activation that a latent must exceed to count as firing.")

    # Latents split over workers
    shard_offer_factor: float | None = Field(
        None,
        gt=0,
        description="Latents of a token that each latent shard offers first, in multiples of k / shards (paper: 4); so "
        "many that about 1 % of the tokens need more if not given.",
    )
    shard_offers_complete: bool = Field(
        True,
        description="Offer the rest where the first offers may lack some of the k largest, which makes shards exact "
        "(paper: no).",
    )

    # Execution
    seed: int = Field(
        0, ge=0, description="Seed of everything random; with the same CPU and threads it gives the same weights."
    )
    device: str = Field("cpu", description="Device of the backbone and the dictionary, for example cpu or cuda:0.")
    threads: int | None = Field(None, ge=1, description="CPU threads of PyTorch; its own choice if not given.")
    compute_dtype: DTypeChoice = Field(
        "auto",
        description="Type of the large matrix product x @ encoder; weights and gradients stay float32. auto: bfloat16 "
        "where the device is fast in it, else float32; a run that goes on keeps the type that it began with.",
    )
    backbone_dtype: DTypeChoice = Field(
        "auto",
        description="Type the backbone runs in while training; evaluation always runs in float32. auto: as "
        "compute_dtype.",
    )

    # Logging
    log: Path | None = Field(
        None, description="Metrics file, one JSON line for each logged step; <out>.metrics.jsonl if not given."
    )
    log_interval: int = Field(10, ge=1, description="Steps between two logged steps.")
    tensorboard: Path | None = Field(
        None, description="Folder that TensorBoard events are also written to; none if not given."
    )
    wandb_project: str | None = Field(
        None, description="Weights & Biases project that metrics are also sent to; none if not given."
    )

    # Checkpoints and publication
    checkpoint: Path | None = Field(
        None, description="Checkpoint file; <out>.checkpoint.pt if not given. A run continues from it when it exists."
    )
    checkpoint_interval: float = Field(120.0, ge=0, description="Seconds between checkpoints; 0 writes none.")
    storage_dtype: DTypeName = Field("float16", description="Type of the published weights.")
    evaluation_tokens: int = Field(
        131_072, ge=1, description="Held-out tokens for NMSE, L0, dead fraction and loss recovered, all in float32."
    )
    statistics_tokens: int = Field(
        524_288, ge=1, description="Held-out tokens for the per-latent statistics and the dead fraction."
    )

    @field_validator("site")
    @classmethod
    def _one_form_of_site(cls, site: str | None, info: ValidationInfo) -> str | None:
        sites = info.data.get("sites")
        if site is None and sites == ():
            raise PydanticKnownError("missing")
        if site is not None and sites:
            raise ValueError(f"site is {site} and sites are {', '.join(sites)}, expected one of the two settings")
        return site

    @model_validator(mode="after")
    def _check(self) -> Self:
        for site in self.all_sites:
            Site.parse(site)
        if len(set(self.all_sites)) != len(self.all_sites):
            raise ValueError(f"sites are {', '.join(self.all_sites)}, expected each once")
        if self.family != "topk" and self.multi_topk_coefficient:
            raise ValueError(f"multi_topk_coefficient belongs to the family topk, found {self.family}")
        if self.sparsity_coefficient is not None and self.family not in PENALISED:
            raise ValueError(f"sparsity_coefficient belongs to {', '.join(PENALISED)}, found {self.family}")
        if min(self.matryoshka_fractions, default=0) <= 0 or abs(sum(self.matryoshka_fractions) - 1) > 1e-6:
            raise ValueError(f"matryoshka_fractions are {self.matryoshka_fractions}, expected positive with sum 1")
        if self.n_latents is not None and self.k > self.n_latents:
            raise ValueError(f"k is {self.k}, more than n_latents = {self.n_latents}")
        if self.buffer_tokens < 2 * self.batch_tokens:
            raise ValueError(
                f"buffer_tokens is {self.buffer_tokens}, expected at least twice batch_tokens = {self.batch_tokens}"
            )
        if self.batch_tokens % self.n_streams:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, expected a multiple of data_lanes = {self.n_streams}"
            )
        torch.device(self.device)
        return self

    @classmethod
    def from_yaml(cls, path: str | Path | None, *, preset: str | None = None, **overrides: Any) -> TrainingConfig:
        """Reads a YAML mapping of these settings, which may name a `preset` of its own.

        `overrides` (such as command-line flags) win over the file, and the file over the preset. Without a path, preset
        and overrides are all there is.

        Raises:
            SettingsError: the file cannot be read or is not a mapping, there is no such preset, or a setting is
                unknown, missing or wrong.
        """
        given = SettingValues.of_file(path)
        named = given.values.pop("preset", None)
        given.set_flags(overrides)
        chosen = preset or named
        defaults = {} if chosen is None else read_preset(chosen)
        for one, other in (("site", "sites"), ("sites", "site"), *_EITHER):
            if given.values.get(one) is not None:
                defaults.pop(other, None)  # two forms of one setting: what wins must not meet the other
        given.values = defaults | given.values
        return given.build(cls)

    @property
    def all_sites(self) -> tuple[str, ...]:
        """The sites trained, in the form of one and of several."""
        return self.sites or ((self.site,) if self.site is not None else ())

    def out_of(self, site: str) -> Path:
        """Folder of a site's dictionary: `out`, or a folder in it where several sites are trained."""
        return self.out / site if self.sites else self.out

    def name_of(self, site: str) -> str:
        """Name of a site's dictionary."""
        return f"{self.published_name}-{site}" if self.sites else self.published_name

    @property
    def published_name(self) -> str:
        return self.name or self.out.name

    @property
    def checkpoint_path(self) -> Path:
        return self.checkpoint or self.out.with_name(self.out.name + ".checkpoint.pt")

    @property
    def reading_device(self) -> str:
        """Where the backbone runs while training."""
        return self.backbone_device or self.device

    @property
    def log_path(self) -> Path:
        return self.log or self.out.with_name(self.out.name + ".metrics.jsonl")

    @property
    def n_streams(self) -> int:
        """data_lanes, or the largest power of two up to 8 that divides a batch."""
        return self.data_lanes or math.gcd(self.batch_tokens, 8)

    @property
    def n_steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)

    def latents_for(self, d_in: int) -> int:
        """n_latents, or expansion_factor times the input width.

        Raises:
            ValueError: that is fewer than k.
        """
        n_latents = self.n_latents or round(self.expansion_factor * d_in)
        if n_latents < self.k:
            raise ValueError(
                f"{n_latents} latents (expansion_factor {self.expansion_factor} × {d_in}) are fewer than k = {self.k}"
            )
        return n_latents

    def learning_rate_for(self, n_latents: int) -> float:
        """The learning rate, scaled with 1/√n_latents when it is not given."""
        return self.learning_rate or 5e-4 / math.sqrt(n_latents / 2**14)

    @property
    def threshold_decay_rate(self) -> float:
        """threshold_decay, or that of an average over 2 % of the steps."""
        return 1 - min(1.0, 50 / self.n_steps) if self.threshold_decay is None else self.threshold_decay


_EITHER = (("n_latents", "expansion_factor"), ("expansion_factor", "n_latents"))


def preset_names() -> tuple[str, ...]:
    """Names of the presets that come with the package."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def read_preset(name: str) -> dict[str, Any]:
    """Settings of a preset, a YAML file of the package.

    Raises:
        SettingsError: there is no such preset.
    """
    if name not in preset_names():
        raise SettingsError(f"no preset {name!r}, expected one of {', '.join(preset_names())}")
    return read_mapping(PRESETS / f"{name}.yaml")
