"""Settings: one object, filled from a file, the environment and flags under the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_runtime.settings import SettingsError, flag_of, setting_fields
from service.cli.main import _parser
from service.cli.parser import CommandParser
from service.cli.setting_flags import add_setting_flags, given_settings
from service.settings import AppSettings, ServeSettings, load_settings, variable_of


def test_defaults_listen_on_this_machine_only() -> None:
    settings = load_settings(environment={})
    assert (settings.host, settings.grpc_port, settings.http_port) == ("127.0.0.1", 9000, 8000)
    assert settings.backbone == "builtin"
    assert settings.dictionaries == "builtin"


def test_flags_win_over_the_environment_and_it_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "grpc_port: 1111\nhttp_port: 1112\nreplicas: 3\nengine:\n  max_batch_tokens: 7\n  batch_window_ms: 0\n"
    )
    settings = load_settings(
        file,
        {"grpc_port": "3333", "engine.max_batch_tokens": "9"},
        {"SAESERVE_GRPC_PORT": "2222", "SAESERVE_HTTP_PORT": "2223", "HOME": "/"},
    )
    assert (settings.grpc_port, settings.http_port, settings.replicas) == (3333, 2223, 3)
    assert (settings.engine.max_batch_tokens, settings.engine.batch_window_ms) == (9, 0)


def test_dictionaries_of_several_flags_are_gathered() -> None:
    def dictionaries(*line: str) -> object:
        parser, _ = _parser("serve")
        flags = given_settings(parser.parse_args(["serve", *line]), ServeSettings)
        return load_settings(flags=flags, environment={}).dictionaries

    assert dictionaries("--dictionaries", "a,b", "--dictionaries", "c", "d") == ("a", "b", "c", "d")
    assert dictionaries("--dictionaries", "builtin") == "builtin"


def test_every_setting_has_a_flag_a_variable_and_a_description() -> None:
    parser = CommandParser()
    add_setting_flags(parser, ServeSettings)
    for name, info in setting_fields(ServeSettings):
        assert info.description, name
        text = "none" if info.default is None else str(info.default)
        flags = given_settings(parser.parse_args([flag_of(name), text]), ServeSettings)
        assert flags == {name: None if info.default is None else text}
        assert load_settings(flags=flags, environment={}) == ServeSettings(), name
        assert load_settings(environment={variable_of(name): text}) == ServeSettings(), name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("builtin", "builtin"), ("resid-mid", ("resid-mid",)), ("a, b/c ,d", ("a", "b/c", "d"))],
)
def test_dictionaries_are_a_list_or_a_word(text: str, expected: object) -> None:
    assert load_settings(flags={"dictionaries": text}, environment={}).dictionaries == expected


@pytest.mark.parametrize(
    ("yaml", "environment", "message"),
    [
        ("grpc_prt: 9000", {}, r"grpc_prt: no such setting \(from .*settings.yaml\)"),
        ("engine: {max_tokens: 1}", {}, r"engine.max_tokens: no such setting \(from .*settings.yaml\)"),
        ("", {"SAESERVE_GRPC_PRT": "1"}, "environment variable SAESERVE_GRPC_PRT is no setting"),
        ("", {"SAESERVE_GRPC_PORT": "many"}, r"grpc_port: .*integer.*found 'many' \(from SAESERVE_GRPC_PORT\)"),
        ("replicas: 0", {}, r"replicas: .*greater than or equal to 1, found 0 \(from .*settings.yaml\)"),
        ("- a list", {}, "found list, expected a mapping of settings"),
        ("a: b: c", {}, "cannot read settings from"),
        ("grpc_port: 8000", {}, "grpc_port and http_port are both 8000"),
        ("max_ongoing_requests: 80", {}, r"max_ongoing_requests \(80\) must exceed .* \(80\)"),
    ],
)
def test_errors_name_the_setting_and_its_origin(
    tmp_path: Path, yaml: str, environment: dict[str, str], message: str
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml)
    with pytest.raises(SettingsError, match=message):
        load_settings(file, environment=environment)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read settings from .*no\.yaml"):
        load_settings(tmp_path / "no.yaml", environment={})


def test_threads_are_shared_out_over_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for replicas, threads in ((1, 8), (2, 4), (16, 1)):
        assert AppSettings(replicas=replicas).replica_settings().engine.torch_threads == threads
    chosen = load_settings(flags={"engine.torch_threads": "3", "replicas": "2"}, environment={})
    assert chosen.replica_settings().engine.torch_threads == 3


@pytest.mark.parametrize(
    ("replicas", "gpus", "share"),
    [(1, 0, 0.0), (1, 1, 1.0), (1, 8, 1.0), (2, 8, 1.0), (4, 1, 0.25), (3, 1, 0.3333), (3, 2, 0.5), (5, 4, 0.5)],
)
def test_gpus_are_shared_out_over_replicas(replicas: int, gpus: int, share: float) -> None:
    for device in ("auto", "cuda"):
        settings = AppSettings(replicas=replicas, device=device).share_gpus(gpus)
        assert settings.gpus_per_replica == share
        on_one_gpu = int(1 / share) if share else 0
        assert share == 0 or on_one_gpu * gpus >= replicas, "each replica's share is of one GPU"


def test_gpus_that_are_not_to_be_shared_out() -> None:
    assert AppSettings(replicas=2, gpus_per_replica=0.25).share_gpus(8).gpus_per_replica == 0.25
    assert AppSettings(gpus_per_replica=0).share_gpus(8).gpus_per_replica == 0
    for device in ("cpu", "cuda:1"):  # a numbered GPU is one of all that there are
        assert AppSettings(device=device).share_gpus(8).gpus_per_replica == 0
