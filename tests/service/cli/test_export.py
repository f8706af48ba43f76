"""`saeserve export`: from any format to another project's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_runtime import load_dictionary
from tests import golden

Saeserve = Callable[..., tuple[int, str, str]]
GOLDEN = golden.FOLDER


@pytest.mark.parametrize(("format_name", "name"), [("openai", "copy.pt"), ("saelens", "copy")])
def test_export(saeserve: Saeserve, tmp_path: Path, format_name: str, name: str):
    source, copy = GOLDEN / "openai_topk_ln" / "autoencoder.pt", tmp_path / "new" / name
    code, out, err = saeserve("export", str(source), "--format", format_name, str(copy))
    assert code == 0, err
    assert out == f"wrote {copy} ({format_name}, topk, 96 latents)\n"
    x = load_file(source.parent / "expected.safetensors")["x"]
    torch.testing.assert_close(load_dictionary(copy).encode_dense(x), load_dictionary(source).encode_dense(x))
    code, _, err = saeserve("export", str(source), "--format", format_name, str(copy))
    assert (code, err) == (1, f"saeserve: {copy} exists; remove it first\n")


def test_what_a_format_cannot_say(saeserve: Saeserve, tmp_path: Path):
    code, _, err = saeserve("export", str(GOLDEN / "dl_gated"), "--format", "openai", str(tmp_path / "x.pt"))
    assert code == 1
    assert "OpenAI's format cannot express the activation gated" in err
    code, _, err = saeserve("export", "nowhere", "--format", "saelens", str(tmp_path / "x"))
    assert code == 1
    assert "no builtin dictionary 'nowhere'" in err
    assert not list(tmp_path.iterdir())
