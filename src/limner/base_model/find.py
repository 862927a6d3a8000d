"""Find a base's folder, or fetch it from the Hub, and read its configs; no weights are read."""

from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from limner.base_model.base import INDEX, BaseModel
from limner.base_model.configs import holds_both_stages, read_component_configs, read_index
from limner.base_model.hub import check_hub_name, fetch_files, list_repository_files
from limner.base_model.importers import flax
from limner.base_model.importers.flax import FLAX_FILES
from limner.base_model.json_files import read_json
from limner.base_model.weight_files import choose_files
from limner.config.schema import ModelSettings
from limner.errors import InputError
from limner.families.family import Family
from limner.protocols import BaseConfigs


def find_base(model: ModelSettings, family: Family) -> BaseModel:
    """Find a base and read its configs; the weights of a Hub repository are not fetched.

    Raises:
        InputError: for what is no folder of this family in the diffusers layout.
        HubError: when the Hub refuses or cannot be reached.
    """
    external_folders: dict[str, Path] = {}
    commit = None
    if path_exists("model.base", model.base):
        folder = check_folder(Path(model.base), model)
    else:
        folder = fetch_configs(model)
        commit = folder.name
        if model.trained_revision is not None:
            trained = family.network.component
            other_commit = fetch_files(model, model.trained_revision, [f"{trained}/*.json"])
            external_folders[trained] = other_commit / trained
    # A model of another family is refused before weights are fetched or converted.
    index = read_index(folder, family)
    if flax.is_flax(index):
        if commit is not None:
            patterns = [f"{component}/{file}" for component, file in FLAX_FILES.items()]
            fetch_files(model, commit, patterns, tqdm)
            commit = None
        folder = flax.convert(folder)
        index = read_index(folder, family)
    stage = family.stage
    if stage is not None and stage.prefix and holds_both_stages(folder, stage):
        for component in family.components:
            external_folders[component] = folder / f"{stage.prefix}{component}"
    if model.vae is not None:
        if "vae" not in family.components:
            raise InputError(
                f"model.vae: family {family.name!r} has no autoencoder of that kind. Leave "
                "model.vae out."
            )
        external_folders["vae"] = find_vae(replace(model, base=model.vae))
    components = read_component_configs(folder, external_folders, family, index)
    return BaseModel(
        folder=folder,
        external_folders=external_folders,
        trained_component=family.network.component,
        name=model.base,
        commit=commit,
        variant=model.variant,
        configs=BaseConfigs(index, components),
    )


def check_base_name(model: ModelSettings) -> None:
    """Refuse a base that is neither here nor a name on the Hub."""
    if not path_exists("model.base", model.base):
        check_hub_name(model.base, "model.base", "a folder in the diffusers layout")


def path_exists(setting: str, name: str) -> bool:
    """Return whether there is something at a path.

    Raises:
        InputError: for what cannot be a path, or a place that may not be looked at.
    """
    try:
        # Before Python 3.12, exists() takes a NUL for a file that is not there.
        if "\0" in name:
            raise ValueError("it holds a NUL byte")
        return Path(name).exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{setting}: {name[:80]!r} is no path to a folder: {reason}. Give a folder in the "
            "diffusers layout, or a name on the Hub (owner/name)."
        ) from error


def check_folder(path: Path, model: ModelSettings) -> Path:
    """Refuse what is no folder, with what to do instead; return the absolute path."""
    if path.suffix == ".gguf" and path.is_file():
        raise InputError(
            f"model.base: {path} is a GGUF file: quantized weights cannot be trained. Give "
            "the model's diffusers folder, or its name on the Hub."
        )
    if path.is_file():
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


def fetch_configs(model: ModelSettings) -> Path:
    """Fetch all of a Hub repository but the weights; return the folder, named by its commit."""
    check_base_name(model)
    folder = fetch_files(model, model.revision, [INDEX, "README.md"])
    patterns = []
    for name in read_json(folder / INDEX):
        if not name.startswith("_"):
            patterns += [f"{name}/*.json", f"{name}/*.txt", f"{name}/*.model"]
    fetch_files(model, folder.name, patterns)
    return folder


def find_vae(model: ModelSettings) -> Path:
    """Find an autoencoder with its weights, by itself or in a pipeline's folder.

    Args:
        model: where ``base`` is the autoencoder's folder or Hub repository.
    """
    if path_exists("model.vae", model.base):
        folder = find_vae_folder(Path(model.base).absolute())
    else:
        folder = fetch_vae(model)
    class_name = read_json(folder / "config.json").get("_class_name")
    if class_name != "AutoencoderKL":
        raise InputError(
            f"model.vae: {folder / 'config.json'} is of a {class_name}, AutoencoderKL is expected. "
            "Choose another autoencoder, or leave model.vae out."
        )
    return folder


def find_vae_folder(folder: Path) -> Path:
    """Return the folder itself where it is an autoencoder's, else the one that a pipeline has."""
    return folder if (folder / "config.json").is_file() else folder / "vae"


def fetch_vae(model: ModelSettings) -> Path:
    """Fetch an autoencoder from the Hub; return its folder."""
    check_hub_name(model.base, "model.vae", "a folder that holds an autoencoder")
    repository = fetch_files(model, None, ["config.json", "vae/config.json"])
    folder = find_vae_folder(repository)
    prefix = "" if folder == repository else "vae/"
    names = []
    for path in list_repository_files(model, repository):
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and "/" not in name:
            names.append(name)
    wanted = [f"{prefix}{name}" for name in choose_files("vae", names, model.variant, "diffusers")]
    fetch_files(model, repository.name, wanted, tqdm)
    return folder
