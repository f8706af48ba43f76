"""Settings of the service: one typed object, filled from a YAML file, the environment and flags of the same names.

`AppSettings` are the settings of the application (`args` of a Serve config file). `ServeSettings` adds those with which
`saeserve serve` runs it on this machine: addresses, ports, limits of the ingress.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sae_runtime.settings import SettingsError, SettingValues, from_text, setting_fields
from service.replica import ReplicaSettings

ENVIRONMENT_PREFIX = "SAESERVE_"
NOT_SETTINGS = frozenset({"SAESERVE_ADDRESS"})
"""Variables of the client that have the same prefix."""


class AppSettings(ReplicaSettings):
    """The application: its replicas, and the model, dictionaries and limits of each."""

    replicas: int = Field(1, ge=1, description="Replicas of model and dictionaries, each a process.")
    cpus_per_replica: float = Field(1.0, ge=0, description="CPUs that Ray reserves for a replica (bookkeeping).")
    gpus_per_replica: float | None = Field(
        None,
        ge=0,
        description="GPUs of a replica; a fraction, such as 0.25, puts several replicas on one GPU. If not given: one, "
        "or an equal share of one if there are more replicas than GPUs; 0 if device is cpu or a numbered GPU.",
    )
    max_ongoing_requests: int = Field(
        256,
        ge=1,
        description="Calls that a replica takes at once, including those that wait in the engine's queue. "
        "Streams hold their place until they end.",
    )
    max_queued_requests: int = Field(
        1024,
        ge=-1,
        description="Calls that may wait in front of a replica that has max_ongoing_requests; -1: no bound. More calls "
        "get RESOURCE_EXHAUSTED from Ray, without RetryInfo, so the engine's own bounds should apply first.",
    )
    drain_s: float = Field(
        5.0, ge=0, description="Seconds that running calls get to end when the service or a replica stops."
    )
    metrics_dir: str = Field(
        "",
        description="Folder on each node where its replicas share their metrics, which is never emptied; "
        "if not given, a folder of each Ray session, in the system's folder for temporary files.",
    )

    @field_validator("dictionaries", mode="before")
    @classmethod
    def _list_in_text(cls, dictionaries: Any) -> Any:
        """Flags and the environment write a list as "a,b"."""
        if not isinstance(dictionaries, str) or dictionaries == "builtin":
            return dictionaries
        return [name.strip() for name in dictionaries.split(",") if name.strip()]

    @model_validator(mode="after")
    def _streams_leave_room(self) -> Self:
        generations = self.engine.max_concurrent_generations + self.engine.max_queued_generations
        if self.max_ongoing_requests <= generations:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) must exceed engine.max_concurrent_generations + "
                f"engine.max_queued_generations ({generations}), or generations block all other calls"
            )
        return self

    def share_gpus(self, gpus: float) -> Self:
        """These settings with `gpus_per_replica` decided for `gpus` GPUs, if it is not given.

        A replica's share is part of one GPU: three replicas on two GPUs get a half each.
        """
        if self.gpus_per_replica is not None:
            return self
        share = 0.0
        if gpus >= 1 and self.device in ("auto", "cuda"):
            replicas_of_a_gpu = math.ceil(self.replicas / int(gpus))
            share = math.floor(1e4 / replicas_of_a_gpu) / 1e4  # Ray counts in steps of 1e-4
        return self.model_copy(update={"gpus_per_replica": share})

    def replica_settings(self) -> ReplicaSettings:
        """The settings of one replica, with an equal share of the cores as torch threads if they are not set."""
        threads = self.engine.torch_threads or max(1, _cores() // self.replicas)
        values = {name: getattr(self, name) for name in ReplicaSettings.model_fields}
        values["engine"] = self.engine.model_copy(update={"torch_threads": threads})
        return ReplicaSettings(**values)


class ServeSettings(AppSettings):
    """`saeserve serve`: the application on this machine."""

    host: str = Field("127.0.0.1", description="Address to listen on for gRPC and HTTP; 0.0.0.0: all interfaces.")
    grpc_port: int = Field(9000, ge=1, le=65535, description="Port of the gRPC API.")
    http_port: int = Field(8000, ge=1, le=65535, description="Port of /metrics and /healthz.")
    ingress: Literal["auto", "haproxy", "serve"] = Field(
        "auto",
        description="What listens on the ports: haproxy in front of the replicas, or Ray Serve's own proxy "
        "(slower, and its gRPC port is open on all interfaces); auto: haproxy where it is installed.",
    )
    stream_grace_s: int = Field(
        600, ge=1, description="Seconds that streams on older connections may continue after replicas come or go."
    )
    max_message_bytes: int = Field(
        64 * 2**20, ge=2**20, le=2**31 - 1, description="Largest gRPC message, in and out, in bytes."
    )
    haproxy_metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of HAProxy's own Prometheus metrics, on all interfaces; 0: any free port."
    )
    start_timeout_s: float = Field(300.0, gt=0, description="Seconds until the service must be ready.")
    ray_dir: str = Field(
        "", description="Folder for Ray's session and logs, which is kept; if not given, a temporary one."
    )

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.grpc_port == self.http_port:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}")
        return self


def load_settings(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> ServeSettings:
    """Reads settings; flags win over the environment, the environment over the file.

    Args:
        file: a YAML mapping of settings, nested ones as mappings.
        flags: values by dotted name, such as {"engine.max_batch_tokens": "4096"}.
        environment: variables such as SAESERVE_GRPC_PORT and SAESERVE_ENGINE__MAX_BATCH_TOKENS; default: os.environ.

    Raises:
        SettingsError: an unknown name, a value that does not fit, a file that cannot be read.
    """
    values = SettingValues.of_file(file)
    known = {variable_of(name): (name, info) for name, info in setting_fields(ServeSettings)}
    for variable, value in (os.environ if environment is None else environment).items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in NOT_SETTINGS:
            continue
        if variable not in known:
            raise SettingsError(f"the environment variable {variable} is no setting (see saeserve serve --help)")
        name, info = known[variable]
        values.set(name, from_text(info, value), variable)
    values.set_flags(flags or {})
    return values.build(ServeSettings)


def variable_of(name: str) -> str:
    """The environment variable of a setting's dotted name."""
    return ENVIRONMENT_PREFIX + name.replace(".", "__").upper()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
