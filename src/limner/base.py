"""The base model's folder: found or fetched, its parts checked before a weight is read, known by
what its bytes are."""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm import tqdm

from limner import config, durable, flax
from limner.engine import Weights
from limner.families import FAMILIES
from limner.family import Configs, Family
from limner.faults import InputFault
from limner.hub import HUB_NAME, endpoint, hub_errors
from limner.snapshot import LORA
from limner.weights import check_length, has_weights, names_in, pick, usable, variant_of

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


@dataclass(frozen=True)
class Base:
    """A diffusers folder that was found good. Weights are read by whoever needs them, never
    here."""

    folder: Path
    elsewhere: dict[str, Path]  # folders of components that are not in it
    trains: str  # the component that learns
    name: str  # what the user wrote
    commit: str | None  # of the Hub repository; None: a local folder
    variant: str | None
    # component -> its config, and model_index; with a partner, also those of its components that
    # are needed
    configs: Configs = field(repr=False)
    partner: "Base | None" = None  # the other one of a model in two stages
    adapter: Path | None = None  # a folder with a LoRA that a partner is used with

    def kind(self, component: str) -> tuple[str, str]:
        """Library and class name of a component."""
        index = self.configs["model_index"]
        if component not in index and self.partner is not None:
            return self.partner.kind(component)
        library, name = index[component][:2]
        return library, name

    def part(self, component: str) -> Path:
        """The folder of a component."""
        return self.elsewhere.get(component, self.folder / component)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, of the chosen variant where it has one."""
        return [
            self.part(component) / name
            for name in pick(component, names_in(self.part(component)), self.variant)
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
                for p in sorted(self.part(component).glob("*"))
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
                self.weight_files(component) if has_weights(names_in(self.part(component))) else []
            )
            known[component] = [
                settings,
                *(_digest(p, p.stat().st_size, p.stat().st_mtime_ns) for p in [*texts, *weights]),
            ]
        return durable.digest_json(known)

    def card(self) -> dict[str, Any]:
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
def _digest(path: Path, size: int, changed: int) -> str:
    return durable.digest(path)


def open_base(model: config.Model, family: Family, *, draws: bool = True) -> Base:
    """Find the base, or fetch it from the Hub, and refuse what cannot be trained or what would run
    code.

    Args:
        draws: whether pictures will be made with it: of a model in two stages that takes all of the
            partner, else only what features are made with.

    Raises:
        InputFault: for what is not a folder of this family in the diffusers layout with safetensors
            weights.
        HubFault: when the Hub refuses or cannot be reached.
    """
    base, partner = read(model, family), None
    if model.partner is not None and family.stage is None:
        raise InputFault(
            f"model.partner: a base of family {family.name!r} makes pictures alone. Leave "
            "model.partner out."
        )
    if family.stage is not None:
        partner = open_partner(model, family, base, draws)
    if partner is not None and family.stage is not None:
        needed = {name: partner.configs[name] for name in family.stage.needs}
        base = replace(
            base,
            partner=partner,
            configs=base.configs | needed,
            elsewhere=base.elsewhere | {name: partner.part(name) for name in needed},
        )
    check_fit(base, family)
    components = [*family.components, *extras(base, family)]
    if base.commit is not None:
        fetch_weights(base, model, components, family)
    check_weights(base, weighted(family), components)
    if base.variant is not None and not any(
        variant_of(path) == base.variant for c in weighted(family) for path in base.weight_files(c)
    ):
        raise InputFault(
            f"model.variant: {base.name} has no weights of variant {base.variant!r}, only plain "
            "ones. Leave model.variant out."
        )
    if family.fixed:
        base.configs["fixed"] = {name: read_tensor(base, name) for name in family.fixed}
        check_fit(base, family)
    return base


def check_fit(base: Base, family: Family) -> None:
    """Refuse parts that are not of one model."""
    if problems := family.misfits(base.configs):
        raise InputFault(f"{base.name}: " + "\n".join(problems))


def open_partner(model: config.Model, family: Family, base: Base, draws: bool) -> Base | None:
    """The other stage: what ``model.partner`` names, or the rest of a folder that holds both.

    Raises:
        InputFault: when there is none, and features or pictures are made with it.
    """
    stage = family.stage
    assert stage is not None
    other = FAMILIES[stage.partner]
    holds_both = read_json(base.folder / INDEX).get("_class_name") == stage.whole
    if model.partner is None and not holds_both:
        if stage.needs or draws:
            why = (
                f"its {' and '.join(stage.needs)} make features"
                if stage.needs
                else "pictures are made with both"
            )
            raise InputFault(
                f"model.partner: {model.base} goes with a {other.pipeline}, and {why}. Give its "
                "folder, or its name on the Hub."
            )
        return None
    named = replace(model, revision=None, trained_revision=None, vae=None, partner=None)
    if model.partner is not None:
        named = replace(named, base=model.partner)
    else:
        named = replace(named, revision=model.revision)
    named, adapter = of_run(named)
    found = replace(read(named, other), adapter=adapter)
    wanted = list(other.components) if draws else list(stage.needs)
    if found.commit is not None:
        fetch_weights(found, named, wanted, other)
    check_weights(found, [c for c in weighted(other) if c in wanted], wanted)
    return found


def of_run(model: config.Model) -> tuple[config.Model, Path | None]:
    """The base of a run whose result is a LoRA, and that LoRA's folder; else what was given."""
    folder = Path(model.base)
    if (
        not (folder / LORA).is_file()
        or (folder / INDEX).is_file()
        or not (folder / "config.json").is_file()
    ):
        return model, None
    trained = config.build(config.Model, read_json(folder / "config.json").get("model", {}))
    return replace(trained, partner=None), folder.absolute()


def read(model: config.Model, family: Family) -> Base:
    """A base with its configs; no weight is looked at, nor fetched."""
    path = Path(model.base)
    elsewhere: dict[str, Path] = {}
    if path.exists():
        folder, commit = check_folder(path, model), None
    else:
        if not HUB_NAME.fullmatch(model.base):
            raise InputFault(
                f"model.base: {model.base}: no such folder, and not a name on the Hub "
                "(owner/name). Give a folder in the diffusers layout or such a name."
            )
        folder = fetch(model, model.revision, [INDEX, "README.md"])
        commit = folder.name
        fetch(
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
            elsewhere[family.trains] = (
                fetch(model, model.trained_revision, [f"{family.trains}/*.json"]) / family.trains
            )
    index = read_index(
        folder, family
    )  # a model of another family is refused before weights are fetched or converted
    if flax.is_flax(index):
        if commit is not None:
            fetch(model, commit, [f"{name}/{file}" for name, file in flax.WEIGHTS.items()], tqdm)
        folder, commit = flax.convert(folder), None
        index = read_index(folder, family)
    if (
        family.stage is not None
        and family.stage.prefix
        and read_json(folder / INDEX).get("_class_name") == family.stage.whole
    ):
        elsewhere |= {name: folder / f"{family.stage.prefix}{name}" for name in family.components}
    if model.vae is not None:
        if "vae" not in family.components:
            raise InputFault(
                f"model.vae: family {family.name!r} has no autoencoder of that kind. Leave "
                "model.vae out."
            )
        elsewhere["vae"] = open_vae(replace(model, base=model.vae))
    return Base(
        folder,
        elsewhere,
        family.trains,
        model.base,
        commit,
        model.variant,
        {"model_index": index} | read_configs(folder, elsewhere, family),
    )


def read_tensor(base: Base, name: str) -> list[Any]:
    """A small array of the trained component, as lists."""
    for path in base.weight_files(base.trains):
        with safe_open(path, "np") as file:
            if name in file.keys():  # noqa: SIM118 - it is no dict
                found: list[Any] = file.get_tensor(name).astype("float32").tolist()
                return found
    raise InputFault(
        f"{base.part(base.trains)}: its weights have no {name}. Is it a "
        f"{base.kind(base.trains)[1]}? Fetch or copy the model again."
    )


def open_vae(model: config.Model) -> Path:
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
            raise InputFault(
                f"model.vae: {model.base}: no such folder, and not a name on the Hub "
                "(owner/name). Give a folder that holds an autoencoder."
            )
        folder = fetch(model, None, ["config.json", "vae/config.json"])
        place = folder if (folder / "config.json").is_file() else folder / "vae"
        prefix = "" if place == folder else "vae/"
        names = [
            name.removeprefix(prefix) for name in listing(model, folder) if name.startswith(prefix)
        ]
        fetch(
            model,
            folder.name,
            [
                f"{prefix}{name}"
                for name in pick("vae", [n for n in names if "/" not in n], model.variant)
            ],
            tqdm,
        )
    given = read_json(place / "config.json").get("_class_name")
    if given != "AutoencoderKL":
        raise InputFault(
            f"model.vae: {place / 'config.json'} is of a {given}, AutoencoderKL is expected. "
            "Choose another autoencoder, or leave model.vae out."
        )
    return place


def check_folder(path: Path, model: config.Model) -> Path:
    """Refuse what is no diffusers folder, saying how to make one of it."""
    if path.is_file():
        if path.suffix == ".gguf":
            raise InputFault(
                f"model.base: {path} is a GGUF file: quantized weights cannot be trained. Give "
                "the model's diffusers folder, or its name on the Hub."
            )
        how = f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained('a-folder')"
        raise InputFault(
            f"model.base: {path} is a single file; a folder in the diffusers layout is needed. "
            f"Convert it once, with diffusers: {how}, and give that folder."
        )
    for name in ("revision", "trained_revision"):
        if getattr(model, name) is not None:
            raise InputFault(
                f"model.{name}: {model.base} is a folder; only a Hub repository has revisions. "
                f"Leave model.{name} out."
            )
    return path.absolute()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputFault: when it is missing, or not an object in JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFault(
            f"{path}: {error.strerror}; a folder in the diffusers layout has it. Is the model's "
            "folder complete?"
        ) from error
    except ValueError as error:
        raise InputFault(f"{path}: not JSON ({error}). Fetch or save the model again.") from error
    if not isinstance(value, dict):
        raise InputFault(f"{path}: a JSON object is expected. Fetch or save the model again.")
    return value


def kind_of(weights: Weights) -> str:
    """The pipeline class that a model's index names.

    Raises:
        InputFault: when there is none.
        HubFault: when the Hub refuses or cannot be reached.
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
        raise InputFault(
            f"model.base: {folder} has no {INDEX}, so it is not a pipeline folder in the "
            f"diffusers layout. {needed}"
        )
    index = read_json(folder / INDEX)
    old = "Flax" if flax.is_flax(index) else ""
    given, whole = (
        str(index.get("_class_name")).removeprefix(old),
        family.stage.whole if family.stage is not None else None,
    )
    if given not in (family.pipeline, whole):
        needed = (
            f"family {family.name!r} needs a {family.pipeline}. Choose another base, or the "
            "model.family it belongs to."
        )
        raise InputFault(f"model.base: {folder / INDEX} is of a {given}; {needed}")
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
    for name, (library, cls) in listed(index).items():
        if library not in LIBRARIES or re.fullmatch(r"[\w-]+", name) is None:
            code = (
                f"{name} is a {library}.{cls}, code that comes with the model. Such code is never "
                "run; choose a base of stock components."
            )
            raise InputFault(f"model.base: {folder / INDEX}: {code}")
    for name, wanted in family.components.items():
        library, cls = listed(index).get(name, ("", "missing"))
        if cls == "missing" or (
            wanted and cls.removeprefix(old) not in (wanted, wanted + "Fast", wanted + "Pil")
        ):
            raise InputFault(
                f"model.base: {folder / INDEX}: {name} is {cls}, {wanted or 'a scheduler'} is "
                f"expected for family {family.name!r}."
            )
    return index


def listed(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that an index names, as (library, class)."""
    return {
        k: (v[0], v[1])
        for k, v in index.items()
        if not k.startswith("_") and isinstance(v, list) and len(v) == 2 and v[1] is not None
    }


def extras(base: Base, family: Family) -> list[str]:
    """Components that the index names beyond the family's own."""
    return [name for name in listed(base.configs["model_index"]) if name not in family.components]


def read_configs(folder: Path, elsewhere: dict[str, Path], family: Family) -> Configs:
    """The config of every component of the family."""
    configs: Configs = {}
    for name in family.components:
        where, file = elsewhere.get(name, folder / name), config_file(family, name)
        configs[name] = read_json(where / file)
        if "auto_map" in configs[name]:
            raise InputFault(
                f"{where / file}: auto_map asks for code that comes with the model. Such code is "
                "never run; choose a base of stock components."
            )
        if name in family.tokenizers and not (
            (where / "tokenizer.json").is_file()
            or ((where / "vocab.json").is_file() and (where / "merges.txt").is_file())
        ):
            raise InputFault(
                f"{where}: neither tokenizer.json nor vocab.json and merges.txt are there. Is the "
                "model's folder complete?"
            )
    return configs


def config_file(family: Family, component: str) -> str:
    """The name of a component's config; only what has a ``config.json`` has weights."""
    if component in family.tokenizers:
        return "tokenizer_config.json"
    return {"": "scheduler_config.json", "CLIPImageProcessor": "preprocessor_config.json"}.get(
        family.components[component], "config.json"
    )


def check_weights(base: Base, needed: Iterable[str], components: Iterable[str]) -> None:
    """Every weight file of what is needed must be there, and each file must be as long as its own
    header says; nothing but headers is read."""
    needed = list(needed)
    usables = [
        c for c in components if c not in needed and usable(c, names_in(base.part(c)), base.variant)
    ]
    for path in [
        path for component in (*needed, *usables) for path in base.weight_files(component)
    ]:
        check_length(path)


class Quiet(tqdm):  # type: ignore[type-arg]
    """No progress bar: for files of a few kilobytes."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(
            *arguments, **{k: v for k, v in settings.items() if k != "name"} | {"disable": True}
        )


def fetch(
    model: config.Model, revision: str | None, patterns: list[str], bar: type[tqdm] = Quiet
) -> Path:  # type: ignore[type-arg]
    """The snapshot folder of one commit, with the files that match; its name is the commit."""
    import huggingface_hub

    with (
        hub_errors(model.base, revision),
        durable.disk_errors(Path(model.cache_dir or Path.home())),
    ):
        settings: dict[str, Any] = {
            "cache_dir": model.cache_dir,
            "endpoint": endpoint(),
            "tqdm_class": bar,
        }
        return Path(
            huggingface_hub.snapshot_download(
                model.base, revision=revision, allow_patterns=patterns, **settings
            )
        )


def fetch_weights(
    base: Base, model: config.Model, components: Iterable[str], family: Family
) -> None:
    """Fetch the chosen weights of these components; what is not there is refused before the first
    file is fetched."""
    components = list(components)
    for folder in dict.fromkeys((base.folder, base.part(base.trains).parent)):
        names = listing(model, folder)
        files = []
        for component in (c for c in components if base.part(c).parent == folder):
            place = base.part(component).name
            inner = [
                name.removeprefix(f"{place}/") for name in names if name.startswith(f"{place}/")
            ]
            if component in weighted(family) or (
                component not in family.components and usable(component, inner, base.variant)
            ):
                files += [f"{place}/{name}" for name in pick(component, inner, base.variant)]
        if missing := [name for name in files if not (folder / name).is_file()]:
            fetch(model, folder.name, missing, tqdm)


def weighted(family: Family) -> list[str]:
    """The components of a family that have weights."""
    return [c for c in family.components if config_file(family, c) == "config.json"]


def listing(model: config.Model, folder: Path) -> list[str]:
    """The names of all files of a snapshot's commit: of those that are cached, where the Hub cannot
    be asked."""
    import huggingface_hub

    try:
        found = (
            huggingface_hub.HfApi(endpoint=endpoint())
            .model_info(model.base, revision=folder.name)
            .siblings
        )
        return [file.rfilename for file in found or []]
    except Exception:  # whatever it was: the fetch that follows says so, unless the cache has all
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
