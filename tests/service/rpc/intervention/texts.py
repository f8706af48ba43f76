"""Texts that measurements are tested on."""

from __future__ import annotations

from service.pb.saeserve.v1 import common_pb2
from tests.service.conftest import Served

TEXTS = ["Once upon a time", "x = 1 + 2", "Zwölf Boxkämpfer jagen Viktor", "no"]


def inputs(*texts: str) -> list[common_pb2.TextInput]:
    return [common_pb2.TextInput(text=text) for text in texts or TEXTS]


def ids(served: Served, text: str) -> list[int]:
    return served.backbone.encode_text(text).ids
