"""A base for measurements: the recipe's own where it is at hand, else random weights."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner import engines
from limner.base_model.base import INDEX, BaseModel
from limner.base_model.find import path_exists
from limner.base_model.open import open_base
from limner.config.schema import Config, ModelSettings
from limner.errors import InputError, LimnerError
from limner.families.family import Family
from limner.families.published import load_published
from limner.json_types import Plain
from limner.protocols import BaseConfigs, ProcessGroup
from limner.storage import atomic, safetensors
from limner.storage.layout import WEIGHTS_FILE


@contextlib.contextmanager
def open_base_or_stand_in(
    config: Config, family: Family, process: ProcessGroup
) -> Iterator[tuple[BaseModel, str]]:
    """Open the recipe's base where it is a folder or in the Hub's cache; else random weights of
    full size, on disk while the block lasts. Yields the base and what to call its weights.

    Raises:
        InputError: when the base is not at hand and has no stand-in.
    """
    model = config.model
    folder = process.first(lambda: find_local_base(model, family))
    if folder is not None:
        base = open_local_base(model, family, folder)
        process.first(lambda: engines.check_base(config.engine.kind, base, family))
        yield base, "the base's own"
        return
    configs = choose_published(config, family)
    path = Path(process.first(lambda: tempfile.mkdtemp(prefix="limner-bench-")))
    component = family.network.component
    try:
        process.first(
            lambda: write_random_component(path / component, configs[component], config.engine.kind)
        )
        name = configs.model_index["_name"]
        yield BaseModel(path, {}, component, name, None, None, configs), "random"
    finally:
        if process.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def choose_published(config: Config, family: Family) -> BaseConfigs:
    """The published configs that stand in for a base which is not at hand.

    Raises:
        InputError: when there are none, or the recipe needs more than the trained network.
    """
    configs, problem = load_published(family.name), ""
    if configs is None:
        problem = f"and bench knows no published config of family {family.name!r}"
    elif config.adapter.text_encoders:
        problem = "and its text encoders, which learn, have no stand-in"
    if configs is None or problem:
        raise InputError(
            f"model.base: {config.model.base} is not at hand, {problem}. Give a folder in the "
            "diffusers layout."
        )
    return configs


def find_local_base(model: ModelSettings, family: Family) -> str | None:
    """The base's folder: the one that is named, or a whole one in the Hub's cache; None where
    neither is there."""
    other_stage = model.other_stage
    if other_stage is not None and not path_exists("model.other_stage", other_stage):
        return None
    if path_exists("model.base", model.base):
        return model.base
    import huggingface_hub

    try:
        index = huggingface_hub.try_to_load_from_cache(
            model.base, INDEX, cache_dir=model.cache_dir, revision=model.revision
        )
        if not isinstance(index, str) or model.trained_revision is not None:
            return None
        folder = str(Path(index).parent)
        open_local_base(model, family, folder)
    # A part of the model is missing, or it is no name of the Hub's.
    except (LimnerError, ValueError):
        return None
    return folder


def open_local_base(model: ModelSettings, family: Family, folder: str) -> BaseModel:
    """Open the recipe's base where it lies."""
    local = ModelSettings(
        base=folder, family=model.family, variant=model.variant, other_stage=model.other_stage
    )
    return open_base(local, family, for_generation=False)


def write_random_component(folder: Path, config: Plain, kind: str = "torch") -> None:
    """Write a component's folder: its config, and weights drawn as PyTorch draws them for new
    layers, one array at a time in memory."""
    shapes = engines.parameter_shapes(kind, config)
    with atomic.disk_errors(folder):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        # Arrays, as far as their writer needs.
        arrays: dict[str, Any] = {
            name: RandomArray(name, shape, seed)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        safetensors.write_arrays(folder / WEIGHTS_FILE, arrays)


@dataclass(frozen=True)
class RandomArray:
    """An array that is drawn when it is written: uniform within 1 / sqrt(inputs), as PyTorch starts
    its layers; norms start as the identity."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype = np.dtype(np.float32)
    itemsize = 4

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return 4 * math.prod(self.shape)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        if len(self.shape) == 1:
            return np.full(self.shape, float(self.name.endswith(".weight")), np.float32)
        numbers = np.random.Generator(np.random.SFC64(self.seed)).random(self.shape, np.float32)
        numbers -= np.float32(0.5)
        numbers *= np.float32(2 / math.sqrt(math.prod(self.shape[1:])))
        return numbers
