"""`saeserve info`."""

import json
from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]


def test_facts_and_limits(call: Call):
    lines = call("info")[1].splitlines()
    assert lines[0].startswith("server        saeserve 0.1.0 at 127.0.0.1:")
    assert "backbone      builtin: 5 layers, width 4, vocabulary 256, context 32, float32" in lines
    assert "max_tokens_per_request      40" in lines


def test_json(call: Call):
    assert json.loads(call("info", "--json")[1])["backbone"]["sites"] == ["2.resid_post_mlp", "3.resid_post_mlp"]
