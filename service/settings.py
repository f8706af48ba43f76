"""Settings of the service: one typed object that a YAML file, the environment and flags fill under the same names.

`AppSettings` is what the application itself needs (`args` of a Serve config file); `ServeSettings` adds what
`saeserve serve` needs to run it on this machine: addresses, ports, limits of the ingress.
"""

from __future__ import annotations

import argparse
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from service.replica import ReplicaSettings

ENVIRONMENT_PREFIX = "SAESERVE_"
NOT_SETTINGS = frozenset({"SAESERVE_ADDRESS"})
"""Variables with the prefix that belong to the client."""


class SettingsError(ValueError):
    """Settings that cannot be used; the message names the setting and where it came from."""


class AppSettings(ReplicaSettings):
    """The application: its replicas and what each of them holds and bounds."""

    replicas: int = Field(1, ge=1, description="Replicas of model and dictionaries, each a process.")
    cpus_per_replica: float = Field(1.0, ge=0, description="CPUs that Ray reserves for a replica (bookkeeping).")
    gpus_per_replica: float = Field(
        0.0, ge=0, description="GPUs of a replica; a fraction puts several replicas on one GPU, such as 0.25."
    )
    max_ongoing_requests: int = Field(
        256,
        ge=1,
        description="Calls that run at once in a replica, waiting ones in the engine's queue included. "
        "Streams hold their place until they end.",
    )
    max_queued_requests: int = Field(
        1024,
        ge=-1,
        description="Calls that may wait in front of a replica once max_ongoing_requests run; -1: no bound. Beyond it "
        "Ray answers RESOURCE_EXHAUSTED without RetryInfo, so the engine's own bounds should be met first.",
    )
    drain_s: float = Field(5.0, ge=0, description="Seconds that a replica which stops gives its running calls to end.")
    metrics_dir: str = Field(
        "",
        description="Folder on each node where its replicas share their metrics, emptied by nobody; "
        "empty: one for each Ray session in the folder for temporary files.",
    )

    @model_validator(mode="after")
    def _streams_leave_room(self) -> Self:
        generations = self.engine.max_concurrent_generations + self.engine.max_queued_generations
        if self.max_ongoing_requests <= generations:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) must exceed engine.max_concurrent_generations + "
                f"engine.max_queued_generations ({generations}), or generations keep every other call out"
            )
        return self

    def replica_settings(self) -> ReplicaSettings:
        """What one replica needs; torch threads are shared out over the replicas where they are not set."""
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
        600, ge=1, description="After replicas come or go, seconds that streams on older connections may go on."
    )
    max_message_bytes: int = Field(
        64 * 2**20, ge=2**20, le=2**31 - 1, description="Largest gRPC message, in and out, in bytes."
    )
    haproxy_metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of HAProxy's own Prometheus metrics, on all interfaces; 0: any free one."
    )
    start_timeout_s: float = Field(300.0, gt=0, description="Longest time until the service must be ready.")
    ray_dir: str = Field("", description="Folder for Ray's session and logs, kept; empty: a temporary one, removed.")

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
        flags: values by dotted name, such as {"engine.max_batch_tokens": "4096"}; None values count as not given.
        environment: variables such as SAESERVE_GRPC_PORT and SAESERVE_ENGINE__MAX_BATCH_TOKENS; default: os.environ.

    Raises:
        SettingsError: an unknown name, a value that does not fit, a file that cannot be read.
    """
    values: dict[str, Any] = _read_yaml(file) if file is not None else {}
    origins = {name: str(file) for name in _leaves(values)}
    for name, value in _from_environment(os.environ if environment is None else environment):
        _assign(values, name, value)
        origins[name] = _variable(name)
    for name, value in (flags or {}).items():
        if value is not None:
            _assign(values, name, value)
            origins[name] = flag_of(name)
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem, origins) for problem in error.errors())) from None


def setting_fields(model: type[BaseModel] = ServeSettings, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting as (dotted name, default, description), nested ones by their leaves."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from setting_fields(inner, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield prefix + name, default, field.description or ""


def add_setting_flags(parser: argparse._ActionsContainer) -> None:
    """Adds one flag for every setting, --engine.max-batch-tokens for engine.max_batch_tokens."""
    for name, default, description in setting_fields():
        shown = description or name.rpartition(".")[2].replace("_", " ").capitalize() + "."
        parser.add_argument(
            flag_of(name),
            dest=name,
            metavar="VALUE",
            default=None,
            nargs="+" if name in _LISTS else None,
            help=f"{shown} [{_shown(default)}]".replace("%", "%%"),
        )


def flag_of(name: str) -> str:
    """The flag of a setting's dotted name."""
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.replace(".", "__").upper()


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    known = {_variable(name): name for name, _, _ in setting_fields()}
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in NOT_SETTINGS:
            continue
        if variable not in known:
            raise SettingsError(f"the environment variable {variable} is no setting (see saeserve serve --help)")
        yield known[variable], value


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    """Sets a dotted name. Text becomes a list where the setting is one ("a,b"), unless it is one of its fixed words."""
    if name in _LISTS:
        texts = [value] if isinstance(value, str) else value
        items = [item.strip() for text in texts for item in text.split(",") if item.strip()]
        value = items[0] if len(items) == 1 and items[0] in _LISTS[name] else items
    *parents, leaf = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[leaf] = value


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read settings from {file}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold a mapping of settings, not a {type(values).__name__}")
    return values


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def _explain(problem: Any, origins: Mapping[str, str]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        message = "no such setting"
    elif problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
    else:
        message = f"{problem['msg']}, not {problem['input']!r}"
    origin = origins.get(name)
    return ": ".join(part for part in (name, message) if part) + (f" (from {origin})" if origin else "")


def _shown(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return ",".join(str(item) for item in default)
    return "empty" if default == "" else str(default)


def _list_settings() -> Iterator[tuple[str, frozenset[str]]]:
    """Settings that are lists, each with the fixed words that it takes instead ("builtin")."""
    for name, field in ServeSettings.model_fields.items():
        is_union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
        parts = typing.get_args(field.annotation) if is_union else (field.annotation,)
        origins = [typing.get_origin(part) for part in parts]
        if tuple in origins or list in origins:
            words = (typing.get_args(part) for part in parts if typing.get_origin(part) is Literal)
            yield name, frozenset(word for group in words for word in group)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LISTS = dict(_list_settings())
