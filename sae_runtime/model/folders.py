"""Finds a model's folder by name and reads its safetensors. Folders are laid out as Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_runtime.builtin import BACKBONE

# Everything a backbone needs from a hub repository; pickled weights are never fetched.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)


def find_folder(name_or_path: str) -> Path:
    """The folder of "builtin", of a path, or of a hub name (downloaded, or from the hub's local cache).

    Raises:
        FileNotFoundError: no such folder.
        ConnectionError: a hub name that is not cached, and the hub cannot be reached or does not have it.
    """
    if name_or_path == "builtin":
        if not (BACKBONE / "config.json").exists():
            raise FileNotFoundError(f"the builtin backbone is missing from this installation ({BACKBONE})")
        return BACKBONE
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"backbone folder {name_or_path!r} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(_HUB_FILES)))
    except HFValidationError as error:
        raise FileNotFoundError(f"backbone {name_or_path!r} is neither a folder nor a hub name: {error}") from error
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors alike
        raise ConnectionError(
            f"backbone {name_or_path!r} is not a folder here, and it could not be fetched from the Hugging Face hub: "
            f"it is not in the local cache, and the hub is offline or has no such model "
            f"({type(error).__name__}). Download it on a machine with a network, and give the folder's path."
        ) from error


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors (one file, or shards with an index), as they are stored.

    Raises:
        FileNotFoundError: the folder has no safetensors.
        ValueError: pickled weights only, a file that cannot be read, a tensor that two files hold, or an adapter, which
            changes the weights.
    """
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise ValueError(
            f"{adapter}: the folder holds an adapter (PEFT), which is not applied; merge it into the weights"
        )
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read (truncated?): {error}") from error
        if twice := sorted(state.keys() & tensors.keys()):
            raise ValueError(f"{path} holds {twice[0]}, which another file of the index holds as well")
        state |= tensors
    return state


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
        if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(f"{index} names {wrong[0]!r}, expected safetensors files beside it")
        return [folder / name for name in names]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise ValueError(
            f"{folder} has pickled weights (pytorch_model.bin) but no model.safetensors. Reading a pickle can run "
            "code, so it is refused; convert the weights with transformers' save_pretrained()."
        )
    raise FileNotFoundError(f"{folder} has no model.safetensors")
