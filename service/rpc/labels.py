"""Labels of the features that a reply names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sae_runtime.errors import CatalogueError
from service.pb.saeserve.v1 import common_pb2

if TYPE_CHECKING:
    from sae_runtime.causal.report import FeatureId
    from service.rpc.model import ServedModel

logger = logging.getLogger(__name__)


async def dictionary_labels(
    model: ServedModel, features: Mapping[str, Iterable[int]], include_labels: bool
) -> list[common_pb2.DictionaryLabels]:
    """An entry for each dictionary, by name; with labels if they are asked for."""
    replies = [
        common_pb2.DictionaryLabels(dictionary=name, fingerprint=model.dictionaries[name].fingerprint)
        for name in features
    ]
    if include_labels:

        def read() -> None:
            for reply in replies:
                try:
                    reply.labels.update(model.annotations[reply.dictionary].labels_of(set(features[reply.dictionary])))
                except CatalogueError as error:  # the reply is right without them
                    logger.error("no labels: %s", error)

        await asyncio.to_thread(read)
    return replies


def by_dictionary(names: Iterable[str], features: Iterable[FeatureId]) -> dict[str, list[int]]:
    """The features of each of these dictionaries, which are all that the features belong to."""
    grouped: dict[str, list[int]] = {name: [] for name in names}
    for name, feature in features:
        grouped[name].append(feature)
    return grouped
