"""The record of a base model: its folders, configs, weight files and fingerprint."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from limner.base_model.weight_files import (
    choose_weight_files,
    has_usable_weights,
    has_weights,
    list_files,
)
from limner.diffusion.base_schedulers import list_silent_settings
from limner.json_types import Plain
from limner.protocols import BaseConfigs
from limner.storage import atomic

INDEX = "model_index.json"
MAX_CARD_BYTES = 1 << 18  # of a model card; its front matter stands first
VOCABULARY_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "vocab.json",
)


@dataclass(frozen=True)
class BaseModel:
    """A checked diffusers folder; its weights are read by those who need them, never here."""

    folder: Path
    external_folders: dict[str, Path]  # component -> its folder, where that is elsewhere
    trained_component: str  # the component that learns
    name: str  # what the user wrote
    commit: str | None  # of the Hub repository; None: a local folder
    variant: str | None
    # With another stage, also the configs of those components of it that features need.
    configs: BaseConfigs = field(repr=False)
    other_stage: "BaseModel | None" = None  # of a model in two stages
    # Of an other stage that is the result of a run: a folder with its LoRA, and what that was
    # trained to predict.
    adapter: Path | None = None
    prediction_type: str | None = None

    def component_class(self, component: str) -> tuple[str, str]:
        """Return the library and class name of a component."""
        index = self.configs.model_index
        if component not in index and self.other_stage is not None:
            return self.other_stage.component_class(component)
        library, class_name = index[component][:2]
        return library, class_name

    @property
    def scheduler_class(self) -> str:
        """The class of the scheduler that draws: that of the index."""
        return self.component_class("scheduler")[1]

    def component_folder(self, component: str) -> Path:
        """Return the folder of a component."""
        return self.external_folders.get(component, self.folder / component)

    def weight_files(self, component: str) -> list[Path]:
        """Return a component's safetensors files, of the chosen variant where it has one.

        Raises:
            InputError: when there are none, or when their index is not theirs.
        """
        library = self.component_class(component)[0]
        return choose_weight_files(self.component_folder(component), self.variant, library)

    def has_usable_weights(self, component: str) -> bool:
        """Return whether a component has safetensors weights, of the chosen variant or plain."""
        names = list_files(self.component_folder(component))
        library = self.component_class(component)[0]
        return has_usable_weights(component, names, self.variant, library)

    def fingerprint(self, *components: str) -> str:
        """Return a digest of configs, vocabularies and weights: equal for equal bytes anywhere."""
        return atomic.digest_json({name: self.digest_component(name) for name in components})

    def digest_component(self, component: str) -> list[object]:
        """Return a component's config and the digests of its vocabulary and weight files."""
        # The config without where it was loaded from, and which version wrote it.
        config = {
            key: value
            for key, value in self.configs[component].items()
            if not key.startswith("_") and key != "transformers_version"
        }
        # Of a scheduler the class alone may decide on the noise.
        if component == "scheduler":
            config |= list_silent_settings(self.configs[component])
        folder = self.component_folder(component)
        files = [path for path in sorted(folder.glob("*")) if path.is_file()]
        paths = [path for path in files if path.name in VOCABULARY_FILES]
        if has_weights(list_files(folder)):
            paths += self.weight_files(component)
        return [config, *(digest_unchanged(path) for path in paths)]

    def read_card_metadata(self) -> Plain:
        """Return the front matter of the base's model card; empty where there is none."""
        return read_front_matter(self.folder / "README.md")[0]

    def describe_card_problem(self) -> str | None:
        """Say why nothing of the base's model card is taken over; None where nothing is wrong."""
        return read_front_matter(self.folder / "README.md")[1]


def read_front_matter(path: Path) -> tuple[Plain, str | None]:
    """Return what a model card says between its first two rules, or why that cannot be read."""
    import yaml

    try:
        if not path.is_file():
            return {}, None
        with path.open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
        parts = text.replace("\r\n", "\n").split("---\n")
        if len(parts) < 3 or parts[0].strip():
            return {}, None
        metadata = yaml.safe_load(parts[1])
    # Of a date or number that is none, yaml raises whatever Python does.
    except (
        yaml.YAMLError,
        ArithmeticError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if isinstance(error, RecursionError):
            reason = "nested too deep"
        return {}, (
            f"{path}: its front matter cannot be read ({reason}), so the license is not taken over"
        )
    if isinstance(metadata, dict):
        return metadata, None
    return {}, f"{path}: its front matter is no table, so the license is not taken over"


def digest_unchanged(path: Path) -> str:
    """Return the digest of a file, read once as long as its size and time stay the same."""
    status = path.stat()
    return digest_at(path, status.st_size, status.st_mtime_ns)


@functools.cache
def digest_at(path: Path, size: int, changed: int) -> str:
    """Return the digest of a file; size and time of change belong to the key of the cache."""
    return atomic.digest_file(path)
