import json
from collections.abc import Callable

import grpc
import pytest

from service.pb.saeserve.v1 import edits_pb2, intervention_service_pb2
from tests.service.client.fake_server import DICTIONARIES, Failure, FakeServer

Call = Callable[..., tuple[int, str, str]]


def test_text_on_standard_output_and_the_rest_on_standard_error(call: Call, fake: FakeServer):
    code, out, err = call("generate", "Once", "--seed", "5", "--stop", "x", "--max-new-tokens", "6", "--top-p", "0.5")
    assert (code, out) == (0, "Once a dog é.\n")
    assert err.startswith("6 tokens, met 'x', seed 5, ")
    (sent,) = fake.requests("Generate")
    assert (sent.prompt.text, sent.max_new_tokens, list(sent.stop)) == ("Once", 6, ["x"])
    assert (round(sent.sampling.temperature, 6), sent.sampling.top_p, sent.sampling.seed) == (0.8, 0.5, 5)
    assert not sent.edits


def test_edits_in_their_order(call: Call, fake: FakeServer):
    code, _, err = call(
        "generate",
        "Once",
        *("--scale", "resid-late:1=0.5", "--set", "3=-2.5", "--clamp", "4=:1", "--clamp", "5=-1:1"),
        *("--ablate", "6", "--ablate-mean", "7", "--add", "8=1"),
        *("--dictionary", "resid-mid", "--unit", "max", "--positions", "0,2", "--where", "9>0.25"),
    )
    assert code == 0
    pb = edits_pb2
    sent = fake.requests("Generate")[0].edits
    assert [(edit.dictionary, edit.feature, edit.WhichOneof("operation")) for edit in sent] == [
        ("resid-late", 1, "scale"),
        ("resid-mid", 3, "set"),
        ("resid-mid", 4, "clamp"),
        ("resid-mid", 5, "clamp"),
        ("resid-mid", 6, "ablate"),
        ("resid-mid", 7, "ablate"),
        ("resid-mid", 8, "add"),
    ]
    assert sent[0].scale == 0.5
    assert sent[1].set == pb.Amount(value=-2.5, unit=pb.UNIT_RECORDED_MAXIMUM)
    assert sent[2].clamp == pb.Clamp(maximum=1, unit=pb.UNIT_RECORDED_MAXIMUM)
    assert sent[3].clamp == pb.Clamp(minimum=-1, maximum=1, unit=pb.UNIT_RECORDED_MAXIMUM)
    assert [edit.ablate for edit in sent[4:6]] == [pb.ABLATION_ZERO, pb.ABLATION_MEAN]
    assert all(list(edit.positions.explicit.positions) == [0, 2] for edit in sent)
    assert all(edit.condition == pb.Condition(feature=9, threshold=0.25) for edit in sent)
    assert err.startswith("resid-late:1 × 0.5, resid-mid:3 = -2.5 × max, resid-mid:4 in [-∞, 1] × max")


def test_a_bare_number_needs_the_only_dictionary(call: Call, fake: FakeServer, monkeypatch: pytest.MonkeyPatch):
    code, out, err = call("generate", "Once", "--set", "3=1")
    assert (code, out) == (2, "")
    assert err == (
        "saeserve: feature 3 of which dictionary? Loaded: resid-late, resid-mid. "
        "Give --dictionary, or write DICTIONARY:3\n"
    )
    monkeypatch.setattr("tests.service.client.fake_server.DICTIONARIES", DICTIONARIES[1:])
    assert call("generate", "Once", "--set", "3=1")[0] == 0
    assert fake.requests("Generate")[0].edits[0].dictionary == "resid-mid"


def test_compare_is_one_call(call: Call, fake: FakeServer):
    code, out, err = call("generate", "Once", "--set", "resid-mid:3=1", "--compare")
    assert (code, out) == (0, "Once a dog é.\nOnce a cat é.\n")
    lines = err.splitlines()
    assert lines[0] == "without edits"
    assert "resid-mid:3 = 1" in lines
    (sent,) = fake.requests("Generate")
    assert (sent.compare, len(sent.edits)) == (True, 1)


def test_samples(call: Call, fake: FakeServer):
    code, out, err = call("generate", "Once", "--n", "2", "--repetition-penalty", "1.25")
    assert (code, out) == (0, "Once a dog é.\nOnce a dog é.!\n")
    assert "sample 1" in err
    (sent,) = fake.requests("Generate")
    assert (sent.samples, sent.sampling.repetition_penalty) == (2, 1.25)


def test_a_table_of_tokens(call: Call, fake: FakeServer):
    code, out, _ = call(
        "generate", "Once", "--top-logprobs", "2", "--show-features", "resid-mid", "--features-per-token", "2"
    )
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[1] == ["#", "token", "probability", "likeliest", "resid-mid"]
    assert lines[2] == ["4", "<0>", "0.607", "<0>", "0.607", "·x", "0.050", "5", "2.50", "9", "1.00"]
    assert lines[-1][:2] == ["9", "<12>"]
    (sent,) = fake.requests("Generate")
    assert (list(sent.features.dictionaries), sent.features.top_k, sent.features.prompt) == (["resid-mid"], 2, False)


def test_features_options_need_a_dictionary(call: Call):
    code, _, err = call("generate", "Once", "--prompt-features")
    assert (code, "belong to --show-features" in err) == (2, True)


def test_json(call: Call):
    code, out, err = call("generate", "Once", "--ablate", "resid-mid:3", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "prompt": "Once",
        "edits": [
            {
                "dictionary": "resid-mid",
                "feature": 3,
                "operation": "ablate_zero",
                "value": 0.0,
                "minimum": None,
                "maximum": None,
                "unit": "raw",
                "positions": "all",
                "condition": None,
                "reference": None,
                "values": None,
            }
        ],
        "text": " a cat é.",
        "token_ids": [0, 10, 1, 11, 2, 12],
        "logprobs": [-0.5, 0, -0.5, -1, -0.5, -2],
        "finish_reason": "length",
        "stop": "",
        "prompt_tokens": 4,
        "generated_tokens": 6,
        "truncated_tokens": 0,
        "seed": 77,
        "request_id": "",
        "timing": {"queue_ms": 1.5, "compute_ms": 4.0, "total_ms": 6.25},
        "top": [],
        "features": [],
        "sample": 0,
        "unedited": False,
    }


def test_json_compare(call: Call):
    out = json.loads(call("generate", "Once", "--ablate", "resid-mid:3", "--json", "--compare")[1])
    assert (out["unedited"]["text"], out["edited"]["text"]) == (" a dog é.", " a cat é.")
    assert out["unedited"]["edits"] == []


def test_an_error_before_the_first_text_prints_no_text(call: Call, fake: FakeServer):
    fake.failures["Generate"] = [Failure(grpc.StatusCode.FAILED_PRECONDITION, "no statistics")]
    code, out, err = call("generate", "Once")
    assert (code, out) == (1, "")
    assert err == "saeserve: FAILED_PRECONDITION: no statistics\n"


def test_a_server_that_is_starting(call: Call, fake: FakeServer, monkeypatch: pytest.MonkeyPatch):
    # The id is what tells it from a server that is not there.
    monkeypatch.setattr("service.client.messages.generate_request", _with_id)
    fake.failures["Generate"] = [Failure(grpc.StatusCode.UNAVAILABLE, "the server is starting", times=9)]
    code, _, err = call("generate", "Once")
    assert code == 1
    assert err == f"saeserve: the server at {fake.address} is not ready: the server is starting\n"


def _with_id(*_: object, **__: object) -> intervention_service_pb2.GenerateRequest:
    return intervention_service_pb2.GenerateRequest(request_id="r")
