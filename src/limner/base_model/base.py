"""The base model: its folder, component configs and fingerprint."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limner.base_model.weight_files import choose_files, has_weights, list_files
from limner.errors import InputError
from limner.protocols import Configs
from limner.storage import atomic

INDEX = "model_index.json"


@dataclass(frozen=True)
class BaseModel:
    """A diffusers folder that was found good. Weights are read by whoever needs them, never
    here."""

    folder: Path
    external_folders: dict[str, Path]  # folders of components that are not in it
    trained_component: str  # the component that learns
    name: str  # what the user wrote
    commit: str | None  # of the Hub repository; None: a local folder
    variant: str | None
    # component -> its config, and model_index; with another stage, also those of its components
    # that
    # are needed
    configs: Configs = field(repr=False)
    other_stage: "BaseModel | None" = None  # the other one of a model in two stages
    adapter: Path | None = None  # a folder with a LoRA that the other stage is used with

    def component_class(self, component: str) -> tuple[str, str]:
        """Library and class name of a component."""
        index = self.configs["model_index"]
        if component not in index and self.other_stage is not None:
            return self.other_stage.component_class(component)
        library, name = index[component][:2]
        return library, name

    def component_folder(self, component: str) -> Path:
        """The folder of a component."""
        return self.external_folders.get(component, self.folder / component)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, of the chosen variant where it has one."""
        return [
            self.component_folder(component) / name
            for name in choose_files(
                component, list_files(self.component_folder(component)), self.variant
            )
        ]

    def fingerprint(self, *components: str) -> str:
        """A digest of configs, vocabularies and weights of these components: equal for equal bytes,
        wherever they lie."""
        known = {}
        for component in components:
            settings = {
                k: v
                for k, v in self.configs[component].items()
                if not k.startswith("_") and k != "transformers_version"
            }
            texts = [
                p
                for p in sorted(self.component_folder(component).glob("*"))
                if p.name
                in (
                    "vocab.json",
                    "merges.txt",
                    "tokenizer.json",
                    "special_tokens_map.json",
                    "added_tokens.json",
                )
            ]
            weights = (
                self.weight_files(component)
                if has_weights(list_files(self.component_folder(component)))
                else []
            )
            known[component] = [
                settings,
                *(
                    digest_unchanged(p, p.stat().st_size, p.stat().st_mtime_ns)
                    for p in [*texts, *weights]
                ),
            ]
        return atomic.digest_json(known)

    def read_card_metadata(self) -> dict[str, Any]:
        """What the front matter of the base's own model card says; empty where there is none."""
        import yaml

        path = self.folder / "README.md"
        parts = (
            path.read_text(encoding="utf-8", errors="replace").split("---\n")
            if path.is_file()
            else []
        )
        try:
            found = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else {}
        except yaml.YAMLError:
            found = {}
        return found if isinstance(found, dict) else {}


@functools.cache
def digest_unchanged(path: Path, size: int, changed: int) -> str:
    return atomic.digest_file(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: when it is missing, or not an object in JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; a folder in the diffusers layout has it. Is the model's "
            "folder complete?"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}). Fetch or save the model again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected. Fetch or save the model again.")
    return value
