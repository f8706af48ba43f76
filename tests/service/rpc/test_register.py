"""Every RPC of the protos has one handler, and its name is its own."""

from __future__ import annotations

import pytest

from service.replica import ReplicaSettings, ServiceRuntime
from service.rpc import register, servicers
from service.rpc.register import RPCS, build_handlers
from tests.builders import small_backbone
from tests.service.conftest import served_dictionaries

pytestmark = pytest.mark.any_cpu


def test_every_rpc_has_a_handler() -> None:
    runtime = ServiceRuntime(small_backbone(), served_dictionaries(), ReplicaSettings())
    assert set(build_handlers(runtime)) == set(RPCS)
    # Ray Serve routes by the method's name alone.
    assert len(RPCS) == sum(len(service.methods) for service in register._SERVICES)


def test_older_serve_config_files_find_the_services() -> None:
    assert servicers.add_services is register.add_services
