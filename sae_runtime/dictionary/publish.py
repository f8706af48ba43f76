"""From a dictionary of any format, or of a training run, to the published form, checked against its backbone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import check_backbone
from sae_runtime.dictionary.formats.published import save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference, Manifest, Provenance
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.model.backbone import Backbone
from sae_runtime.version import code_version


def publish(
    dictionary: Dictionary,
    path: str | os.PathLike[str],
    backbone: Backbone,
    *,
    name: str | None = None,
    dtype: str = "float32",
    context_length: int | None = None,
    statistics: LatentStatistics | None = None,
    provenance: Provenance | None = None,
    evaluation: Mapping[str, float] | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a dictionary as a published folder for a backbone; returns its manifest.

    What is not given is what the dictionary's file says: name, context length, statistics, and of one that was
    published before its provenance and figures. The provenance of another format is the configuration of its file.

    ValueError: no site is known, or what `save_dictionary` refuses. DictionaryFormatError: the dictionary does not fit
    the backbone. FingerprintMismatch: it was published for another one. FileExistsError.
    """
    dictionary.require_site()
    check_backbone(dictionary, backbone)
    manifest, origin = dictionary.manifest, dictionary.origin
    recorded = manifest.context_length if manifest else origin.context_length if origin else None
    return save_dictionary(
        dictionary,
        path,
        backbone=BackboneReference(backbone.name, backbone.fingerprint, backbone.tokenizer_fingerprint),
        statistics=statistics,
        name=name,
        dtype=dtype,
        context_length=context_length or recorded,
        provenance=provenance or (manifest.provenance if manifest else _converted(dictionary)),
        evaluation=manifest.evaluation if evaluation is None and manifest else evaluation,
        card=card,
        overwrite=overwrite,
    )


def _converted(dictionary: Dictionary) -> Provenance:
    config: dict[str, Any] = {}
    if (origin := dictionary.origin) is not None:
        config = {"converted_from": origin.format, "hook": origin.hook, "model": origin.model, **origin.config}
        if origin.prepend_bos is not None:
            config["prepend_bos"] = origin.prepend_bos
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Provenance(code_version=code_version(), config=config, created=created)
