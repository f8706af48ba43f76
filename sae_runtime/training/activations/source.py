"""Activations that a training run reads: text or tokens through the backbone, shuffled, at several sites at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.cache import ActivationCache
from sae_runtime.training.activations.reader import ActivationReader, ThreadedReader
from sae_runtime.training.activations.run_rows import data_fingerprint, row_cutter, training_rows
from sae_runtime.training.activations.shuffle import ShuffleBuffer
from sae_runtime.training.activations.streams import RowStreams
from sae_runtime.training.communicator import SINGLE, Communicator
from sae_runtime.training.config import TrainingConfig


def open_activation_source(
    config: TrainingConfig,
    backbone: Backbone,
    sites: Sequence[Site | str],
    communicator: Communicator | None = None,
    bad: BadDocuments | None = None,
) -> ActivationSource:
    """The activations that a worker trains on, from the beginning of the data.

    Args:
        sites: read together in one pass over the model.
        communicator: which of the run's workers this is; a single process if None.
        bad: takes note of documents that are skipped.

    Raises:
        FileNotFoundError: a data file does not exist.
        ValueError: the data, a site or the context length does not fit the backbone, or the streams cannot be shared
            equally by the workers.
    """
    communicator = SINGLE if communicator is None else communicator
    checked = [backbone.check_site(site) for site in sites]
    cutter = row_cutter(config, backbone)
    workers = communicator.data_parallel_size * communicator.n_shards
    if config.n_streams % workers:
        raise ValueError(
            f"{config.n_streams} data streams cannot be shared equally by {workers} workers "
            f"({communicator.data_parallel_size} data ranks × {communicator.n_shards} latent shards); "
            "set data_lanes to a multiple of the workers that divides batch_tokens"
        )
    per_worker = config.n_streams // workers
    first = (communicator.data_rank * communicator.n_shards + communicator.shard_rank) * per_worker
    mine = range(first, first + per_worker)
    rows_per_pass = max(1, config.backbone_tokens // cutter.context_length)
    streams = RowStreams(
        training_rows(config, backbone, bad),
        n_streams=config.n_streams,
        mine=mine,
        rows_per_pass=rows_per_pass,
        skip_first=config.prepend_end_of_text,
    )
    reader: ActivationReader
    cache, skip_first = _cache(config, backbone, checked), config.prepend_end_of_text
    if config.overlap == "on" or (config.overlap == "auto" and torch.device(config.device) != backbone.device):
        # A refill takes half of a buffer at once: so much is read while the other half is trained on.
        half = config.buffer_tokens // config.n_streams // 2
        ahead = max(1, math.ceil(half / (rows_per_pass * cutter.context_length)))
        reader = ThreadedReader(backbone, checked, streams, skip_first=skip_first, cache=cache, names=mine, ahead=ahead)
    else:
        reader = ActivationReader(backbone, checked, streams, skip_first=skip_first, cache=cache)
    return ActivationSource(config, checked, reader, mine, communicator)


def _cache(config: TrainingConfig, backbone: Backbone, sites: Sequence[Site]) -> ActivationCache | None:
    if config.cache is None:
        return None
    return ActivationCache(
        config.cache,
        backbone,
        sites,
        dtype=backbone.dtype if config.cache_dtype is None else getattr(torch, config.cache_dtype),
        max_bytes=int(config.cache_gb * 1e9),
        skip_first=config.prepend_end_of_text,
    )


class ActivationSource:
    """Shuffled activations of one worker, at several sites.

    The text is dealt to `data_lanes` streams, each with its own shuffle buffer and a random generator seeded by the
    stream's number; a batch has the same number of tokens from every stream. Each replica of a run (data rank) has an
    equal part of the streams, so all replicas together give the batches that a single process gives (its parts one
    after the other). The latent shards of a replica each read a part of its streams and exchange the activations, so
    `next_batch` and `peek` are meetings of them.

    Not for several threads. A call that an exception ends (Ctrl-C included) leaves the position undefined: take
    `state_dict` between calls only.
    """

    def __init__(
        self,
        config: TrainingConfig,
        sites: Sequence[Site],
        reader: ActivationReader,
        streams: Sequence[int],
        communicator: Communicator,
    ) -> None:
        """Use `open_activation_source`."""
        self.sites = tuple(sites)
        self._config = config
        self._reader = reader
        self._streams = streams
        self._communicator = communicator
        self._fingerprint = data_fingerprint(config)
        self._buffers = {
            stream: ShuffleBuffer(
                _StreamPasses(reader, stream),
                config.buffer_tokens // config.n_streams,
                seed=config.seed * config.n_streams + stream,
                device=config.device,
            )
            for stream in streams
        }

    def next_batch(self, size: int) -> dict[Site, Tensor]:
        """The next [size, width] of each site, on the training device, in the backbone's dtype or that of the cache.

        Args:
            size: tokens of this replica: batch_tokens / data_parallel_size. The same for every call.

        Raises:
            ValueError: size is not a multiple of the replica's streams, or over half of their buffers; there is no
                text.
        """
        n_streams = len(self._streams) * self._communicator.n_shards
        if size < 1 or size % n_streams:
            raise ValueError(f"a batch of {size} tokens cannot be read equally from {n_streams} data streams")
        return self._joined([buffer.next_batch(size // n_streams) for buffer in self._buffers.values()])

    def peek(self, size: int) -> dict[Site, Tensor]:
        """Up to `size` of the tokens that come next, equally many of every stream of the replica, without taking them.

        Raises:
            ValueError: there is no text.
        """
        n_streams = len(self._streams) * self._communicator.n_shards
        return self._joined([buffer.peek(max(1, size // n_streams)) for buffer in self._buffers.values()])

    def state_dict(self) -> dict[str, Any]:
        """The exact position of this worker's streams. The tensors are not copied: save them before the next batch.

        The states of several workers go together with `merge_source_states`; every worker may load the whole, so a run
        may go on with another number of workers.
        """
        streams = {
            str(stream): {"rows": self._reader.state_of(stream), "buffer": self._buffers[stream].state_dict()}
            for stream in self._streams
        }
        # Checkpoints call streams lanes.
        return {"data": self._fingerprint, "n_lanes": self._config.n_streams, "lanes": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken.

        Raises:
            ValueError: the state is of other data or another number of streams, or lacks streams of this worker.
        """
        if self._fingerprint not in ("", state["data"]):
            raise ValueError(
                f"the state was taken from data of fingerprint {state['data']}, this run's has {self._fingerprint}: "
                "files were changed"
            )
        if state["n_lanes"] != self._config.n_streams:
            raise ValueError(f"the state is of {state['n_lanes']} data streams, this run has {self._config.n_streams}")
        missing = [stream for stream in self._streams if str(stream) not in state["lanes"]]
        if missing:
            held = ", ".join(state["lanes"])
            raise ValueError(f"the state holds data streams {held}; stream {missing[0]} is missing")
        self._reader.load({stream: state["lanes"][str(stream)]["rows"] for stream in self._streams})
        for stream, buffer in self._buffers.items():
            buffer.load_state_dict(state["lanes"][str(stream)]["buffer"])

    def close(self) -> None:
        """Ends the thread that reads ahead, if there is one; the source cannot be used afterwards."""
        self._reader.close()

    def _joined(self, batches: list[dict[Site, Tensor]]) -> dict[Site, Tensor]:
        joined = {
            site: torch.cat([batch[site] for batch in batches]) if len(batches) > 1 else batches[0][site]
            for site in self.sites
        }
        if self._communicator.n_shards > 1:
            joined = {site: self._communicator.gather_over_shards(x).flatten(0, 1) for site, x in joined.items()}
        return joined


class _StreamPasses(Iterator[dict[Site, Tensor]]):
    """The passes of one stream: an iterator that goes on after an error, unlike a generator."""

    def __init__(self, reader: ActivationReader, stream: int) -> None:
        self._reader = reader
        self._stream = stream

    def __next__(self) -> dict[Site, Tensor]:
        return self._reader.next_pass(self._stream)


def merge_source_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all workers of a run into one that every worker can load."""
    streams = {stream: state_of_stream for state in states for stream, state_of_stream in state["lanes"].items()}
    return {**states[0], "lanes": dict(sorted(streams.items(), key=lambda item: int(item[0])))}
