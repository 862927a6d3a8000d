"""Find a base or fetch it, and refuse what cannot be trained before a weight is read."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm import tqdm

from limner.base_model.base import INDEX, BaseModel, read_json
from limner.base_model.hub import HUB_NAME, endpoint, fetch_files, hub_errors, list_repository_files
from limner.base_model.importers import flax
from limner.base_model.importers.flax import FLAX_FILES
from limner.base_model.weight_files import (
    check_length,
    choose_files,
    has_usable_weights,
    list_files,
    parse_variant,
)
from limner.config import toml
from limner.config.schema import ModelSettings
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.family import Family
from limner.protocols import Configs, ModelSource
from limner.storage.layout import LORA_FILE

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


def open_base(model: ModelSettings, family: Family, *, draws: bool = True) -> BaseModel:
    """Find the base, or fetch it from the Hub, and refuse what cannot be trained or what would run
    code.

    Args:
        draws: whether pictures will be made with it: of a model in two stages that takes all of the
            other stage, else only what features are made with.

    Raises:
        InputError: for what is not a folder of this family in the diffusers layout with safetensors
            weights.
        HubError: when the Hub refuses or cannot be reached.
    """
    base, other_stage = read_base(model, family), None
    if model.other_stage is not None and family.stage is None:
        raise InputError(
            f"model.other_stage: a base of family {family.name!r} makes pictures alone. Leave "
            "model.other_stage out."
        )
    if family.stage is not None:
        other_stage = open_other_stage(model, family, base, draws)
    if other_stage is not None and family.stage is not None:
        needed = {name: other_stage.configs[name] for name in family.stage.needed_components}
        base = replace(
            base,
            other_stage=other_stage,
            configs=base.configs | needed,
            external_folders=base.external_folders
            | {name: other_stage.component_folder(name) for name in needed},
        )
    check_compatible(base, family)
    components = [*family.components, *extra_components(base, family)]
    if base.commit is not None:
        fetch_weights(base, model, components, family)
    check_weights(base, components_with_weights(family), components)
    if base.variant is not None and not any(
        parse_variant(path) == base.variant
        for c in components_with_weights(family)
        for path in base.weight_files(c)
    ):
        raise InputError(
            f"model.variant: {base.name} has no weights of variant {base.variant!r}, only plain "
            "ones. Leave model.variant out."
        )
    if family.frozen_arrays:
        base.configs["fixed"] = {name: read_tensor(base, name) for name in family.frozen_arrays}
        check_compatible(base, family)
    return base


def check_compatible(base: BaseModel, family: Family) -> None:
    """Refuse parts that are not of one model."""
    if problems := family.incompatibilities(base.configs):
        raise InputError(f"{base.name}: " + "\n".join(problems))


def open_other_stage(
    model: ModelSettings, family: Family, base: BaseModel, draws: bool
) -> BaseModel | None:
    """The other stage: what ``model.other_stage`` names, or the rest of a folder that holds both.

    Raises:
        InputError: when there is none, and features or pictures are made with it.
    """
    stage = family.stage
    assert stage is not None
    other = FAMILIES[stage.other_stage]
    holds_both = read_json(base.folder / INDEX).get("_class_name") == stage.combined_pipeline
    if model.other_stage is None and not holds_both:
        if stage.needed_components or draws:
            why = (
                f"its {' and '.join(stage.needed_components)} make features"
                if stage.needed_components
                else "pictures are made with both"
            )
            raise InputError(
                f"model.other_stage: {model.base} goes with a {other.pipeline}, and {why}. Give "
                "its "
                "folder, or its name on the Hub."
            )
        return None
    named = replace(model, revision=None, trained_revision=None, vae=None, other_stage=None)
    if model.other_stage is not None:
        named = replace(named, base=model.other_stage)
    else:
        named = replace(named, revision=model.revision)
    named, adapter = resolve_run(named)
    found = replace(read_base(named, other), adapter=adapter)
    wanted = list(other.components) if draws else list(stage.needed_components)
    if found.commit is not None:
        fetch_weights(found, named, wanted, other)
    check_weights(found, [c for c in components_with_weights(other) if c in wanted], wanted)
    return found


def resolve_run(model: ModelSettings) -> tuple[ModelSettings, Path | None]:
    """The base of a run whose result is a LoRA, and that LoRA's folder; else what was given."""
    folder = Path(model.base)
    if (
        not (folder / LORA_FILE).is_file()
        or (folder / INDEX).is_file()
        or not (folder / "config.json").is_file()
    ):
        return model, None
    trained = toml.build(ModelSettings, read_json(folder / "config.json").get("model", {}))
    return replace(trained, other_stage=None), folder.absolute()


def read_base(model: ModelSettings, family: Family) -> BaseModel:
    """A base with its configs; no weight is looked at, nor fetched."""
    path = Path(model.base)
    elsewhere: dict[str, Path] = {}
    if path.exists():
        folder, commit = check_folder(path, model), None
    else:
        if not HUB_NAME.fullmatch(model.base):
            raise InputError(
                f"model.base: {model.base}: no such folder, and not a name on the Hub "
                "(owner/name). Give a folder in the diffusers layout or such a name."
            )
        folder = fetch_files(model, model.revision, [INDEX, "README.md"])
        commit = folder.name
        fetch_files(
            model,
            commit,
            [
                f"{c}/*.{end}"
                for c in read_json(folder / INDEX)
                for end in ("json", "txt", "model")
                if not c.startswith("_")
            ],
        )
        if model.trained_revision is not None:
            elsewhere[family.trained_component] = (
                fetch_files(model, model.trained_revision, [f"{family.trained_component}/*.json"])
                / family.trained_component
            )
    index = read_index(
        folder, family
    )  # a model of another family is refused before weights are fetched or converted
    if flax.is_flax(index):
        if commit is not None:
            fetch_files(
                model, commit, [f"{name}/{file}" for name, file in FLAX_FILES.items()], tqdm
            )
        folder, commit = flax.convert(folder), None
        index = read_index(folder, family)
    if (
        family.stage is not None
        and family.stage.prefix
        and read_json(folder / INDEX).get("_class_name") == family.stage.combined_pipeline
    ):
        elsewhere |= {name: folder / f"{family.stage.prefix}{name}" for name in family.components}
    if model.vae is not None:
        if "vae" not in family.components:
            raise InputError(
                f"model.vae: family {family.name!r} has no autoencoder of that kind. Leave "
                "model.vae out."
            )
        elsewhere["vae"] = open_vae(replace(model, base=model.vae))
    return BaseModel(
        folder,
        elsewhere,
        family.trained_component,
        model.base,
        commit,
        model.variant,
        {"model_index": index} | read_configs(folder, elsewhere, family),
    )


def read_tensor(base: BaseModel, name: str) -> list[Any]:
    """A small array of the trained component, as lists."""
    for path in base.weight_files(base.trained_component):
        with safe_open(path, "np") as file:
            if name in file.keys():  # noqa: SIM118 - it is no dict
                found: list[Any] = file.get_tensor(name).astype("float32").tolist()
                return found
    raise InputError(
        f"{base.component_folder(base.trained_component)}: its weights have no {name}. Is it a "
        f"{base.component_class(base.trained_component)[1]}? Fetch or copy the model again."
    )


def open_vae(model: ModelSettings) -> Path:
    """The folder of an autoencoder by itself, or of the one in a pipeline's folder, with its
    weights.

    Args:
        model: where ``base`` is the autoencoder's folder or Hub repository.
    """
    if Path(model.base).exists():
        folder = Path(model.base).absolute()
        place = folder if (folder / "config.json").is_file() else folder / "vae"
    else:
        if not HUB_NAME.fullmatch(model.base):
            raise InputError(
                f"model.vae: {model.base}: no such folder, and not a name on the Hub "
                "(owner/name). Give a folder that holds an autoencoder."
            )
        folder = fetch_files(model, None, ["config.json", "vae/config.json"])
        place = folder if (folder / "config.json").is_file() else folder / "vae"
        prefix = "" if place == folder else "vae/"
        names = [
            name.removeprefix(prefix)
            for name in list_repository_files(model, folder)
            if name.startswith(prefix)
        ]
        fetch_files(
            model,
            folder.name,
            [
                f"{prefix}{name}"
                for name in choose_files("vae", [n for n in names if "/" not in n], model.variant)
            ],
            tqdm,
        )
    given = read_json(place / "config.json").get("_class_name")
    if given != "AutoencoderKL":
        raise InputError(
            f"model.vae: {place / 'config.json'} is of a {given}, AutoencoderKL is expected. "
            "Choose another autoencoder, or leave model.vae out."
        )
    return place


def check_folder(path: Path, model: ModelSettings) -> Path:
    """Refuse what is no diffusers folder, saying how to make one of it."""
    if path.is_file():
        if path.suffix == ".gguf":
            raise InputError(
                f"model.base: {path} is a GGUF file: quantized weights cannot be trained. Give "
                "the model's diffusers folder, or its name on the Hub."
            )
        how = f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained('a-folder')"
        raise InputError(
            f"model.base: {path} is a single file; a folder in the diffusers layout is needed. "
            f"Convert it once, with diffusers: {how}, and give that folder."
        )
    for name in ("revision", "trained_revision"):
        if getattr(model, name) is not None:
            raise InputError(
                f"model.{name}: {model.base} is a folder; only a Hub repository has revisions. "
                f"Leave model.{name} out."
            )
    return path.absolute()


def read_pipeline_class(weights: ModelSource) -> str:
    """The pipeline class that a model's index names.

    Raises:
        InputError: when there is none.
        HubError: when the Hub refuses or cannot be reached.
    """
    import huggingface_hub

    folder = Path(weights.model)
    if not folder.is_dir():
        with hub_errors(weights.model, weights.revision):
            found = huggingface_hub.hf_hub_download(
                weights.model,
                INDEX,
                revision=weights.revision,
                cache_dir=weights.cache_dir,
                endpoint=endpoint(),
            )
        folder = Path(found).parent
    return str(read_json(folder / INDEX).get("_class_name"))


def read_index(folder: Path, family: Family) -> dict[str, Any]:
    """``model_index.json``, checked against the family; of a folder that holds both stages, the
    index of this one."""
    if not (folder / INDEX).is_file():
        needed = f"Give the folder that holds {INDEX} beside {', '.join(family.components)}."
        raise InputError(
            f"model.base: {folder} has no {INDEX}, so it is not a pipeline folder in the "
            f"diffusers layout. {needed}"
        )
    index = read_json(folder / INDEX)
    old = "Flax" if flax.is_flax(index) else ""
    given, whole = (
        str(index.get("_class_name")).removeprefix(old),
        family.stage.combined_pipeline if family.stage is not None else None,
    )
    if given not in (family.pipeline, whole):
        needed = (
            f"family {family.name!r} needs a {family.pipeline}. Choose another base, or the "
            "model.family it belongs to."
        )
        raise InputError(f"model.base: {folder / INDEX} is of a {given}; {needed}")
    if family.stage is not None and given == whole:
        own = {
            name: index.get(f"{family.stage.prefix}{name}", [None, None])
            for name in family.components
        }
        index = (
            {k: v for k, v in index.items() if k == "_diffusers_version"}
            | own
            | {"_class_name": family.pipeline}
        )
    for name, (library, cls) in listed_components(index).items():
        if library not in LIBRARIES or re.fullmatch(r"[\w-]+", name) is None:
            code = (
                f"{name} is a {library}.{cls}, code that comes with the model. Such code is never "
                "run; choose a base of stock components."
            )
            raise InputError(f"model.base: {folder / INDEX}: {code}")
    for name, wanted in family.components.items():
        library, cls = listed_components(index).get(name, ("", "missing"))
        if cls == "missing" or (
            wanted and cls.removeprefix(old) not in (wanted, wanted + "Fast", wanted + "Pil")
        ):
            raise InputError(
                f"model.base: {folder / INDEX}: {name} is {cls}, {wanted or 'a scheduler'} is "
                f"expected for family {family.name!r}."
            )
    return index


def listed_components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that an index names, as (library, class)."""
    return {
        k: (v[0], v[1])
        for k, v in index.items()
        if not k.startswith("_") and isinstance(v, list) and len(v) == 2 and v[1] is not None
    }


def extra_components(base: BaseModel, family: Family) -> list[str]:
    """Components that the index names beyond the family's own."""
    return [
        name
        for name in listed_components(base.configs["model_index"])
        if name not in family.components
    ]


def read_configs(folder: Path, elsewhere: dict[str, Path], family: Family) -> Configs:
    """The config of every component of the family."""
    configs: Configs = {}
    for name in family.components:
        where, file = elsewhere.get(name, folder / name), config_file_name(family, name)
        configs[name] = read_json(where / file)
        if "auto_map" in configs[name]:
            raise InputError(
                f"{where / file}: auto_map asks for code that comes with the model. Such code is "
                "never run; choose a base of stock components."
            )
        if name in family.tokenizers and not (
            (where / "tokenizer.json").is_file()
            or ((where / "vocab.json").is_file() and (where / "merges.txt").is_file())
        ):
            raise InputError(
                f"{where}: neither tokenizer.json nor vocab.json and merges.txt are there. Is the "
                "model's folder complete?"
            )
    return configs


def config_file_name(family: Family, component: str) -> str:
    """The name of a component's config; only what has a ``config.json`` has weights."""
    if component in family.tokenizers:
        return "tokenizer_config.json"
    return {"": "scheduler_config.json", "CLIPImageProcessor": "preprocessor_config.json"}.get(
        family.components[component], "config.json"
    )


def check_weights(base: BaseModel, needed: Iterable[str], components: Iterable[str]) -> None:
    """Every weight file of what is needed must be there, and each file must be as long as its own
    header says; nothing but headers is read."""
    needed = list(needed)
    usables = [
        c
        for c in components
        if c not in needed
        and has_usable_weights(c, list_files(base.component_folder(c)), base.variant)
    ]
    for path in [
        path for component in (*needed, *usables) for path in base.weight_files(component)
    ]:
        check_length(path)


def fetch_weights(
    base: BaseModel, model: ModelSettings, components: Iterable[str], family: Family
) -> None:
    """Fetch the chosen weights of these components; what is not there is refused before the first
    file is fetched."""
    components = list(components)
    for folder in dict.fromkeys(
        (base.folder, base.component_folder(base.trained_component).parent)
    ):
        names = list_repository_files(model, folder)
        files = []
        for component in (c for c in components if base.component_folder(c).parent == folder):
            place = base.component_folder(component).name
            inner = [
                name.removeprefix(f"{place}/") for name in names if name.startswith(f"{place}/")
            ]
            if component in components_with_weights(family) or (
                component not in family.components
                and has_usable_weights(component, inner, base.variant)
            ):
                files += [
                    f"{place}/{name}" for name in choose_files(component, inner, base.variant)
                ]
        if missing := [name for name in files if not (folder / name).is_file()]:
            fetch_files(model, folder.name, missing, tqdm)


def components_with_weights(family: Family) -> list[str]:
    """The components of a family that have weights."""
    return [c for c in family.components if config_file_name(family, c) == "config.json"]
