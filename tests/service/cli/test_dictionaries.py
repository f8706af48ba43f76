"""`saeserve dictionaries`: the list, and one in full."""

import json
from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]


def test_list(call: Call):
    code, out, _ = call("dictionaries")
    assert code == 0
    assert out.splitlines() == [
        "dictionary  site              latents  width  activation  statistics",
        "resid-late  3.resid_post_mlp       64      4  relu        no",
        "resid-mid   2.resid_post_mlp       64      4  topk, k 8   yes",
    ]


def test_one(call: Call):
    assert call("dictionaries", "resid-mid")[1].splitlines() == [
        "name            resid-mid",
        "site            2.resid_post_mlp",
        "latents         64 over width 4",
        "activation      topk, k 8",
        "input           mean 0 and standard deviation 1 per token",
        "statistics      yes",
        "context         32 tokens",
        "training text   every row began with a BOS token; texts are run without one",
        "trained on      4,000,000 tokens of corpus",
        "trained by      0.1.0, seed 5",
        "published       2026-11-22 01:02 UTC",
        "loss_recovered  0.9375",
        "nmse            0.125",
        'config          {"k": 8, "prepend_bos": true}',
    ]


def test_one_without_provenance(call: Call):
    out = call("dictionaries", "resid-late")[1].splitlines()
    assert "trained" not in " ".join(out)
    assert "input           as it is" in out


def test_unknown(call: Call):
    code, out, err = call("dictionaries", "x")
    assert (code, out, err) == (1, "", "saeserve: NOT_FOUND: no dictionary named 'x'\n")


def test_json(call: Call):
    listed = json.loads(call("dictionaries", "--json")[1])
    assert [dictionary["name"] for dictionary in listed] == ["resid-late", "resid-mid"]
    details = json.loads(call("dictionaries", "resid-mid", "--json")[1])
    assert details["dictionary"]["n_latents"] == 64
    assert details["provenance"]["created"] == "2026-11-22T01:02:03+00:00"
