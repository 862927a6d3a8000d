"""Read the JSON files of a folder in the diffusers layout, and refuse what is not of a family."""

import re
from pathlib import Path

from limner.base_model.base import INDEX
from limner.base_model.importers import flax
from limner.base_model.json_files import read_json
from limner.diffusion.base_schedulers import FLOW, check_scheduler
from limner.errors import InputError
from limner.families.family import Family, Stage
from limner.json_types import Plain

# Libraries whose classes stock pipelines are made of.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


def read_index(folder: Path, family: Family) -> Plain:
    """Read ``model_index.json``; of a folder that holds both stages, the part of this one.

    Raises:
        InputError: when there is none, when it is of another family, or when a component is code
            that comes with the model.
    """
    path = folder / INDEX
    if not path.is_file():
        raise InputError(
            f"model.base: {folder} has no {INDEX}, so it is not a pipeline folder in the "
            f"diffusers layout. Give the folder that holds {INDEX} beside "
            f"{', '.join(family.components)}."
        )
    index = read_json(path)
    prefix = "Flax" if flax.is_flax(index) else ""
    pipeline = str(index.get("_class_name")).removeprefix(prefix)
    combined_pipeline = None if family.stage is None else family.stage.combined_pipeline
    if pipeline not in (family.pipeline, combined_pipeline):
        raise InputError(
            f"model.base: {path} is of a {pipeline}; family {family.name!r} needs a "
            f"{family.pipeline}. Choose another base, or the model.family it belongs to."
        )
    if family.stage is not None and pipeline == combined_pipeline:
        index = select_stage(index, family, family.stage)
    check_libraries(path, index)
    check_classes(path, index, family, prefix)
    return index


def select_stage(index: Plain, family: Family, stage: Stage) -> Plain:
    """Return the index that one stage would have alone, from the index of both stages."""
    selected = {name: value for name, value in index.items() if name == "_diffusers_version"}
    for name in family.components:
        selected[name] = index.get(f"{stage.prefix}{name}", [None, None])
    return selected | {"_class_name": family.pipeline}


def check_libraries(path: Path, index: Plain) -> None:
    """Refuse components of other libraries: those are code in the model's folder."""
    for name, (library, class_name) in list_components(index).items():
        if library not in LIBRARIES or re.fullmatch(r"[\w-]+", name) is None:
            raise InputError(
                f"model.base: {path}: {name} is a {library}.{class_name}, code that comes with the "
                "model. Such code is never run; choose a base of stock components."
            )


def check_classes(path: Path, index: Plain, family: Family, prefix: str) -> None:
    """Refuse an index whose components are not those of the family.

    Args:
        prefix: what class names begin with, "Flax" or nothing.
    """
    components = list_components(index)
    for name, wanted in family.components.items():
        _, class_name = components.get(name, ("", "missing"))
        # Tokenizers and image processors have variants that read and write the same files.
        accepted = (wanted, f"{wanted}Fast", f"{wanted}Pil")
        if class_name == "missing" or (wanted and class_name.removeprefix(prefix) not in accepted):
            raise InputError(
                f"model.base: {path}: {name} is {class_name}, {wanted or 'a scheduler'} is "
                f"expected for family {family.name!r}."
            )
        if name == "scheduler":
            check_scheduler(class_name.removeprefix(prefix), flow=wanted == FLOW)


def list_components(index: Plain) -> dict[str, tuple[str, str]]:
    """Return the components that an index names, each as (library, class)."""
    components = {}
    for name, value in index.items():
        is_pair = isinstance(value, list) and len(value) == 2
        if is_pair and value[1] is not None and not name.startswith("_"):
            components[name] = (str(value[0])[:80], str(value[1])[:80])
    return components


def holds_both_stages(folder: Path, stage: Stage) -> bool:
    """Return whether a folder is of the pipeline that combines both stages."""
    return read_json(folder / INDEX).get("_class_name") == stage.combined_pipeline


def read_component_configs(
    folder: Path, external_folders: dict[str, Path], family: Family, index: Plain
) -> dict[str, Plain]:
    """Read the config of every component of a family.

    Args:
        index: as ``read_index`` gives it.

    Raises:
        InputError: when one is missing, or asks for code that comes with the model.
    """
    configs = {}
    for component in family.components:
        component_folder = external_folders.get(component, folder / component)
        check_files(component_folder)
        path = component_folder / name_config_file(family, component)
        configs[component] = read_json(path)
        if component == "scheduler":
            configs[component] = settle_scheduler(configs[component], index)
        check_places(component_folder, configs[component])
        if "auto_map" in configs[component]:
            raise InputError(
                f"{path}: auto_map asks for code that comes with the model. Such code is never "
                "run; choose a base of stock components."
            )
        if component in family.text.tokenizers and not has_vocabulary(component_folder):
            raise InputError(
                f"{component_folder}: neither tokenizer.json nor vocab.json and merges.txt are "
                "there. Is the model's folder complete?"
            )
    return configs


def check_files(folder: Path) -> None:
    """Refuse pipes and devices in a component's folder: to read them might never end.

    Raises:
        InputError: naming the first one, or saying why the folder cannot be listed.
    """
    try:
        odd = [path for path in sorted(folder.glob("*")) if is_odd(path)]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}. Mend it first.") from error
    if odd:
        raise InputError(
            f"{odd[0]}: it is neither a file nor a folder. Fetch or copy the model again."
        )


def check_places(folder: Path, config: Plain) -> None:
    """Refuse a component that transformers would read from elsewhere than from its usual files.

    Args:
        config: the component's.

    Raises:
        InputError: naming what says so.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder / 'adapter_config.json'}: transformers would put an adapter on this "
            "component, or read another model in its place. Merge it, or move it away."
        )
    for name in ("transformers_weights", "fast_tokenizer_files"):
        if config.get(name):
            raise InputError(
                f"{folder}: its config names other files as {name}, which is not followed. Save "
                "the model again by save_pretrained."
            )


def is_odd(path: Path) -> bool:
    """Return whether something is there that is no file and no folder, as a link of a circle."""
    return not (path.is_file() or path.is_dir())


def settle_scheduler(config: Plain, index: Plain) -> Plain:
    """Return a scheduler's config under the class of the index, which is the one that draws.

    Raises:
        InputError: when it was written by a class with another kind of noise.
    """
    class_name = index["scheduler"][1]
    check_scheduler(config.get("_class_name", class_name), flow=class_name == FLOW)
    return config | {"_class_name": class_name}


def has_vocabulary(folder: Path) -> bool:
    """Return whether a tokenizer's folder holds its vocabulary, in either format."""
    if (folder / "tokenizer.json").is_file():
        return True
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def name_config_file(family: Family, component: str) -> str:
    """Return the name of a component's config; only what has a ``config.json`` has weights."""
    if component in family.text.tokenizers:
        return "tokenizer_config.json"
    if component == "scheduler":
        return "scheduler_config.json"
    is_processor = family.components[component] == "CLIPImageProcessor"
    return "preprocessor_config.json" if is_processor else "config.json"


def list_components_with_weights(family: Family) -> list[str]:
    """Return the components of a family that have weights."""
    return [c for c in family.components if name_config_file(family, c) == "config.json"]
