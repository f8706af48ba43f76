import io
import subprocess
import sys
from collections.abc import Callable

import pytest

from service.cli import main as main_module
from service.cli.main import COMMANDS, main
from tests.service.client.fake_server import Running

Saeserve = Callable[..., tuple[int, str, str]]


def test_help_lists_the_commands_and_imports_nothing_heavy():
    script = (
        "import sys; from service.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'grpc', 'numpy', 'rich', 'pydantic'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.rstrip().endswith("[]")
    for command in COMMANDS:
        assert f"    {command} " in output


def test_commands_that_call_a_server_need_no_torch_and_no_ray():
    script = (
        "import sys, importlib\n"
        "for name in ('features', 'generate', 'dictionaries', 'info'): importlib.import_module(f'service.cli.{name}')\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_for_every_option(saeserve: Saeserve, command: str):
    code, out, _ = saeserve(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: saeserve {command}")
    parser, _ = main_module._parser(command)
    (subparsers,) = [action for action in parser._actions if action.metavar == "COMMAND"]
    for action in subparsers.choices[command]._actions:  # type: ignore[index, union-attr]
        assert action.help, f"{command} {action.option_strings or action.dest}"


def test_defaults_are_in_the_help(saeserve: Saeserve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SAESERVE_ADDRESS", raising=False)
    out = saeserve("generate", "--help")[1]
    assert "0 takes the likeliest token [0.8]" in out
    assert "[127.0.0.1:9000]" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["featur"], "invalid choice: 'featur'"),
        (["info", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["info", "--timeout", "0"], "argument --timeout: '0' is not a number of seconds above 0"),
        (["features", "a", "--top-k", "-3"], "argument --top-k: '-3' is not a whole number from 0 to 4,294,967,295"),
        (["features", "a", "--top-k", "3", "--threshold", "1"], "not allowed with argument"),
        (["features", "a", "--feature", "x:y"], "'x:y' is not a feature, such as 123 or resid-mid:123"),
        (["features", "a", "--feature", "4294967296"], "is not a feature"),
        (["features"], 'no text; try: saeserve features "The cat sat on the mat."'),
        (["generate", "a", "--set", "12"], "'12' is not FEATURE=VALUE, such as 123=2.5"),
        (["generate", "a", "--set", "12=much"], "'much' is not a number"),
        (["generate", "a", "--clamp", "12=3"], "is not FEATURE=MIN:MAX"),
        (["generate", "a", "--clamp", "12=:"], "has no bound"),
        (
            ["generate", "a", "--positions", "first"],
            "'first' is not all, prompt, generated, last, after:TEXT or a list",
        ),
        (["generate", "a", "--where", "12=3"], "expected FEATURE > NUMBER or FEATURE <= NUMBER"),
        (["features", "a", "--feature", "x:1", "--feature", "y:1"], "features of one dictionary"),
        (["features", "a", "--feature", "x:1", "--dictionary", "y"], "features of one dictionary"),
    ],
)
def test_wrong_usage_is_2(saeserve: Saeserve, arguments: list[str], message: str):
    code, out, err = saeserve(*arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_flags_may_have_underscores(saeserve: Saeserve):
    code, _, err = saeserve("generate", "a", "--max_new_tokens=x_y")
    assert code == 2
    assert "--max-new-tokens: 'x_y'" in err


def test_no_server(saeserve: Saeserve):
    stopped = Running()
    stopped.stop()
    for command in (["features", "a"], ["generate", "a"], ["dictionaries"], ["info"]):
        code, out, err = saeserve(*command, "--address", stopped.fake.address)
        assert code == 1
        assert out == ""
        assert err == (
            f"saeserve: no server answers at {stopped.fake.address}; start one with `saeserve serve`, "
            "or give another --address\n"
        )


def test_the_environment_gives_the_address(saeserve: Saeserve, running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAESERVE_ADDRESS", running.fake.address)
    assert saeserve("info")[0] == 0


def test_interrupted_is_130(saeserve: Saeserve, monkeypatch: pytest.MonkeyPatch):
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.cli.info.run", interrupt)
    assert saeserve("info")[0] == 130


def test_a_reader_that_has_enough_is_no_traceback(running: Running):
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "info", "--address", running.fake.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert errors == ""


def test_a_terminal_that_cannot_show_a_character(running: Running, monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["features", "☃", "--address", running.fake.address]) == 0
    assert b"resid-mid" in raw.getvalue()


def test_a_warning_is_one_line():
    """Python shows the place in the code as well, which says nothing to users."""
    script = (
        "import warnings\nfrom service.cli.main import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    warnings.warn('model/: v_head is not used')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stderr == "saeserve: model/: v_head is not used\n"
