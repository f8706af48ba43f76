"""Dictionaries by name: what is published is what the golden files hold, with where it came from."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_runtime import Backbone, load_dictionary
from sae_runtime.dictionary.pull.download import DownloadSettings, PullError
from sae_runtime.dictionary.pull.pull import PullSettings, pull
from sae_runtime.errors import DictionaryFormatError
from tests import golden
from tests.sae_runtime.dictionary.pull.file_server import FileServer, md5_header, put_hub_repository, running

pytestmark = [pytest.mark.any_cpu, pytest.mark.filterwarnings("ignore:.*BOS")]

GOLDEN = golden.FOLDER
OPENAI = "openai/gpt2-small/resid_post_mlp_v5_32k/8"
OPENAI_PATH = "/sparse-autoencoder/gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"


@pytest.fixture
def server() -> Iterator[FileServer]:
    yield from running()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model as wide as the golden dictionaries and as deep as GPT-2 small, without a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width = load_dictionary(GOLDEN / "openai_topk_ln" / "autoencoder.pt").d_in
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=width, n_layer=12, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(server: FileServer, backbone: str) -> PullSettings:
    quick = DownloadSettings(timeout_s=60, least_bytes=100, attempts=3, sleep=lambda _: None)
    return PullSettings(openai_base=server.address, hub_base=server.address, backbone=backbone, download=quick)


def golden_files(case: str, folder: str) -> dict[str, bytes]:
    left_out = ("case.json", "expected.safetensors")
    return {f"{folder}/{p.name}": p.read_bytes() for p in (GOLDEN / case).iterdir() if p.name not in left_out}


def assert_same_weights(folder: Path, golden: Path) -> None:
    actual, expected = load_dictionary(folder), load_dictionary(golden)
    for name in ("encoder", "decoder", "pre_bias", "latent_bias", "threshold"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    x = torch.randn(5, expected.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(actual.encode_dense(x), expected.encode_dense(x))


def test_openai_s_dictionaries(server: FileServer, settings: PullSettings, backbone: str, tmp_path: Path) -> None:
    content = (GOLDEN / "openai_topk_ln" / "autoencoder.pt").read_bytes()
    server.put(OPENAI_PATH, content, ("status", 500), ("cut", len(content) // 2), Content_MD5=md5_header(content))
    events: list[Any] = []
    pulled = pull(OPENAI, tmp_path / "gpt2-8", settings, lambda *event: events.append(event))
    assert_same_weights(tmp_path / "gpt2-8", GOLDEN / "openai_topk_ln" / "autoencoder.pt")
    manifest = load_dictionary(tmp_path / "gpt2-8", backbone=Backbone.load(backbone)).manifest
    assert manifest is not None
    assert (manifest.name, manifest.site, manifest.normalization) == ("gpt2-8", "8.resid_post_mlp", "layer_norm")
    config = manifest.provenance.config
    assert (config["pulled"], config["license"]) == (OPENAI, "mit")
    assert config["files"]["8.pt"]["url"] == server.address + OPENAI_PATH
    assert config["files"]["8.pt"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert pulled.license == "mit"
    assert events[-1] == ("8.pt", len(content), len(content))
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2-8"]  # what was fetched is gone


@pytest.mark.parametrize(
    ("case", "folder", "site"),
    [
        ("saelens_jumprelu_none_sub", "gpt2-small-res-jb/blocks.8.hook_resid_pre", None),
        ("sparsify_topk", "h.8.mlp", None),
        ("dl_batchtopk", "layer_8/trainer_0", "8.resid_post_mlp"),
    ],
)
def test_hub_repositories(
    server: FileServer, settings: PullSettings, tmp_path: Path, case: str, folder: str, site: str | None
) -> None:
    files = golden_files(case, folder) | {"README.md": b"a card", f"{folder}/setup.py": b"never fetched"}
    commit = put_hub_repository(server, "some/saes", files)
    pulled = pull(f"some/saes/{folder}", tmp_path / "out", replace(settings, site=site))
    golden = GOLDEN / case
    assert_same_weights(tmp_path / "out", golden)
    config = pulled.manifest.provenance.config
    assert (config["version"], config["license"]) == (commit, "apache-2.0")
    assert not any("setup.py" in path for path, _ in server.requests)
    for file in pulled.files:
        large = file.path.suffix in (".safetensors", ".pt")
        assert file.verified == (("sha256",) if large else ("git",))
    if case == "sparsify_topk":
        assert pulled.manifest.site == "8.resid_delta_mlp"  # from the folder's name


def test_releases_of_which_saelens_knows_that_they_are_centred(
    server: FileServer, settings: PullSettings, tmp_path: Path
) -> None:
    """Their files do not say it. Another repository with the same files is read as they are, with a warning."""
    files = golden_files("saelens_legacy_standard", "blocks.1.hook_resid_pre")
    for repository in ("jbloom/GPT2-Small-SAEs-Reformatted", "some/saes"):
        put_hub_repository(server, repository, files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*BOS")
        centred = pull("jbloom/GPT2-Small-SAEs-Reformatted/blocks.1.hook_resid_pre", tmp_path / "a", settings)
    assert centred.manifest.normalization == "centred"
    assert centred.manifest.provenance.config["prepend_bos"] is True
    with pytest.warns(UserWarning, match="does not say how the model was processed"):
        plain = pull("some/saes/blocks.1.hook_resid_pre", tmp_path / "b", settings)
    assert plain.manifest.normalization == "none"


def test_an_interrupted_pull_fetches_only_what_is_missing(
    server: FileServer, settings: PullSettings, tmp_path: Path
) -> None:
    files = golden_files("saelens_jumprelu_none_sub", "sae")
    put_hub_repository(server, "some/saes", files)
    weights = "/storage/some/saes/sae/sae_weights.safetensors"
    server.files[weights].faults = [("cut", 2000), ("status", 404)]
    with_site = replace(settings, site="8.resid_pre")
    with pytest.raises(PullError, match="is not there"):
        pull("some/saes/sae", tmp_path / "out", with_site)
    assert not (tmp_path / "out").exists()
    asked = len(server.ranges_of("/storage/some/saes/sae/cfg.json"))
    pull("some/saes/sae", tmp_path / "out", with_site)
    assert len(server.ranges_of("/storage/some/saes/sae/cfg.json")) == asked == 1
    assert server.ranges_of(weights)[-1] == "bytes=2000-"
    assert_same_weights(tmp_path / "out", GOLDEN / "saelens_jumprelu_none_sub")


def test_a_fetched_file_that_was_changed_is_fetched_again(
    server: FileServer, settings: PullSettings, tmp_path: Path
) -> None:
    content = (GOLDEN / "openai_topk_ln" / "autoencoder.pt").read_bytes()
    server.put(OPENAI_PATH, b"not a dictionary")
    with pytest.raises(DictionaryFormatError):
        pull(OPENAI, tmp_path / "out", settings)
    waiting = tmp_path / "out.download" / "resid_post_mlp_v5_32k" / "8.pt"
    assert waiting.read_bytes() == b"not a dictionary"
    waiting.write_bytes(b"changed on disk")
    server.put(OPENAI_PATH, content)
    pull(OPENAI, tmp_path / "out", settings)
    assert_same_weights(tmp_path / "out", GOLDEN / "openai_topk_ln" / "autoencoder.pt")


def test_a_wrong_checksum_publishes_nothing(server: FileServer, settings: PullSettings, tmp_path: Path) -> None:
    put_hub_repository(server, "some/saes", golden_files("saelens_jumprelu_none_sub", "sae"))
    served = server.files["/storage/some/saes/sae/sae_weights.safetensors"]
    served.content = served.content[:-1] + bytes([served.content[-1] ^ 1])
    with pytest.raises(PullError, match="its sha256 checksum is"):
        pull("some/saes/sae", tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_folders_are_named_where_a_repository_has_several(
    server: FileServer, settings: PullSettings, tmp_path: Path
) -> None:
    files = golden_files("sparsify_topk", "h.3.mlp") | golden_files("sparsify_topk", "h.8.mlp")
    put_hub_repository(server, "some/saes", files)
    with pytest.raises(
        PullError, match=r"some/saes is not a dictionary itself; folders .* that hold one: h\.3\.mlp, h\.8\.mlp"
    ):
        pull("some/saes", tmp_path / "out", settings)
    put_hub_repository(server, "some/text", {"README.md": b"nothing"})
    with pytest.raises(PullError, match="some/text holds no dictionary"):
        pull("some/text", tmp_path / "out", settings)


def test_what_does_not_fit_is_said_before_or_instead_of_publishing(
    server: FileServer, settings: PullSettings, tmp_path: Path, tiny_backbone_folder: Path
) -> None:
    content = (GOLDEN / "openai_topk_ln" / "autoencoder.pt").read_bytes()
    server.put(OPENAI_PATH, content)
    with pytest.raises(DictionaryFormatError, match="does not fit"):
        pull(OPENAI, tmp_path / "out", replace(settings, backbone=str(tiny_backbone_folder)))
    put_hub_repository(server, "some/saes", golden_files("sparsify_topk", "sae"))
    with pytest.raises(ValueError, match="does not say which site it reads"):
        pull("some/saes/sae", tmp_path / "b", settings)
    with pytest.raises(ValueError, match="give the backbone that some/saes/sae belongs to"):
        pull("some/saes/sae", tmp_path / "c", replace(settings, backbone=None))
    with pytest.raises(PullError, match="refused: expected https"):
        pull(OPENAI, tmp_path / "d", replace(settings, openai_base="http://example.invalid"))
    (tmp_path / "e").mkdir()
    with pytest.raises(FileExistsError):
        pull(OPENAI, tmp_path / "e", settings)


def test_nothing_of_a_file_is_run(server: FileServer, settings: PullSettings, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"pre_bias": Harmful()}, tmp_path / "harmful.pt")
    server.put(OPENAI_PATH, (tmp_path / "harmful.pt").read_bytes())
    with pytest.raises(DictionaryFormatError):
        pull(OPENAI, tmp_path / "out", settings)
    assert not (tmp_path / "ran").exists()


def test_a_manifest_s_files_are_json(server: FileServer, settings: PullSettings, tmp_path: Path) -> None:
    server.put(OPENAI_PATH, (GOLDEN / "openai_relu" / "autoencoder.pt").read_bytes())
    pull(OPENAI, tmp_path / "out", replace(settings, name="mine", dtype="float16"))
    manifest = json.loads((tmp_path / "out" / "dictionary.json").read_text())
    assert (manifest["name"], manifest["dtype"], manifest["architecture"]) == ("mine", "float16", "relu")
