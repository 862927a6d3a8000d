"""Open a base: find it or fetch it, and refuse what cannot be trained before a weight is read."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from limner.base_model.base import INDEX, BaseModel
from limner.base_model.comparison import explain_faults
from limner.base_model.configs import (
    holds_both_stages,
    list_components,
    list_components_with_weights,
)
from limner.base_model.find import find_base, path_exists
from limner.base_model.hub import endpoint, fetch_files, hub_errors, list_repository_files
from limner.base_model.json_files import read_json
from limner.base_model.weight_files import (
    INDEX_NAME,
    check_length,
    choose_files,
    has_usable_weights,
    list_named_files,
    parse_variant,
)
from limner.config import toml
from limner.config.schema import Config, ModelSettings
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.family import Family, Stage
from limner.families.text import list_other_sides
from limner.protocols import ModelSource
from limner.storage import safetensors
from limner.storage.layout import LORA_FILE
from limner.storage.run_folder import RunFolder


def open_base(model: ModelSettings, family: Family, *, for_generation: bool = True) -> BaseModel:
    """Find a base, or fetch it, and refuse what cannot be trained or what would run code.

    Args:
        for_generation: whether pictures will be made with it: of a model in two stages that takes
            all of the other stage, else only what features are made with.

    Raises:
        InputError: for what is not a folder of this family in the diffusers layout with safetensors
            weights.
        HubError: when the Hub refuses or cannot be reached.
    """
    base = find_base(model, family)
    if family.stage is not None:
        base = add_other_stage(base, model, family.stage, for_generation)
    elif model.other_stage is not None:
        raise InputError(
            f"model.other_stage: a base of family {family.name!r} makes pictures alone. Leave "
            "model.other_stage out."
        )
    check_compatible(base, family)
    components = [*family.components, *extra_components(base, family)]
    if base.commit is not None:
        fetch_weights(base, model, components, family)
    check_weights(base, list_components_with_weights(family), components)
    check_variant(base, family)
    if family.images.statistics:
        arrays = {name: read_statistic(base, name) for name in family.images.statistics}
        base = replace(base, configs=replace(base.configs, statistics=arrays))
        check_compatible(base, family)
    return base


def check_compatible(base: BaseModel, family: Family) -> None:
    """Refuse components that are not of one model."""
    with explain_faults(f"{base.name}: its configs cannot be compared with one another"):
        problems = family.incompatibilities(base.configs)
        problems += list_other_sides(family.text, base.configs)
    if problems:
        raise InputError(f"{base.name}: " + "\n".join(problems))


def check_variant(base: BaseModel, family: Family) -> None:
    """Refuse a variant of which no component has weights, of the other stage neither."""
    if base.variant is None:
        return
    paths = [
        path for name in list_components_with_weights(family) for path in base.weight_files(name)
    ]
    if base.other_stage is not None and family.stage is not None:
        other = FAMILIES[family.stage.other_stage]
        for name in list_components_with_weights(other):
            if name in base.other_stage.configs.components:
                paths += base.other_stage.weight_files(name)
    refuse_missing_variant(base, paths)


def refuse_missing_variant(base: BaseModel, paths: Iterable[Path]) -> None:
    """Refuse the variant of a base if none of these weight files is of it."""
    if not any(parse_variant(path) == base.variant for path in paths):
        raise InputError(
            f"model.variant: {base.name} has no weights of variant {base.variant!r}, only plain "
            "ones. Leave model.variant out."
        )


def add_other_stage(
    base: BaseModel, model: ModelSettings, stage: Stage, for_generation: bool
) -> BaseModel:
    """Return a base with its other stage, and with the components of it that features need."""
    other_stage = open_other_stage(base, model, stage, for_generation)
    if other_stage is None:
        return base
    configs = {name: other_stage.configs[name] for name in stage.needed_components}
    folders = {name: other_stage.component_folder(name) for name in stage.needed_components}
    return replace(
        base,
        other_stage=other_stage,
        configs=replace(base.configs, components=base.configs.components | configs),
        external_folders=base.external_folders | folders,
    )


def open_other_stage(
    base: BaseModel, model: ModelSettings, stage: Stage, for_generation: bool
) -> BaseModel | None:
    """Open what ``model.other_stage`` names, or the rest of a folder that holds both stages.

    Raises:
        InputError: when there is none, and features or pictures are made with it.
    """
    family = FAMILIES[stage.other_stage]
    if model.other_stage is None and not holds_both_stages(base.folder, stage):
        if not stage.needed_components and not for_generation:
            return None
        why = "pictures are made with both"
        if stage.needed_components:
            why = f"its {' and '.join(stage.needed_components)} make features"
        raise InputError(
            f"model.other_stage: {model.base} goes with a {family.pipeline}, and {why}. Give its "
            "folder, or its name on the Hub."
        )
    settings = replace(model, revision=None, trained_revision=None, vae=None, other_stage=None)
    if model.other_stage is not None:
        settings = replace(settings, base=model.other_stage)
    else:
        settings = replace(settings, revision=model.revision)
    settings, adapter, predict = resolve_run(settings)
    other = replace(find_base(settings, family), adapter=adapter, prediction_type=predict)
    wanted = list(family.components) if for_generation else list(stage.needed_components)
    if other.commit is not None:
        fetch_weights(other, settings, wanted, family)
    needed = [name for name in list_components_with_weights(family) if name in wanted]
    check_weights(other, needed, wanted)
    return other


def resolve_run(model: ModelSettings) -> tuple[ModelSettings, Path | None, str | None]:
    """Return the base of a run whose result is a LoRA, that LoRA's folder, and what it was trained
    to predict; else ``model``."""
    if not path_exists("model.other_stage", model.base):
        return model, None, None
    folder = Path(model.base)
    config = RunFolder(folder).config
    is_lora = (folder / LORA_FILE).is_file() and not (folder / INDEX).is_file()
    if not is_lora or not config.is_file():
        return model, None, None
    run = read_json(config)
    sections = {name: run.get(name) or {} for name in ("model", "objective")}
    trained: Config = toml.build(Config, sections)
    settings = replace(trained.model, other_stage=None)
    return settings, folder.absolute(), trained.objective.predict


def extra_components(base: BaseModel, family: Family) -> list[str]:
    """Return the components that the index names beyond the family's own."""
    components = list_components(base.configs.model_index)
    return [name for name in components if name not in family.components]


def check_weights(base: BaseModel, needed: Iterable[str], components: Iterable[str]) -> None:
    """Check that each weight file is as long as its header says; only headers are read.

    Args:
        needed: components that must have weights.
        components: further ones, whose weights are checked where there are any.
    """
    with_weights = list(needed)
    for component in components:
        if component not in with_weights and base.has_usable_weights(component):
            with_weights.append(component)
    # All files are found before the first is opened: a missing one is reported first.
    paths = [path for component in with_weights for path in base.weight_files(component)]
    for path in paths:
        check_length(path)


def fetch_weights(
    base: BaseModel, model: ModelSettings, components: Iterable[str], family: Family
) -> None:
    """Fetch the weights of components; a missing one is refused before the first is fetched."""
    wanted = choose_fetched_files(base, model, list(components), family)
    paths = [Path(name) for files in wanted.values() for name in files]
    # Of two stages the variant may be the other one's, and is looked for when both are here.
    if base.variant is not None and family.stage is None:
        refuse_missing_variant(base, paths)
    for folder, files in wanted.items():
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            fetch_files(model, folder.name, missing, tqdm)


def choose_fetched_files(
    base: BaseModel, model: ModelSettings, components: list[str], family: Family
) -> dict[Path, list[str]]:
    """Choose the weight files of components, by the folder of their repository's commit."""
    trained_folder = base.component_folder(base.trained_component).parent
    wanted: dict[Path, list[str]] = {}
    for folder in dict.fromkeys((base.folder, trained_folder)):
        names = list_repository_files(model, folder)
        wanted[folder] = []
        for component in components:
            if base.component_folder(component).parent == folder:
                wanted[folder] += choose_repository_files(base, component, names, family)
    return wanted


def choose_repository_files(
    base: BaseModel, component: str, names: list[str], family: Family
) -> list[str]:
    """Choose the weight files of a component among the files of its repository.

    Raises:
        InputError: when a component of the family has none.
    """
    prefix = f"{base.component_folder(component).name}/"
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    library = base.component_class(component)[0]
    if component in family.components:
        is_wanted = component in list_components_with_weights(family)
    else:
        is_wanted = has_usable_weights(component, inner, base.variant, library)
    if not is_wanted:
        return []
    files = choose_files(component, inner, base.variant, library)
    if INDEX_NAME.fullmatch(files[0]):
        files += list_named_files(base.component_folder(component) / files[0])
    return [f"{prefix}{name}" for name in files]


def check_trained_on(base: BaseModel, family: Family, source: ModelSource) -> None:
    """Refuse a base that is not the one a LoRA was trained on, where that is known.

    Raises:
        InputError: when its weights or configs are others.
    """
    if source.base_digest is None:
        return
    if base.fingerprint(*family.feature_components) != source.base_digest:
        raise InputError(
            f"{source.lora}: its base {base.name} is not what it was trained on: the weights or "
            f"configuration have changed. Put it back; or give --base {base.name} to draw with it "
            "as it is."
        )
    scheduler = base.scheduler_class
    if source.scheduler not in (None, "", scheduler):
        raise InputError(
            f"{source.lora}: its base {base.name} had a {source.scheduler} when it was trained on, "
            f"and {INDEX} names a {scheduler} now, which draws other pictures. Put it back; or "
            f"give --base {base.name} to draw with it as it is."
        )


def read_statistic(base: BaseModel, name: str) -> np.ndarray:
    """Read a small array of the trained component, float32."""
    for path in base.weight_files(base.trained_component):
        if name in safetensors.read_header(path).arrays:
            return safetensors.read_float32(path, [name])[name]
    raise InputError(
        f"{base.component_folder(base.trained_component)}: its weights have no {name}. Is it a "
        f"{base.component_class(base.trained_component)[1]}? Fetch or copy the model again."
    )


def read_pipeline_class(weights: ModelSource) -> str:
    """Return the pipeline class that a model's index names.

    Raises:
        InputError: when there is none.
        HubError: when the Hub refuses or cannot be reached.
    """
    import huggingface_hub

    folder = Path(weights.model)
    if not folder.is_dir():
        with hub_errors(weights.model, weights.revision):
            path = huggingface_hub.hf_hub_download(
                weights.model,
                INDEX,
                revision=weights.revision,
                cache_dir=weights.cache_dir,
                endpoint=endpoint(),
            )
        folder = Path(path).parent
    return str(read_json(folder / INDEX).get("_class_name"))
