"""Opens what is known of the features of served dictionaries: catalogues, and files of written labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sae_runtime.builtin import DICTIONARIES
from sae_runtime.catalogue.annotations import Annotations
from sae_runtime.catalogue.label_store import LabelStore
from sae_runtime.catalogue.read import Catalogue
from sae_runtime.catalogue.schema import CATALOGUE_FILE, LABELS_FILE
from sae_runtime.errors import CatalogueError

if TYPE_CHECKING:
    from sae_runtime import Dictionary

logger = logging.getLogger(__name__)


def open_annotations(dictionaries: Mapping[str, Dictionary], labels_dir: str) -> dict[str, Annotations]:
    """Of each dictionary by name. A dictionary is served without what cannot be used; `problem` says why."""
    return {name: _open(name, dictionary, labels_dir) for name, dictionary in dictionaries.items()}


def labels_file(dictionary: Dictionary, labels_dir: str) -> Path:
    """Where labels of a dictionary are written: in `labels_dir` if it is given, else beside the dictionary.

    In the user's folder of data if there is no such folder, or it cannot be written, or it is the package's, which an
    update would replace.
    """
    if labels_dir:
        return Path(labels_dir) / LABELS_FILE
    folder = dictionary.folder
    if folder is not None and os.access(folder, os.W_OK) and DICTIONARIES not in folder.absolute().parents:
        return folder / LABELS_FILE
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "saeserve" / LABELS_FILE


def _open(name: str, dictionary: Dictionary, labels_dir: str) -> Annotations:
    catalogue, problem = None, ""
    if dictionary.folder is not None and (file := dictionary.folder / CATALOGUE_FILE).exists():
        try:
            catalogue = Catalogue.open(file, dictionary.fingerprint)
        except CatalogueError as error:
            problem = str(error)  # which the replica notes
    return Annotations(dictionary, catalogue, _open_labels(name, dictionary, labels_dir), problem)


def _open_labels(name: str, dictionary: Dictionary, labels_dir: str) -> LabelStore | None:
    labels = LabelStore(labels_file(dictionary, labels_dir), name, dictionary.fingerprint)
    try:
        if hidden := labels.n_hidden():
            logger.warning(
                "dictionary %s: %d labels in %s are of another version of it; they are kept, but not shown",
                name,
                hidden,
                labels.path,
            )
    except CatalogueError as error:
        logger.warning("dictionary %s is served without written labels: %s", name, error)
        return None
    return labels
