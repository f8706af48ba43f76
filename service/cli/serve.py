"""`saeserve serve`: the service on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.cli.setting_flags import add_setting_flags, given_settings, settings_errors
from service.drain import drain
from service.haproxy import forwards_to_replicas
from service.local_ray import StartError, check_ports, local_ray, ray_is_silent, uses_haproxy
from service.settings import ServeSettings, load_settings

APP_NAME = "saeserve"
_POLL_S = 0.1
_WATCH_S = 5.0


class _Stop(BaseException):
    """A signal asked the service to stop. A BaseException, so that no handler on its way swallows it."""


_STOPPED = (_Stop, KeyboardInterrupt, SystemExit)  # Ray turns _Stop into one of the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve a backbone and its dictionaries on this machine until Ctrl-C. Every setting can also be given in a "
        "YAML file or in the environment (grpc_port: SAESERVE_GRPC_PORT, engine.max_batch_tokens: "
        "SAESERVE_ENGINE__MAX_BATCH_TOKENS); flags win over the environment, the environment over the file."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings.")
    parser.add_argument("--verbose", action="store_true", help="Show the logs of Ray and of the replicas.")
    add_setting_flags(parser, ServeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Serves until stopped.

    Returns:
        The exit code: 0 after Ctrl-C or SIGTERM, 1 if the service could not start or has died.
    """
    verbose: bool = arguments.verbose
    with settings_errors():
        settings = load_settings(arguments.config, given_settings(arguments, ServeSettings))
    try:
        check_ports(settings)
        deadline = time.monotonic() + settings.start_timeout_s
        _stop_on_signals()
        with local_ray(settings, verbose=verbose) as directory:
            _stop_on_signals()  # again: ray.init sets its own handler
            with _progress("starting saeserve", quiet=verbose), ray_is_silent(verbose=verbose):
                metrics_dir = settings.metrics_dir or str(directory / "metrics")
                settings = settings.model_copy(update={"metrics_dir": metrics_dir})
                device, notes = _start(settings, directory, deadline)
            for note in notes:
                print(f"saeserve: {note}", file=sys.stderr)
            print(_ready_line(settings, device), flush=True)
            try:
                _watch()
            except _STOPPED:
                _drain(directory, settings.drain_s, verbose=verbose)
        return 0
    except _STOPPED:  # before it was ready
        return 0
    except StartError as error:
        print(f"saeserve: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # from Ray: many kinds, with the tracebacks of several processes
        if verbose:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"saeserve: {lines[-1] if lines else error!r} (--verbose shows more)", file=sys.stderr)
        return 1


def _start(settings: ServeSettings, directory: Path, deadline: float) -> tuple[str, list[str]]:
    """Deploys the application and waits until it answers calls. Returns the device of a replica, and what it noted.

    Raises:
        StartError: a replica failed, there are too few GPUs, or the start took too long.
    """
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from service.app import SERVICER_FUNCTIONS, build_app

    gpus: float = ray.cluster_resources().get("GPU", 0.0)
    settings = settings.share_gpus(gpus)
    assert settings.gpus_per_replica is not None
    needed_gpus = settings.replicas * settings.gpus_per_replica
    if needed_gpus > gpus:
        raise StartError(
            f"replicas ({settings.replicas}) x gpus_per_replica ({settings.gpus_per_replica:g}) needs {needed_gpus:g} "
            f"GPUs; this machine has {gpus:g}"
        )
    serve.start(
        http_options=HTTPOptions(host=settings.host, port=settings.http_port),
        grpc_options=gRPCOptions(port=settings.grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS)),
    )
    target = serve.RunTarget(target=build_app(settings), name=APP_NAME)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _await_running(deadline)
    device, notes = _await_serving(settings, directory, deadline)
    return f"{device}, {settings.gpus_per_replica:g} GPU a replica" if settings.gpus_per_replica else device, notes


def _await_running(deadline: float) -> None:
    """Waits until Ray Serve runs the application.

    Raises:
        StartError: a replica failed, or the deadline has passed.
    """
    from ray import serve

    while True:
        status = serve.status().applications.get(APP_NAME)
        if status is not None:
            if status.status == "RUNNING":
                return
            messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
            failure = next(filter(None, map(_start_failure, messages)), None)
            if failure is None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                failure = max(messages, key=len)
            if failure is not None:
                raise StartError(failure)
        if time.monotonic() > deadline:
            raise StartError(
                "the replicas did not start in time; raise --start-timeout-s, or see their logs with --verbose"
            )
        time.sleep(_POLL_S)


def _start_failure(message: str) -> str | None:
    """Our own message inside the traceback that Ray reports, if there is one."""
    from service.app import START_FAILURE

    if START_FAILURE not in message:
        return None
    _, _, failure = message.partition(START_FAILURE)
    return failure.partition("\n")[0].strip()


def _await_serving(settings: ServeSettings, directory: Path, deadline: float) -> tuple[str, list[str]]:
    """Waits until replicas answer on the clients' port. Returns the device of one, and its notes.

    Behind HAProxy they must answer without Ray Serve's own proxy, which would lose the status of streams that fail.

    Raises:
        StartError: the deadline has passed.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from service.pb.saeserve.v1 import server_service_pb2, server_service_pb2_grpc

    with grpc.insecure_channel(_address(settings, settings.grpc_port)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                is_direct = not uses_haproxy(settings) or forwards_to_replicas(directory)
                if reply.status == health_pb2.HealthCheckResponse.SERVING and is_direct:
                    server = server_service_pb2_grpc.ServerServiceStub(channel)
                    info = server.GetServerInfo(server_service_pb2.GetServerInfoRequest(), timeout=5)
                    return info.device, list(info.notes)
                answer = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
            except grpc.RpcError as error:
                answer = error.code().name
            if time.monotonic() > deadline:
                raise StartError(
                    f"port {settings.grpc_port} does not lead to replicas in time; the health check answers {answer}"
                )
            time.sleep(_POLL_S)


def _watch() -> None:
    """Waits until a signal raises an exception.

    Raises:
        StartError: Ray has stopped.
    """
    from ray import serve

    while True:
        time.sleep(_WATCH_S)
        try:
            serve.status()
        except Exception as error:
            raise StartError(f"Ray has stopped: {error}") from None


def _drain(directory: Path, drain_s: float, *, verbose: bool) -> None:
    """Lets running calls end, until `drain_s` seconds have passed or another signal comes."""
    if drain_s == 0:
        return
    signals: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: signals.append(number))
    message = f"waiting up to {drain_s:g} s for running calls (Ctrl-C: stop now)"
    with _progress(message, quiet=verbose), ray_is_silent(verbose=verbose):
        drain(directory, drain_s, stop_now=lambda: bool(signals))


def _ready_line(settings: ServeSettings, device: str) -> str:
    grpc_address = _address(settings, settings.grpc_port)
    default = ServeSettings.model_fields["grpc_port"].default == settings.grpc_port
    call = 'saeserve features "some text"' + ("" if default else f" --address {grpc_address}")
    http_address = _address(settings, settings.http_port)
    slow = "" if uses_haproxy(settings) else " [Ray Serve's own proxy; HAProxy is not used]"
    return (
        f"saeserve is ready on {device}{slow}: gRPC {grpc_address}, HTTP http://{http_address}. "
        f"Try: {call}   (Ctrl-C stops)"
    )


def _address(settings: ServeSettings, port: int) -> str:
    """The address at which this machine reaches a port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    return f"{host}:{port}"


def _stop_on_signals() -> None:
    """Makes the first SIGINT or SIGTERM raise _Stop in the main thread. Later ones are ignored."""

    def stop(signum: int, frame: Any) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        raise _Stop

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)


@contextlib.contextmanager
def _progress(message: str, *, quiet: bool) -> Iterator[None]:
    """Shows a spinner while the block runs, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(message):
        yield
