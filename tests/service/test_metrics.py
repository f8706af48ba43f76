"""Metrics of one process, and of several that share a directory."""

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from tests.service.conftest import Served


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(text: bytes, name: str, **labels: str) -> float | None:
    return samples(text).get((name, frozenset(labels.items())))


async def test_a_served_call_is_counted(served: Served) -> None:
    request = pb.ExtractFeaturesRequest(inputs=[common_pb2.TextInput(text="twelve bytes")], dictionaries=["mid"])
    await served.features.ExtractFeatures(request)
    text = served.runtime.metrics.render()
    assert value(text, "saeserve_requests_total", rpc="ExtractFeatures", code="OK") == 1
    assert value(text, "saeserve_request_seconds_count", rpc="ExtractFeatures") == 1
    assert value(text, "saeserve_tokens_total", kind="extract") == 12
    assert value(text, "saeserve_batch_tokens_sum", kind="extract") == 12
    assert value(text, "saeserve_batch_seconds_count", kind="extract") == 1
    assert value(text, "saeserve_queue_seconds_count", kind="extract") == 1
    assert value(text, "saeserve_queue_tokens") == 0
    assert value(text, "saeserve_active_generations") == 0
    assert value(text, "saeserve_dictionaries") == len(served.dictionaries)
    assert value(text, "saeserve_dictionary_info", dictionary="mid", site="1.resid_post_mlp") == 1


def test_labels_of_dictionaries_are_bounded() -> None:
    metrics = Metrics()
    metrics.loaded({f"d{i}": "0.resid_pre" for i in range(500)})
    assert value(metrics.render(), "saeserve_dictionaries") == 500
    assert metrics.render().count(b"saeserve_dictionary_info{") == 100


REPLICA = """
from service.metrics import Metrics
metrics = Metrics()
metrics.call_done("ExtractFeatures", "OK", 0.01)
metrics.batch_done("extract", 2, 100, 0.02)
metrics.queue_is(7, 1)
metrics.loaded({"mid": "1.resid_post_mlp"})
print(metrics.render().decode(), flush=True)
input()
"""


def test_replicas_of_a_node_answer_for_each_other(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}

    def replica() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", REPLICA]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(process: subprocess.Popen[str]) -> str:
        return process.communicate("\n", timeout=60)[0]

    def read_until_rendered(process: subprocess.Popen[str]) -> bytes:
        lines = []
        while not lines or lines[-1] != "\n":  # an empty line ends it
            line = process.stdout.readline()
            assert line, "the process ended"
            lines.append(line)
        return "".join(lines).encode()

    first = replica()
    read_until_rendered(first)
    second = replica()
    both = (read_until_rendered(second).decode() + end(second)).encode()
    assert value(both, "saeserve_requests_total", rpc="ExtractFeatures", code="OK") == 2
    assert value(both, "saeserve_tokens_total", kind="extract") == 200
    assert value(both, "saeserve_queue_tokens") == 14
    assert value(both, "saeserve_active_generations") == 2
    assert value(both, "saeserve_dictionaries") == 1
    assert value(both, "saeserve_dictionary_info", dictionary="mid", site="1.resid_post_mlp") == 2

    end(first)
    third = replica()
    alone = (read_until_rendered(third).decode() + end(third)).encode()
    # What dead processes counted stays; what they held is gone.
    assert value(alone, "saeserve_requests_total", rpc="ExtractFeatures", code="OK") == 3
    assert value(alone, "saeserve_queue_tokens") == 7
    assert value(alone, "saeserve_dictionary_info", dictionary="mid", site="1.resid_post_mlp") == 1
