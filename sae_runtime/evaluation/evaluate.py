"""One evaluation of a dictionary: every metric, on held-out text, into one flat set of figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_runtime.builtin import HELD_OUT
from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.rows import encode_texts, packed_passes
from sae_runtime.data.text_sample import TextSample, read_sample
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.evaluation.ablation_sparsity import ablation_figures, ablation_sparsity
from sae_runtime.evaluation.baselines import Baselines, Moments, fit_baselines, to_inner
from sae_runtime.evaluation.geometry import geometry_figures
from sae_runtime.evaluation.intervals import with_interval
from sae_runtime.evaluation.n2g import ActivationRecorder, Explanation, explain_latents, n2g_figures
from sae_runtime.evaluation.probe_tasks import Chunks, Task, chunk_tasks, cut_chunks, token_tasks
from sae_runtime.evaluation.probes import ExampleBuilder, probe_figures
from sae_runtime.evaluation.report import EvaluationReport
from sae_runtime.evaluation.settings import EvaluationSettings
from sae_runtime.evaluation.splice import (
    baseline_figures,
    choose_windows,
    kind_figures,
    overall_figures,
    position_figures,
    splice_single_tokens,
)
from sae_runtime.figures.card import describe_dictionary
from sae_runtime.figures.density import DensityCounter
from sae_runtime.figures.held_out import splice_tokens
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressCallback, ProgressMeter

_BASELINES = ("mean", "pca", "random")


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    dictionary: Dictionary,
    settings: EvaluationSettings | None = None,
    progress: ProgressCallback | None = None,
) -> EvaluationReport:
    """Measures a dictionary of any family. The same seed, machine and threads give the same bits.

    `settings.backbone`, `device` and `out` are for the command line and not read here. Row settings that are not given
    are those that the dictionary was trained with.

    Raises:
        ValueError: no site is known, the dictionary does not fit the backbone or is a transcoder (whose reconstructions
            belong at another site than its input), a backbone without tokenizer, or too little text.
    """
    settings = complete_settings(settings or EvaluationSettings(), dictionary)
    site = _check(backbone, dictionary, settings)
    with BadDocuments(settings.bad_documents) as bad:
        run = _Run(backbone, dictionary, site, settings, bad, progress)
        figures = run.figures()
    described = describe_dictionary(dictionary, backbone.name) | {"site": str(site)}
    asked = {f"setting_{name}": value for name, value in settings.sample_settings().items()}
    return EvaluationReport(described | figures | asked, run.explanations, _token_text(backbone))


def complete_settings(settings: EvaluationSettings, dictionary: Dictionary) -> EvaluationSettings:
    """Fills missing settings from the dictionary's training: figures are comparable only on rows of the same kind."""
    provenance = dictionary.manifest.provenance if dictionary.manifest else None
    trained = provenance.config if provenance else {}
    defaults = {"seed": 0, "context_length": None, "rows": "packed", "prepend_end_of_text": False}
    filled = {name: trained.get(name, default) for name, default in defaults.items() if getattr(settings, name) is None}
    filled["site"] = settings.site or dictionary.site
    filled["data"] = settings.data or (HELD_OUT,)
    return EvaluationSettings.model_validate(settings.model_dump() | filled)


def _check(backbone: Backbone, dictionary: Dictionary, settings: EvaluationSettings) -> Site:
    site = dictionary.site_in(backbone, settings.site)
    if dictionary.transcoder:
        raise ValueError(
            "the dictionary is a transcoder: what it decodes belongs at another site than its input, and cannot be "
            "compared with it or put in its place"
        )
    return site


class _Run:
    """The passes over the text, and what later ones need from earlier ones."""

    def __init__(
        self,
        backbone: Backbone,
        dictionary: Dictionary,
        site: Site,
        settings: EvaluationSettings,
        bad: BadDocuments,
        progress: ProgressCallback | None,
    ) -> None:
        self.backbone, self.dictionary, self.site, self.settings = backbone, dictionary, site, settings
        self.meter = ProgressMeter(progress)
        self.seed = settings.seed or 0
        self.spliced_text = self._read(settings.tokens, bad)
        self.feature_text = self._read(settings.feature_tokens, bad)
        self.explanations: list[Explanation] = []

    def figures(self) -> dict[str, Any]:
        moments, baselines = self._fit_baselines()
        figures = self._splice(moments, baselines)
        figures |= self._features(baselines)
        figures |= self._single_tokens(baselines)
        progress = self._stage("geometry", min(self.dictionary.n_latents, self.settings.geometry_latents), "latents")
        return figures | geometry_figures(self.dictionary.decoder, self.settings.geometry_latents, self.seed, progress)

    def _read(self, n_tokens: int, bad: BadDocuments) -> TextSample:
        s = self.settings
        return read_sample(
            self.backbone,
            s.data,
            n_tokens,
            context_length=s.context_length,
            rows=s.rows or "packed",
            prepend_end_of_text=bool(s.prepend_end_of_text),
            seed=self.seed,
            bad=bad,
        )

    def _stage(self, name: str, total: int, unit: str) -> ProgressMeter:
        self.meter.begin(name, total, unit)
        return self.meter

    def _activations(self, sample: TextSample, progress: ProgressMeter) -> Iterator[tuple[Tensor, SparseFeatures]]:
        """Activations [n, d] of whole rows and their features, over a sample."""
        done = 0
        for packed in packed_passes(sample.rows, self.settings.tokens_per_pass):
            x = self.backbone.forward(packed, capture=[self.site]).activations[self.site].float()
            yield x, self.dictionary.encode(x)
            done += len(packed)
            progress.reach(done)

    def _fit_baselines(self) -> tuple[tuple[Tensor, Tensor], Baselines]:
        """Means of the activations, raw and normalised, float64; and the baselines, fitted on their own tokens."""
        sample, s = self.spliced_text, self.settings
        n_baseline = sample.first(s.baseline_tokens).n_tokens if s.baseline_tokens else sample.n_tokens
        progress = self._stage("baselines", sample.n_tokens, "tokens")
        raw, inner = Moments(self.dictionary.d_in), Moments(self.dictionary.d_in)

        def batches() -> Iterator[tuple[Tensor, Any, SparseFeatures]]:
            for x, features in self._activations(sample, progress):
                raw.add(x)
                inner.add(to_inner(x, features.input_statistics))
                if raw.n - len(x) < n_baseline:  # the passes that they are measured on
                    yield x, features.input_statistics, features

        baselines = fit_baselines(batches(), self.dictionary.n_latents, self.seed)
        return (raw.mean, inner.mean), baselines

    def _splice(self, means: tuple[Tensor, Tensor], baselines: Baselines) -> dict[str, Any]:
        sample, s = self.spliced_text, self.settings
        tokens = splice_tokens(
            self.backbone,
            self.dictionary,
            self.site,
            sample.rows,
            mean=means[0],
            inner_mean=means[1],
            baselines={name: getattr(baselines, name) for name in _BASELINES},
            baseline_rows=len(sample.first(s.baseline_tokens).rows) if s.baseline_tokens else 0,
            tokens_per_pass=s.tokens_per_pass,
            progress=self._stage("splice", sample.n_tokens, "tokens"),
        )
        figures = overall_figures(tokens, sample, seed=self.seed, resamples=s.resamples)
        figures |= position_figures(tokens, sample) | kind_figures(tokens, sample)
        if s.baseline_tokens:
            figures |= baseline_figures(tokens, list(_BASELINES))
            figures["baseline_pca_components"] = min(baselines.k, self.dictionary.d_in)
            figures["baseline_pca_components_to_match"] = baselines.components_for(figures["nmse_normalized"])
        return figures

    def _features(self, baselines: Baselines) -> dict[str, Any]:
        """Densities, probes and explanations: one pass over the feature text serves all three."""
        sample, s, n_latents = self.feature_text, self.settings, self.dictionary.n_latents
        chunks = cut_chunks(sample, s.probe_chunk)
        tasks, builders = self._probe_builders(chunks)
        density = DensityCounter(n_latents)
        recorder = ActivationRecorder(n_latents, s.n2g_latents, self.seed)
        for x, features in self._activations(sample, self._stage("features", sample.n_tokens, "tokens")):
            done = density.n_tokens
            density.add(features)
            if s.n2g_latents:
                recorder.add(features)
            if tasks:
                inner = to_inner(x, features.input_statistics)
                random = baselines.random_features(x, features.input_statistics)
                for of_token, latent, neuron, random_latent in builders.values():
                    example = torch.from_numpy(of_token[done : done + len(x)]).to(x.device)
                    latent.add(features, example)
                    neuron.add_dense(inner, example)
                    random_latent.add(random, example)
        figures = density.figures()
        sources = ("latent", "neuron", "random_latent")
        examples: dict[str, dict[str, Any]] = {name: {} for name in sources}
        for level, (_, *of_level) in builders.items():
            for name, builder in zip(sources, of_level, strict=True):
                examples[name][level] = builder.build()
        if tasks:
            figures |= probe_figures(tasks, examples, self._stage("probes", len(tasks), "tasks"))
        del examples, builders  # the largest things here
        if s.n2g_latents:
            figures |= self._explain(recorder)
        return figures

    def _probe_builders(
        self, chunks: Chunks
    ) -> tuple[list[Task], dict[str, tuple[np.ndarray[Any, Any], ExampleBuilder, ExampleBuilder, ExampleBuilder]]]:
        """Tasks, and for each level the example of each token and what gathers latents, neurons and random latents."""
        sample, s = self.feature_text, self.settings
        if not s.probe_examples:
            return [], {}
        of_chunks = chunk_tasks(sample, chunks, s.probe_examples, self.seed)
        of_tokens, tokens = token_tasks(sample, _token_text(self.backbone), s.probe_examples, self.seed)
        example_of_token = np.full(sample.n_tokens, -1, np.int64)
        example_of_token[tokens] = np.arange(len(tokens))

        def builders(n_examples: int, length: int) -> tuple[ExampleBuilder, ExampleBuilder, ExampleBuilder]:
            latents, width = self.dictionary.n_latents, self.dictionary.d_in
            return (
                ExampleBuilder(n_examples, latents, length),
                ExampleBuilder(n_examples, width, length),
                ExampleBuilder(n_examples, latents, length),
            )

        levels = {}
        if of_chunks:
            levels["chunk"] = (chunks.of_token, *builders(len(chunks), s.probe_chunk))
        if of_tokens:
            levels["token"] = (example_of_token, *builders(len(tokens), 1))
        return of_chunks + of_tokens, levels

    def _explain(self, recorder: ActivationRecorder) -> dict[str, Any]:
        s = self.settings
        firings = recorder.firings()
        self.explanations, n_eligible = explain_latents(
            self.backbone,
            self.dictionary,
            self.site,
            self.feature_text,
            firings,
            end_of_text=encode_texts(self.backbone)[1],
            n_latents=s.n2g_latents,
            n_examples=s.n2g_examples,
            max_length=s.n2g_max_length,
            seed=self.seed,
            progress=self._stage("n2g", s.n2g_max_length, "token lengths"),
        )
        return n2g_figures(self.explanations, n_eligible, len(firings), seed=self.seed, resamples=s.resamples)

    def _single_tokens(self, baselines: Baselines) -> dict[str, Any]:
        """Ablations of single latents, and splices of single tokens; both in windows of equal length."""
        s = self.settings
        window = min(s.ablation_window, self.backbone.context_length)
        horizon = min(s.ablation_horizon, window - 1)
        figures: dict[str, Any] = {"ablation_window": window, "ablation_horizon": horizon}

        def windows(n: int, purpose: str) -> Sequence[Sequence[int]]:
            return choose_windows(self.spliced_text.rows, window, n, self.seed, purpose)

        if chosen := windows(s.ablation_positions, "ablation windows"):
            effects = ablation_sparsity(
                self.backbone,
                self.dictionary,
                self.site,
                chosen,
                horizon,
                latents_per_window=s.ablation_latents,
                baselines=baselines,
                seed=self.seed,
                tokens_per_pass=s.tokens_per_pass,
                progress=self._stage("ablation", len(chosen), "positions"),
            )
            figures |= {"ablation_positions": len(chosen)}
            figures |= ablation_figures(effects, seed=self.seed, resamples=s.resamples)
        if chosen := windows(s.single_splice_positions, "single splice windows"):
            spliced = splice_single_tokens(
                self.backbone,
                self.dictionary,
                self.site,
                chosen,
                window - horizon,
                tokens_per_pass=s.tokens_per_pass,
                progress=self._stage("single splice", len(chosen), "positions"),
            )
            figures |= {"single_splice_positions": len(chosen)}
            costs = {"delta_ce": spliced.delta_ce, "kl": spliced.divergence, "later_kl": spliced.later_divergence}
            for name, values in costs.items():
                figures |= with_interval(f"single_splice_{name}", values, seed=self.seed, resamples=s.resamples)
        return figures


def _token_text(backbone: Backbone) -> Any:
    """Text of a token. An incomplete character becomes U+FFFD, a special token the empty string."""
    special = encode_texts(backbone)[1]
    return lambda token: "" if token == special else backbone.token_bytes(token).decode("utf-8", "replace")
