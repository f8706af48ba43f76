"""What a replica counts, for Prometheus.

Replicas are separate processes behind one HTTP port. With PROMETHEUS_MULTIPROC_DIR in the environment before this
module is imported (one directory a node, shared by its replicas), each writes its values to files there and `render`
merges them all: whichever replica a scrape reaches, it speaks for the node. Without the variable a process speaks for
itself.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from sae_runtime.version import installed_version

_LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_WAIT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_MAX_DICTIONARY_LABELS = 100

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"


class Metrics:
    """The metrics of one replica; also the engine's observer."""

    def __init__(self) -> None:
        self._directory = _multiprocess_directory()
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            forget_dead_processes(self._directory)
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "saeserve_requests", "Calls by RPC and status code.", ["rpc", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "saeserve_request_seconds",
            "Seconds from a call's arrival in the replica to its end.",
            ["rpc"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "saeserve_queue_seconds",
            "Seconds that work waited for its first batch.",
            ["kind"],
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.batch_tokens = Histogram(
            "saeserve_batch_tokens",
            "Tokens (rows, for encode and decode) in a batch.",
            ["kind"],
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "saeserve_batch_seconds", "Seconds of a batch.", ["kind"], buckets=_WAIT_BUCKETS, registry=registry
        )
        self.tokens = Counter(
            "saeserve_tokens", "Tokens (rows, for encode and decode) run.", ["kind"], registry=registry
        )
        # live*: processes that are gone no longer count.
        self.queue_tokens = Gauge(
            "saeserve_queue_tokens", "Tokens that wait.", registry=registry, multiprocess_mode="livesum"
        )
        self.active_generations = Gauge(
            "saeserve_active_generations", "Generations that run.", registry=registry, multiprocess_mode="livesum"
        )
        self.dictionaries = Gauge(
            "saeserve_dictionaries", "Dictionaries that are loaded.", registry=registry, multiprocess_mode="livemax"
        )
        self.dictionary_info = Gauge(
            "saeserve_dictionary_info",
            "Replicas that have the dictionary loaded.",
            ["dictionary", "site"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.build_info = Gauge(
            "saeserve_build_info",
            "Replicas by version.",
            ["version", "python", "torch", "ray"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        versions = {name: installed_version(name) or "unknown" for name in ("saeserve", "torch", "ray")}
        self.build_info.labels(versions["saeserve"], platform.python_version(), versions["torch"], versions["ray"]).set(
            1
        )

    def call_done(self, rpc: str, code: str, seconds: float) -> None:
        """One call ended with a status code, such as "OK"."""
        self.requests.labels(rpc, code).inc()
        self.request_seconds.labels(rpc).observe(seconds)

    features = None
    """EngineObserver: features are not counted."""

    def batch_done(self, kind: str, items: int, tokens: int, seconds: float) -> None:
        """EngineObserver: a batch ran."""
        self.batch_tokens.labels(kind).observe(tokens)
        self.batch_seconds.labels(kind).observe(seconds)
        self.tokens.labels(kind).inc(tokens)

    def waited(self, kind: str, seconds: float) -> None:
        """EngineObserver: work waited for its first batch."""
        self.queue_seconds.labels(kind).observe(seconds)

    def queue_is(self, tokens: int, generations: int) -> None:
        """The engine's load now."""
        self.queue_tokens.set(tokens)
        self.active_generations.set(generations)

    def loaded(self, sites: Mapping[str, str]) -> None:
        """The dictionaries that are loaded: their sites by name. At most 100 of them get a label."""
        self.dictionaries.set(len(sites))
        for name in sorted(sites)[:_MAX_DICTIONARY_LABELS]:
            self.dictionary_info.labels(name, sites[name]).set(1)

    def render(self) -> bytes:
        """The text of /metrics: this process's values, or those of all that share the directory."""
        if self._directory is None:
            return generate_latest(self._registry)
        forget_dead_processes(self._directory)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(self._directory))  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_dead_processes(directory: Path) -> None:
    """Removes the live gauges of processes that no longer run; what they counted stays."""
    for pid in _processes(path.name for path in directory.glob("gauge_live*.db")):
        if not _runs(pid):
            multiprocess.mark_process_dead(pid, path=str(directory))  # type: ignore[no-untyped-call]


def _processes(file_names: Iterable[str]) -> set[int]:
    matches = (re.search(r"_(\d+)\.db$", name) for name in file_names)
    return {int(match[1]) for match in matches if match}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _multiprocess_directory() -> Path | None:
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(directory) if directory else None
