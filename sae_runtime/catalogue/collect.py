"""The pass over the text: every collector sees every token once. It can be interrupted and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sae_runtime.atomic import atomic_file
from sae_runtime.catalogue.contexts import ContextCollector
from sae_runtime.catalogue.firings import Firings
from sae_runtime.catalogue.rates import FiringRates
from sae_runtime.catalogue.row_sample import RowSampler
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.catalogue.text import Text, TextPass, TextReader
from sae_runtime.catalogue.token_sums import TokenSums
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.statistics import LatentStatistics, LatentStatisticsBuilder
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.progress import ProgressMeter

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

_HEADER = "header"
_INNER_QUANTILES = (0.05, 0.95)
"""Quantiles of the statistics beyond these part no contexts: the strongest have a kind of their own."""


class Collector(Protocol):
    """What is gathered, as arrays that a checkpoint holds."""

    def state(self) -> dict[str, Array]: ...

    def load(self, state: Mapping[str, Array]) -> None: ...


class Collection:
    """All that one pass over the text gathers."""

    def __init__(
        self,
        backbone: Backbone,
        dictionary: Dictionary,
        statistics: LatentStatistics,
        companions: Integers,
        settings: CatalogueSettings,
    ) -> None:
        levels = statistics.quantile_levels
        inner = (levels >= _INNER_QUANTILES[0]) & (levels <= _INNER_QUANTILES[1])
        n_latents, vocab_size = dictionary.n_latents, backbone.vocab_size
        assert settings.context_length is not None
        self.text = Text(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.rates = FiringRates(statistics.max.numpy(), settings.histogram_bins, settings.context_length)
        self.contexts = ContextCollector(statistics.quantiles[:, inner].numpy(), companions, settings)
        self.token_sums = TokenSums(n_latents, vocab_size, settings.token_pairs)
        self.rows = RowSampler(n_latents, settings.sample_tokens, settings.seed)

    @property
    def collectors(self) -> dict[str, Collector]:
        return {"rates": self.rates, "contexts": self.contexts, "tokens": self.token_sums, "rows": self.rows}

    def add(self, firings: Firings, text: TextPass) -> None:
        self.rates.add(firings, text, self.text.documents)
        self.contexts.add(firings, text)
        self.token_sums.add(firings.latent, text.ids[firings.token], firings.value, text.ids)
        self.rows.add(firings, text)

    def state(self) -> dict[str, Array]:
        return {f"{name}/{key}": a for name, c in self.collectors.items() for key, a in c.state().items()}

    def load(self, state: Mapping[str, Array]) -> None:
        for name, collector in self.collectors.items():
            prefix = f"{name}/"
            collector.load({key.removeprefix(prefix): a for key, a in state.items() if key.startswith(prefix)})


def measure_first(backbone: Backbone, dictionary: Dictionary, reader: TextReader) -> LatentStatistics:
    """Statistics on the first `statistics_tokens` tokens, for a dictionary that has none. ValueError: no text."""
    builder = LatentStatisticsBuilder(dictionary.n_latents)
    for passed in reader.passes(Text(np.uint32), min(reader.settings.statistics_tokens, reader.settings.tokens)):
        builder.add(_encode(backbone, dictionary, passed))
    return builder.build()


@torch.no_grad()
def collect(
    collection: Collection,
    backbone: Backbone,
    dictionary: Dictionary,
    reader: TextReader,
    checkpoint: Path,
    identity: Mapping[str, Any],
    progress: ProgressMeter,
) -> None:
    """Reads the text and fills the collection.

    Where `checkpoint` is of the same `identity` and the same text, its part of the text is tokenized again, which is
    quick, and not run again. The result has the same bits as that of a run without a break. Any other checkpoint is
    written over.
    """
    stopped = _Checkpoint.read(checkpoint, identity)
    passes, digest = reader.passes(collection.text), hashlib.sha256()
    progress.begin("text", reader.settings.tokens)
    if stopped is not None:
        for passed in passes:
            digest.update(passed.ids.tobytes())
            progress.reach(collection.text.n_tokens)
            if collection.text.n_tokens >= stopped.n_tokens:
                break
        if (collection.text.n_tokens, digest.hexdigest()) == (stopped.n_tokens, stopped.text_hash):
            collection.load(stopped.arrays)
        else:  # the text is another one by now
            collection.text = Text(collection.text.id_dtype)
            passes, digest = reader.passes(collection.text), hashlib.sha256()
            stopped = None
    saved, saved_at = stopped.n_tokens if stopped is not None else 0, time.monotonic()
    for passed in passes:
        digest.update(passed.ids.tobytes())
        collection.add(Firings.of(_encode(backbone, dictionary, passed), passed.is_text), passed)
        if time.monotonic() - saved_at >= 60 * reader.settings.checkpoint_minutes:
            saved = collection.text.n_tokens
            _Checkpoint(saved, digest.hexdigest(), collection.state()).write(checkpoint, identity)
            saved_at = time.monotonic()
        progress.reach(collection.text.n_tokens)
    if saved < collection.text.n_tokens:  # what follows the pass can be interrupted, too
        _Checkpoint(collection.text.n_tokens, digest.hexdigest(), collection.state()).write(checkpoint, identity)
    progress.begin("text", collection.text.n_tokens, done=collection.text.n_tokens)  # there may be less than wanted


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """A collection after a part of the text."""

    n_tokens: int
    text_hash: str
    """sha256 of the token ids so far."""
    arrays: Mapping[str, Array]

    @classmethod
    def read(cls, path: Path, identity: Mapping[str, Any]) -> _Checkpoint | None:
        """The checkpoint of that identity; None if there is none, or none that can be read."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file[_HEADER]))
                if header["identity"] != json.loads(json.dumps(identity)):
                    return None
                return cls(header["n_tokens"], header["text_hash"], {k: file[k] for k in file.files if k != _HEADER})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def write(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Raises OSError if it cannot be written; what was at `path` is then as it was."""
        header = {"identity": identity, "n_tokens": self.n_tokens, "text_hash": self.text_hash}
        with atomic_file(path) as file:
            np.savez(file, **{_HEADER: np.array(json.dumps(header)), **self.arrays})  # type: ignore[arg-type]


def _encode(backbone: Backbone, dictionary: Dictionary, passed: TextPass) -> Any:
    site = dictionary.require_site()
    return dictionary.encode(backbone.forward(PackedTokens.from_rows(passed.rows), capture=[site]).activations[site])
