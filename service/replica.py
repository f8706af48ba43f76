"""A replica's parts, put together: backbone, dictionaries, engine, metrics, limits."""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from sae_runtime.errors import DictionaryFormatError
from service.catalogues import open_annotations
from service.engine.settings import EngineSettings
from service.presets import Presets
from service.rpc.call import Readiness
from service.rpc.limits import Limits
from service.rpc.model import ServedModel
from service.rpc.text_inputs import TextInputReader

if TYPE_CHECKING:
    from sae_runtime import Backbone, Dictionary

logger = logging.getLogger(__name__)


class DictionarySettings(BaseModel):
    """One dictionary to serve, where its files do not say all that is needed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str
    """A folder or file of any supported format, or the name of a builtin dictionary."""
    name: str | None = None
    """The name to serve it under; the dictionary's name if not given."""
    site: str | None = None
    """Where its activations are read, such as "8.resid_post_mlp"; needed where its files do not say."""


class ReplicaSettings(BaseModel):
    """What one replica serves, and its bounds. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    backbone: str = "builtin"
    """A Hugging Face folder, a hub name, or "builtin"."""
    dictionaries: Literal["builtin"] | tuple[str | DictionarySettings, ...] = "builtin"
    """Dictionaries to serve: paths or builtin names; "builtin" is all that ship with the package."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """The CPU, a GPU, or "auto": the GPU of the replica if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the backbone and the dictionaries compute in."""
    edit_presets: str = ""
    """A YAML file of named sets of edits that requests can use (`presets` of Generate); empty: none."""
    labels_dir: str = ""
    """Folder for the labels that LabelFeature writes, which replicas on several nodes must share. Empty: the folder of
    the dictionary if it can be written, else the user's folder for data (XDG_DATA_HOME)."""
    limits: Limits = Field(default_factory=Limits)
    """What a request may ask for."""
    engine: EngineSettings = Field(default_factory=EngineSettings)
    """How requests are batched and how many may wait."""


class ServiceRuntime:
    """A replica's parts. `start` loads and starts them; the constructor takes ready-made ones (tests, benchmarks).

    Belongs to the event loop that `start` or `open` runs on.
    """

    def __init__(
        self,
        backbone: Backbone,
        dictionaries: Mapping[str, Dictionary],
        settings: ReplicaSettings,
        notes: Sequence[str] = (),
    ) -> None:
        # Here, because they bring torch, and because Metrics reads PROMETHEUS_MULTIPROC_DIR when it is imported.
        from service.engine.engine import Engine
        from service.metrics import Metrics

        self.settings = settings
        presets = Presets.load(settings.edit_presets, dictionaries, backbone)
        by_name = {name: dictionaries[name] for name in sorted(dictionaries)}
        annotations = open_annotations(by_name, settings.labels_dir)
        unused = [
            f"dictionary {name} is served without its catalogue: {known.problem}"
            for name, known in annotations.items()
            if known.problem
        ]
        self.model = ServedModel(backbone, by_name, presets, [*notes, *unused], annotations)
        for note in self.model.notes:
            logger.warning(note)
        self.metrics = Metrics()
        self.engine = Engine(backbone, self.model.dictionaries, settings.engine, self.metrics)
        self.limits = settings.limits.for_context(backbone.context_length, self.engine.max_sequence_tokens)
        self.text_reader = TextInputReader(backbone, self.limits)
        self.readiness = Readiness()

    @classmethod
    async def start(cls, settings: ReplicaSettings) -> ServiceRuntime:
        """Loads what the settings name, off the event loop, and starts serving it.

        Raises:
            DictionaryFormatError: a dictionary cannot be read, does not say its site, or shares its name with another;
                FingerprintMismatch if it belongs to another backbone (both are named).
            UnknownDictionary, FileNotFoundError, ValueError: there is no such dictionary, backbone or device.
        """
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            backbone, dictionaries = await asyncio.to_thread(load_model, settings)
        notes = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        runtime = cls(backbone, dictionaries, settings, notes)
        await runtime.open()
        logger.info(
            "serving %s with %d dictionaries on %s after %.1f s",
            backbone.name,
            len(dictionaries),
            backbone.device,
            time.perf_counter() - began,
        )
        return runtime

    async def open(self) -> None:
        """Starts the engine and accepts calls."""
        await self.engine.start()
        self.metrics.loaded({name: str(dictionary.site) for name, dictionary in self.model.dictionaries.items()})
        self.readiness.set("serving")

    @property
    def ready(self) -> bool:
        """Whether calls are accepted and the engine can run them."""
        return self.readiness.serving and self.engine.ready

    def begin_drain(self) -> None:
        """Refuses new calls and sets health to NOT_SERVING; running calls go on."""
        self.readiness.set("draining")

    async def stop(self) -> None:
        """Stops the engine. Calls that still run get UNAVAILABLE."""
        self.begin_drain()
        await self.engine.stop()
        self.text_reader.close()
        for known in self.model.annotations.values():
            known.close()

    def note_load(self) -> None:
        """Writes the engine's load to the metrics."""
        snapshot = self.engine.snapshot()
        self.metrics.queue_is(snapshot.queued_tokens, snapshot.active_generations)


def load_model(settings: ReplicaSettings) -> tuple[Backbone, dict[str, Dictionary]]:
    """The backbone and the dictionaries by name. Errors as `ServiceRuntime.start`."""
    from sae_runtime import Backbone, list_builtin_dictionaries
    from sae_runtime.model.devices import choose_device

    device = choose_device(settings.device)
    backbone = Backbone.load(settings.backbone, dtype=settings.dtype, device=device)
    if backbone.has_tokenizer:
        backbone.encode_text("The first text takes longer: tables are made.")
    sources = list_builtin_dictionaries() if settings.dictionaries == "builtin" else settings.dictionaries
    dictionaries: dict[str, Dictionary] = {}
    for source in sources:
        entry = DictionarySettings(path=source) if isinstance(source, str) else source
        name, dictionary = _load_dictionary(entry, backbone)
        if name in dictionaries:
            raise DictionaryFormatError(f"two dictionaries are named {name!r}; give one of them another name")
        dictionaries[name] = dictionary
    return backbone, dictionaries


def _load_dictionary(entry: DictionarySettings, backbone: Backbone) -> tuple[str, Dictionary]:
    from dataclasses import replace

    from sae_runtime import load_dictionary
    from sae_runtime.dictionary.formats import check_backbone

    dictionary = load_dictionary(entry.path, dtype=backbone.dtype, device=backbone.device)
    name = entry.name or dictionary.name or Path(entry.path).stem
    dictionary = replace(dictionary, name=name, site=entry.site or dictionary.site)
    try:
        dictionary.require_site()
    except ValueError as error:
        raise DictionaryFormatError(f"{entry.path}: {error}") from None
    check_backbone(dictionary, backbone)
    dictionary = dictionary.with_fast_encoder()
    _ = dictionary.fingerprint  # here, since it may take seconds: later it is at hand
    return name, dictionary
