"""The Ray instance that a training run uses: a private one on this machine, or a running cluster."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.local_ray import OBJECT_STORE_BYTES, TOKEN, StartError, ignore_signals, ray_is_silent, stop_ray

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in the configuration mean what they mean here
}
_LOCAL_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's default of 15 lets every other program on the machine go first
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away with a notice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",  # importing torch in all workers at once, on a busy machine
}


@dataclass(frozen=True)
class Distribution:
    """How a run is spread over workers."""

    workers: int
    """Number of processes. On GPUs, every process has a separate device."""
    latent_shards: int = 1
    """Number of shards of the latents; workers / latent_shards replicas share every batch."""
    max_restarts: int = 3
    """How often lost workers are replaced before the run fails."""
    ray_address: str | None = None
    """A running Ray cluster, which must see the same files; None: a private Ray instance."""


class TrainingFailed(Exception):
    """The run ended without a dictionary; the message says why. Its last checkpoint is kept."""


@contextlib.contextmanager
def ray_session(workers: int, gpus: int, *, address: str | None, verbose: bool) -> Iterator[None]:
    """Runs Ray for the time of a `with` block. Afterwards no process of a private instance is left, even after errors.

    Args:
        workers, gpus: resources of a private instance.
        address: a running cluster to use instead ("auto": the one on this machine).

    Raises:
        StartError: Ray does not start, or the cluster does not answer.
    """
    if "ray" in sys.modules and address is None:
        raise StartError("ray was imported before the environment of training was set")
    os.environ.update(_ENVIRONMENT)
    if address is not None:
        with _cluster(address, verbose=verbose), _quiet_stdout(verbose=verbose):
            yield
        return
    base = "/tmp" if Path("/tmp").is_dir() else None  # socket paths are short: see service.local_ray
    directory = Path(tempfile.mkdtemp(prefix="saeserve-train-", dir=base))
    os.environ.update(_LOCAL_ENVIRONMENT, **{TOKEN: secrets.token_hex(32)})
    try:
        try:
            with ray_is_silent(verbose=verbose):
                _start(workers, gpus, directory, verbose=verbose)
            with _quiet_stdout(verbose=verbose):
                yield
        finally:
            ignore_signals()
            with ray_is_silent(verbose=verbose):
                stop_ray()
    finally:
        ignore_signals()
        shutil.rmtree(directory, ignore_errors=True)


def _start(workers: int, gpus: int, directory: Path, *, verbose: bool) -> None:
    import ray

    _quieten(verbose=verbose)
    for last_try in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=workers,  # a count of places: a worker with few threads may share a core
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(directory),
            )
            return
        except Exception as error:
            # Ray gives its node 30 s to come up, a constant, which a busy machine can need the first time.
            if last_try or "timed out during startup" not in str(error):
                raise StartError(f"Ray does not start: {error}") from error
            stop_ray()


@contextlib.contextmanager
def _cluster(address: str, *, verbose: bool) -> Iterator[None]:
    import ray

    _quieten(verbose=verbose)
    try:
        ray.init(address=address, log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartError(f"no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet_stdout(*, verbose: bool) -> Iterator[None]:
    """Suppresses what Ray's threads print about lost workers at any log level; progress goes to standard error."""
    if verbose:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _quieten(*, verbose: bool) -> None:
    if not verbose:
        for name in ("ray", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
