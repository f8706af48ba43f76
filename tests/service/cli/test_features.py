import io
import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from service.cli.features import in_batches
from service.client import Limits
from service.pb.saeserve.v1 import common_pb2
from tests.service.cli.conftest import Run
from tests.service.client.fake_server import Failure, FakeServer

Call = Callable[..., tuple[int, str, str]]


def limits(**stated: int) -> Limits:
    values = dict.fromkeys(Limits.__dataclass_fields__, 0) | stated
    return Limits(**values)  # type: ignore[arg-type]


def test_tokens_with_their_features(call: Call, fake: FakeServer):
    code, out, err = call("features", "The cat sat", "--dictionary", "resid-mid")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "resid-mid  3 tokens, by surprise",
        "",
        "The cat sat",
        "",
        "#  token  feature  activation       others",
        "0  The          0  ███▍       1.00  63 0.50",
        "1  ·cat         1  ██████▋    2.00  63 1.00",
        "2  ·sat         2  ██████████ 3.00  63 1.50",
        "",
    ]
    (sent,) = fake.requests("ExtractFeaturesStream")[1:]
    assert sent.selection.top_k == 5


def test_all_dictionaries_and_several_texts(call: Call):
    out = call("features", "a", "b c", "--reconstruction-error")[1]
    assert [line for line in out.splitlines() if line.startswith("text")] == [
        "text 1 of 2: resid-late  1 token",
        "text 1 of 2: resid-mid  1 token",
        "text 2 of 2: resid-late  2 tokens",
        "text 2 of 2: resid-mid  2 tokens",
    ]
    assert "1  ·c           1  ██████████ 2.00  0.250  63 1.00" in out.splitlines()


def test_aggregate(call: Call):
    out = call("features", "a b", "--aggregate", "max", "--dictionary", "resid-mid")[1]
    assert out.splitlines() == [
        "resid-mid  2 tokens, max over tokens, by surprise",
        "",
        "feature  activation",
        "      1  ██████████ 2.00",
        "     63  █████      1.00",
        "",
    ]


@pytest.mark.parametrize(
    ("flags", "selection"),
    [
        (["--top-k", "2"], "top_k: 2\nrank_by: FEATURE_RANKING_SURPRISE\n"),
        (["--threshold", "0.5", "--rank-by", "z-score"], "threshold: 0.5\nrank_by: FEATURE_RANKING_Z_SCORE\n"),
        (
            ["--feature", "4", "--feature", "resid-mid:9", "--rank-by", "activation"],
            "features {\n  ids: 4\n  ids: 9\n}\n",
        ),
    ],
)
def test_selections(call: Call, fake: FakeServer, flags: list[str], selection: str):
    assert call("features", "a", *flags, "--dictionary", "resid-mid", "--truncate")[0] == 0
    sent = fake.requests("ExtractFeaturesStream")[-1]
    assert str(sent.selection) == selection
    assert list(sent.dictionaries) == ["resid-mid"]
    assert sent.overflow == 2


def test_a_feature_brings_its_dictionary(call: Call, fake: FakeServer):
    assert call("features", "a", "--feature", "resid-late:9")[0] == 0
    assert list(fake.requests("ExtractFeaturesStream")[-1].dictionaries) == ["resid-late"]


def test_json(call: Call):
    code, out, _ = call("features", "a ☃b", "--dictionary", "resid-mid", "--reconstruction-error", "--json")
    assert code == 0
    assert json.loads(out) == [
        {
            "text": "a ☃b",
            "n_tokens": 3,
            "truncated_tokens": 0,
            "tokens": [
                {"id": 100, "piece": "a", "bytes": [0, 1], "characters": [0, 1]},
                {"id": 101, "piece": " \\xe2", "bytes": [1, 3], "characters": [1, 3]},
                {"id": 102, "piece": "\\x98\\x83b", "bytes": [3, 6], "characters": [2, 4]},
            ],
            "aggregation": "none",
            "dictionaries": [
                {
                    "dictionary": "resid-mid",
                    "rows": [
                        [{"feature": i, "activation": i + 1.0}, {"feature": 63, "activation": (i + 1) / 2}]
                        for i in range(3)
                    ],
                    "reconstruction_error": [0.25, 0.25, 0.25],
                }
            ],
        }
    ]


def test_files(call: Call, fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "lines.txt"
    file.write_text("one\n\ntwo words\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from standard input")))
    assert call("features", "--file", str(file), "--lines")[0] == 0
    assert call("features", "--file", str(file), "--file", "-", "--json")[0] == 0
    batches = [[i.text for i in sent.inputs] for sent in fake.requests("ExtractFeaturesStream") if sent]
    # The second text has 19 bytes and so at most 19 tokens: with the first's 15 they fit the server's 40.
    assert batches == [["one", "two words"], ["one\n\ntwo words\n", "from standard input"]]


def test_a_file_that_is_not_there(call: Call, tmp_path: Path):
    code, _, err = call("features", "--file", str(tmp_path / "none.txt"))
    assert code == 1
    assert err.startswith(f"saeserve: cannot read {tmp_path}/none.txt: ")


def test_errors_of_the_server(call: Call, fake: FakeServer):
    violation = error_details_pb2.BadRequest.FieldViolation(field="inputs[0].text", description="has 33 tokens")
    details = (error_details_pb2.BadRequest(field_violations=[violation]),)
    fake.failures["ExtractFeaturesStream"] = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long", details)]
    code, _, err = call("features", "a")
    assert code == 1
    assert err == "saeserve: INVALID_ARGUMENT: too long\n  inputs[0].text: has 33 tokens\n"


def test_batches_keep_to_the_limits():
    texts = ["aaaa", "bb", "cc", "d", "eeeeeeee", "é"]
    assert list(in_batches(texts, limits(max_inputs=2))) == [["aaaa", "bb"], ["cc", "d"], ["eeeeeeee", "é"]]
    assert list(in_batches(texts, limits(max_tokens_per_request=6))) == [
        ["aaaa", "bb"],
        ["cc", "d"],
        ["eeeeeeee"],
        ["é"],
    ]
    # No input has more tokens than its own limit.
    assert list(in_batches(texts[4:], limits(max_tokens_per_request=6, max_tokens_per_input=4))) == [["eeeeeeee", "é"]]
    assert list(in_batches([], limits())) == []


@pytest.mark.parametrize(
    ("flags", "shown", "sent"),
    [
        ([], "resid-mid  1 token, by surprise", common_pb2.FEATURE_RANKING_SURPRISE),
        (["--rank-by", "z-score"], "resid-mid  1 token, by z-score", common_pb2.FEATURE_RANKING_Z_SCORE),
        (["--rank-by", "activation"], "resid-mid  1 token", common_pb2.FEATURE_RANKING_UNSPECIFIED),
    ],
)
def test_the_order_is_named_unless_it_is_by_activation(
    call: Call, fake: FakeServer, flags: list[str], shown: str, sent: int
):
    out = call("features", "a", "--dictionary", "resid-mid", *flags)[1]
    assert out.splitlines()[0] == shown
    assert fake.requests("ExtractFeaturesStream")[-1].selection.rank_by == sent


async def test_without_statistics_the_order_is_by_activation(run: Run):
    """Of the real handlers: surprise would be refused for a dictionary without statistics."""
    code, out, err = await run("features", "Once", "--dictionary", "plain")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "plain  4 tokens"
    code, out, _ = await run("features", "Once", "--dictionary", "mid")
    assert (code, out.splitlines()[0]) == (0, "mid  4 tokens, by surprise")
    code, _, err = await run("features", "Once", "--dictionary", "plain", "--rank-by", "surprise")
    assert code == 1
    assert "needs statistics" in err
