"""deploy/: the Serve config fits Ray Serve's schema and our settings, and knows every default that it states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from service.app import SERVICER_FUNCTIONS, build_app
from service.settings import AppSettings

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    return loaded


def test_serve_config_fits_ray_serves_schema(config: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(config)
    [application] = schema.applications
    assert application.import_path == "service.app:build_app"
    assert list(schema.grpc_options.grpc_servicer_functions) == list(SERVICER_FUNCTIONS)


def test_build_app_takes_its_args(config: dict[str, Any]) -> None:
    args = config["applications"][0]["args"]
    deployment = build_app(args)._bound_deployment
    settings = AppSettings.model_validate(args)
    assert deployment.name == "FeatureServer"
    assert deployment.num_replicas == settings.replicas
    assert deployment.max_ongoing_requests == settings.max_ongoing_requests == 256
    assert deployment.max_queued_requests == settings.max_queued_requests
    assert deployment.ray_actor_options["num_gpus"] == 0
    with pytest.raises(ValidationError, match="grpc_port"):
        build_app(args | {"grpc_port": 9000})


def test_ingress_class_has_every_rpc() -> None:
    from service.rpc.register import RPCS

    server = build_app({})._bound_deployment.func_or_class
    for name in RPCS:
        assert callable(getattr(server, name))


def test_prometheus_scrapes_the_ports_that_the_service_has() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert {job["static_configs"][0]["targets"][0] for job in jobs} == {"127.0.0.1:8000", "127.0.0.1:9101"}
