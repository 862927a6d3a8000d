"""The base model's folder: found or fetched, its parts checked before a weight is read, known by what its bytes are."""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from limner import config, durable
from limner.family import Configs, Family
from limner.faults import InputFault
from limner.hub import HUB_NAME, endpoint, hub_errors

INDEX = "model_index.json"
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-(\d{5}))?(?:\.(\w+))?\.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


@dataclass(frozen=True)
class Base:
    """A diffusers folder that was found good. Weights are read by whoever needs them, never here."""

    folder: Path
    elsewhere: dict[str, Path]  # folders of components that are not in it
    trains: str  # the component that learns
    name: str  # what the user wrote
    commit: str | None  # of the Hub repository; None: a local folder
    variant: str | None
    configs: Configs = field(repr=False)  # component -> its config, and model_index

    def part(self, component: str) -> Path:
        """The folder of a component."""
        return self.elsewhere.get(component, self.folder / component)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, of the chosen variant where it has one."""
        return [self.part(component) / name for name in pick(component, names_in(self.part(component)), self.variant)]

    def fingerprint(self, *components: str) -> str:
        """A digest of configs, vocabularies and weights of these components: equal for equal bytes, wherever they lie."""
        known = {}
        for component in components:
            settings = {k: v for k, v in self.configs[component].items() if not k.startswith("_") and k != "transformers_version"}
            texts = [
                p
                for p in sorted(self.part(component).glob("*"))
                if p.name in ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
            ]
            weights = self.weight_files(component) if has_weights(names_in(self.part(component))) else []
            known[component] = [settings, *(_digest(p, p.stat().st_size, p.stat().st_mtime_ns) for p in [*texts, *weights])]
        return durable.digest_json(known)

    def card(self) -> dict[str, Any]:
        """What the front matter of the base's own model card says; empty where there is none."""
        import yaml

        path = self.folder / "README.md"
        parts = path.read_text(encoding="utf-8", errors="replace").split("---\n") if path.is_file() else []
        try:
            found = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else {}
        except yaml.YAMLError:
            found = {}
        return found if isinstance(found, dict) else {}


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    return durable.digest(path)


def open_base(model: config.Model, family: Family) -> Base:
    """Find the base, or fetch it from the Hub, and refuse what cannot be trained or what would run code.

    Raises:
        InputFault: for what is not a folder of this family in the diffusers layout with safetensors weights.
        HubFault: when the Hub refuses or cannot be reached.
    """
    path = Path(model.base)
    elsewhere: dict[str, Path] = {}
    if path.exists():
        folder, commit = check_folder(path, model), None
    else:
        if not HUB_NAME.fullmatch(model.base):
            raise InputFault(
                f"model.base: {model.base}: no such folder, and not a name on the Hub (owner/name). Give a folder in the diffusers layout or such a name."
            )
        folder = fetch(model, model.revision, [INDEX, "README.md"])
        commit = folder.name
        fetch(model, commit, [f"{c}/*.{end}" for c in read_index(folder, family) for end in ("json", "txt", "model")])
        if model.trained_revision is not None:
            elsewhere[family.trains] = fetch(model, model.trained_revision, [f"{family.trains}/*.json"]) / family.trains
    components = read_index(folder, family)
    if model.vae is not None:
        elsewhere["vae"] = open_vae(replace(model, base=model.vae))
    base = Base(folder, elsewhere, family.trains, model.base, commit, model.variant, read_configs(folder, elsewhere, family))
    if problems := family.misfits(base.configs):
        raise InputFault(f"{model.base}: " + "\n".join(problems))
    if commit is not None:
        fetch_weights(base, model, family, components)
    check_weights(base, family, components)
    return base


def open_vae(model: config.Model) -> Path:
    """The folder of an autoencoder by itself, or of the one in a pipeline's folder, with its weights.

    Args:
        model: where ``base`` is the autoencoder's folder or Hub repository.
    """
    if Path(model.base).exists():
        folder = Path(model.base).absolute()
        place = folder if (folder / "config.json").is_file() else folder / "vae"
    else:
        if not HUB_NAME.fullmatch(model.base):
            raise InputFault(f"model.vae: {model.base}: no such folder, and not a name on the Hub (owner/name). Give a folder that holds an autoencoder.")
        folder = fetch(model, None, ["config.json", "vae/config.json"])
        place = folder if (folder / "config.json").is_file() else folder / "vae"
        prefix = "" if place == folder else "vae/"
        names = [name.removeprefix(prefix) for name in listing(model, folder) if name.startswith(prefix)]
        fetch(model, folder.name, [f"{prefix}{name}" for name in pick("vae", [n for n in names if "/" not in n], model.variant)], tqdm)
    given = read_json(place / "config.json").get("_class_name")
    if given != "AutoencoderKL":
        raise InputFault(f"model.vae: {place / 'config.json'} is of a {given}, AutoencoderKL is expected. Choose another autoencoder, or leave model.vae out.")
    return place


def check_folder(path: Path, model: config.Model) -> Path:
    """Refuse what is no diffusers folder, saying how to make one of it."""
    if path.is_file():
        if path.suffix == ".gguf":
            raise InputFault(
                f"model.base: {path} is a GGUF file: quantized weights cannot be trained. Give the model's diffusers folder, or its name on the Hub."
            )
        how = f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained('a-folder')"
        raise InputFault(
            f"model.base: {path} is a single file; a folder in the diffusers layout is needed. Convert it once, with diffusers: {how}, and give that folder."
        )
    for name in ("revision", "trained_revision"):
        if getattr(model, name) is not None:
            raise InputFault(f"model.{name}: {model.base} is a folder; only a Hub repository has revisions. Leave model.{name} out.")
    return path.absolute()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputFault: when it is missing, or not an object in JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFault(f"{path}: {error.strerror}; a folder in the diffusers layout has it. Is the model's folder complete?") from error
    except ValueError as error:
        raise InputFault(f"{path}: not JSON ({error}). Fetch or save the model again.") from error
    if not isinstance(value, dict):
        raise InputFault(f"{path}: a JSON object is expected. Fetch or save the model again.")
    return value


def read_index(folder: Path, family: Family) -> dict[str, tuple[str, str]]:
    """The components that ``model_index.json`` names, as (library, class); checked against the family."""
    if not (folder / INDEX).is_file():
        needed = f"Give the folder that holds {INDEX} beside {', '.join(family.components)}."
        raise InputFault(f"model.base: {folder} has no {INDEX}, so it is not a pipeline folder in the diffusers layout. {needed}")
    index = read_json(folder / INDEX)
    given = index.get("_class_name")
    if given != family.pipeline:
        needed = f"family {family.name!r} needs a {family.pipeline}. Choose another base, or the model.family it belongs to."
        raise InputFault(f"model.base: {folder / INDEX} is of a {given}; {needed}")
    components = {k: (v[0], v[1]) for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and len(v) == 2 and v[1] is not None}
    for name, (library, cls) in components.items():
        if library not in LIBRARIES or re.fullmatch(r"[\w-]+", name) is None:
            code = f"{name} is a {library}.{cls}, code that comes with the model. Such code is never run; choose a base of stock components."
            raise InputFault(f"model.base: {folder / INDEX}: {code}")
    for name, wanted in family.components.items():
        library, cls = components.get(name, ("", "missing"))
        if cls == "missing" or (wanted and cls not in (wanted, wanted + "Fast")):
            raise InputFault(f"model.base: {folder / INDEX}: {name} is {cls}, {wanted or 'a scheduler'} is expected for family {family.name!r}.")
    return components


def read_configs(folder: Path, elsewhere: dict[str, Path], family: Family) -> Configs:
    """The config of every component of the family, and the index as ``model_index``."""
    configs: Configs = {"model_index": read_json(folder / INDEX)}
    for name, wanted in family.components.items():
        where = elsewhere.get(name, folder / name)
        file = "tokenizer_config.json" if name in family.tokenizers else "config.json" if wanted else "scheduler_config.json"
        configs[name] = read_json(where / file)
        if "auto_map" in configs[name]:
            raise InputFault(f"{where / file}: auto_map asks for code that comes with the model. Such code is never run; choose a base of stock components.")
        if name in family.tokenizers and not ((where / "tokenizer.json").is_file() or ((where / "vocab.json").is_file() and (where / "merges.txt").is_file())):
            raise InputFault(f"{where}: neither tokenizer.json nor vocab.json and merges.txt are there. Is the model's folder complete?")
    return configs


def names_in(folder: Path) -> list[str]:
    """The names of the files directly in a folder."""
    return sorted(p.name for p in folder.glob("*") if p.is_file())


def has_weights(names: Iterable[str]) -> bool:
    """Whether any of these files holds weights, in whatever format."""
    return any(name.endswith((".safetensors", ".gguf", *PICKLES)) for name in names)


def pick(component: str, names: Iterable[str], variant: str | None) -> list[str]:
    """Those of a component's files that hold its weights: the chosen variant's, else the plain ones.

    Raises:
        InputFault: when there are none, naming what there is instead.
    """
    names = sorted(names)
    found: dict[str | None, list[str]] = {}
    for name in names:
        if match := WEIGHTS.fullmatch(name):
            found.setdefault(match[1] or match[3], []).append(name)
    for wanted in (variant, None):
        files = found.get(wanted, [])
        whole = [n for n in files if "-of-" not in n]
        if files and not whole:
            count = int(WEIGHTS.fullmatch(files[0])[2])  # type: ignore[index]
            if len(files) != count:
                raise InputFault(f"{component}: {len(files)} of {count} weight files are there. Fetch or copy the model again.")
        if files:
            return whole[:1] or files
    variants = sorted(v for v in found if v is not None)
    if variants:
        raise InputFault(f"{component}: there are no plain weights, only variants: {', '.join(variants)}. Pass model.variant={variants[0]}.")
    if pickles := [n for n in names if n.endswith(PICKLES)]:
        how = "load it with diffusers, .save_pretrained('a-folder') it, and give that folder"
        raise InputFault(f"{component}: its weights are in {pickles[0]}. Pickles are not read: they can run code. Convert to safetensors once: {how}.")
    if ggufs := [n for n in names if n.endswith(".gguf")]:
        raise InputFault(f"{component}: its weights are in {ggufs[0]}: quantized weights cannot be trained. Choose a base with safetensors weights.")
    raise InputFault(f"{component}: no safetensors weights are there. Is the model's folder complete?")


def check_weights(base: Base, family: Family, components: Iterable[str]) -> None:
    """Every weight file must be there and be as long as its own header says; nothing but headers is read."""
    paths = [path for component in weighted(family) for path in base.weight_files(component)]
    if base.variant is not None and not any(m and base.variant in (m[1], m[3]) for m in (WEIGHTS.fullmatch(p.name) for p in paths)):
        raise InputFault(f"model.variant: {base.name} has no weights of variant {base.variant!r}, only plain ones. Leave model.variant out.")
    extras = [c for c in components if c not in family.components and usable(c, names_in(base.part(c)), base.variant)]
    for path in [*paths, *(path for component in extras for path in base.weight_files(component))]:
        check_length(path)


def check_length(path: Path) -> None:
    """Compare a safetensors file's size with its header.

    Raises:
        InputFault: when it is cut short, or not a safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        try:
            if len(start) < 8 or length > min(size - 8, 100_000_000):
                raise ValueError("no header")
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            pointer = " It is a Git LFS pointer: run git lfs pull." if start.startswith(b"version ") else ""
            raise InputFault(f"{path}: not a whole safetensors file ({size} bytes).{pointer} Fetch or copy the model again.") from error
    if size != 8 + length + end:
        raise InputFault(f"{path}: {size} bytes, {8 + length + end} are expected: the file is cut short or damaged. Fetch or copy the model again.")


class Quiet(tqdm):  # type: ignore[type-arg]
    """No progress bar: for files of a few kilobytes."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{k: v for k, v in settings.items() if k != "name"} | {"disable": True})


def fetch(model: config.Model, revision: str | None, patterns: list[str], bar: type[tqdm] = Quiet) -> Path:  # type: ignore[type-arg]
    """The snapshot folder of one commit, with the files that match; its name is the commit."""
    import huggingface_hub

    with hub_errors(model.base, revision), durable.disk_errors(Path(model.cache_dir or Path.home())):
        settings: dict[str, Any] = {"cache_dir": model.cache_dir, "endpoint": endpoint(), "tqdm_class": bar}
        return Path(huggingface_hub.snapshot_download(model.base, revision=revision, allow_patterns=patterns, **settings))


def fetch_weights(base: Base, model: config.Model, family: Family, components: Iterable[str]) -> None:
    """Fetch the chosen weights of every component; what is not there is refused before the first file is fetched."""
    for folder in dict.fromkeys((base.folder, base.part(base.trains).parent)):
        names = listing(model, folder)
        files = []
        for component in (c for c in components if base.part(c).parent == folder):
            inner = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
            if component in weighted(family) or (component not in family.components and usable(component, inner, base.variant)):
                files += [f"{component}/{name}" for name in pick(component, inner, base.variant)]
        if missing := [name for name in files if not (folder / name).is_file()]:
            fetch(model, folder.name, missing, tqdm)


def weighted(family: Family) -> list[str]:
    """The components of a family that have weights."""
    return [c for c, wanted in family.components.items() if wanted and c not in family.tokenizers]


def usable(component: str, names: Iterable[str], variant: str | None) -> bool:
    """Whether ``pick`` finds weights."""
    try:
        return bool(pick(component, names, variant))
    except InputFault:
        return False


def listing(model: config.Model, folder: Path) -> list[str]:
    """The names of all files of a snapshot's commit: of those that are cached, where the Hub cannot be asked."""
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi(endpoint=endpoint()).model_info(model.base, revision=folder.name).siblings
        return [file.rfilename for file in found or []]
    except Exception:  # whatever it was: the fetch that follows says so, unless the cache has all
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
