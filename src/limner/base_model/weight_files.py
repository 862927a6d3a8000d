"""Choose the weight files of a component, and check that they are whole; no weight is read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from limner.base_model.json_files import read_json
from limner.errors import InputError
from limner.storage import safetensors
from limner.storage.safetensors import Header, SafetensorsError

# Groups: stem, variant before a shard's number, number of shards, variant after a shard's number.
WEIGHTS_NAME = re.compile(
    r"(diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-(\d{5}))?(?:\.(\w+))?\.safetensors"
)
# Groups: stem, variant before, variant after.
INDEX_NAME = re.compile(
    r"(diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors\.index(?:\.(\w+))?\.json"
)
# Library -> what the names of its weight files begin with; other libraries have either.
STEMS = {
    "diffusers": "diffusion_pytorch_model",
    "transformers": "model",
    "stable_diffusion": "model",  # the safety checker
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


def list_files(folder: Path) -> list[str]:
    """List the names of the files directly in a folder."""
    return sorted(p.name for p in folder.glob("*") if p.is_file())


def has_weights(names: Iterable[str]) -> bool:
    """Return whether any of these files holds weights, in whatever format."""
    return any(name.endswith((".safetensors", ".gguf", *PICKLES)) for name in names)


def choose_files(
    component: str, names: Iterable[str], variant: str | None, library: str
) -> list[str]:
    """Choose a component's weight files: those of a variant where there are any, else the plain.

    Args:
        names: of the files in its folder.
        library: that of its class, which reads files of its own names only.

    Returns:
        Their names; or that of their index alone, where they have names of their own.

    Raises:
        InputError: when there are none, naming what there is instead, or when a shard is missing.
    """
    names = sorted(names)
    by_variant = group_by_variant(names, library)
    files = by_variant.get(variant) or by_variant.get(None)
    if not files:
        raise InputError(f"{component}: {explain_no_weights(names, by_variant, library)}")
    stems = sorted({get_stem(name) for name in files})
    if len(stems) > 1:
        raise InputError(
            f"{component}: there are weights in {stems[0]}.safetensors and in "
            f"{stems[1]}.safetensors. Move away what is not meant."
        )
    return choose_whole(component, files)


def group_by_variant(names: list[str], library: str) -> dict[str | None, list[str]]:
    """Return the weight files that a library reads, by variant; None: the plain ones.

    Of a variant without a file of the usual names there is the index, which names them.
    """
    stem = STEMS.get(library)
    by_variant: dict[str | None, list[str]] = {}
    for name in names:
        match = WEIGHTS_NAME.fullmatch(name)
        if match and stem in (None, match[1]):
            by_variant.setdefault(match[2] or match[4], []).append(name)
    for name in names:
        match = INDEX_NAME.fullmatch(name)
        if match and stem in (None, match[1]):
            by_variant.setdefault(match[2] or match[3], [name])
    return by_variant


def get_stem(name: str) -> str:
    """Return a weight file's name up to its variant or shard, e.g. ``model``."""
    return re.split(r"[.-]", name)[0]


def choose_weight_files(folder: Path, variant: str | None, library: str) -> list[Path]:
    """Return the weight files of a component's folder, as ``choose_files`` does.

    Raises:
        InputError: when there are none, or when their index is not theirs.
    """
    names = list_files(folder)
    files = choose_files(folder.name, names, variant, library)
    if INDEX_NAME.fullmatch(files[0]):
        return check_shards(folder, list_named_files(folder / files[0]), files)
    variant = parse_variant(Path(files[0]))
    infix = f".{variant}" if variant else ""
    stem = get_stem(files[0])
    indexes = {f"{stem}{infix}.safetensors.index.json", f"{stem}.safetensors.index{infix}.json"}
    return check_shards(folder, files, sorted(indexes.intersection(names)))


def list_named_files(index: Path) -> list[str]:
    """Return the names of the files that an index names.

    Raises:
        InputError: when it names none, or what is no safetensors file beside it.
    """
    places = read_json(index).get("weight_map")
    files = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not files:
        raise InputError(f"{index}: it names no weight files. Fetch or copy the model again.")
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: it names {name[:80]!r}, a safetensors file beside it is expected. Fetch "
                "or copy the model again."
            )
    return files


def check_shards(folder: Path, files: list[str], indexes: list[str]) -> list[Path]:
    """Return the paths of weight files, which are all that their index names.

    The stock libraries read what the index says.

    Args:
        indexes: the names of the index files for them.

    Raises:
        InputError: when the index names others, or when one whole file lies beside an index.
    """
    paths = [folder / name for name in files]
    is_sharded = "-of-" in files[0] or WEIGHTS_NAME.fullmatch(files[0]) is None
    if indexes and not is_sharded:
        raise InputError(
            f"{folder}: {files[0]} is there, and {indexes[0]} for the same weights in several "
            "files. Move away what is not meant."
        )
    if is_sharded and not indexes:
        raise InputError(
            f"{folder}: there is no index of {files[0]} and the others. Fetch or copy the model "
            "again."
        )
    for name in indexes:
        places = read_json(folder / name).get("weight_map")
        held = {array: path.name for path in paths for array in check_length(path).arrays}
        if places != held:
            raise InputError(
                f"{folder / name}: it names other arrays or files than there are"
                f"{describe_difference(places, held)}. Fetch or copy the model again."
            )
    return paths


def describe_difference(places: object, held: Mapping[str, str]) -> str:
    """Name the first array that an index has and no file, or a file and not the index."""
    if not isinstance(places, dict):
        return ""
    differing = sorted(str(name) for name in {*places, *held} if places.get(name) != held.get(name))
    return f", {differing[0][:120]} first"


def choose_whole(component: str, files: list[str]) -> list[str]:
    """Choose the one file that holds all weights, else all shards.

    Raises:
        InputError: when a shard is missing.
    """
    whole = [name for name in files if "-of-" not in name]
    if whole:
        return whole[:1]
    match = WEIGHTS_NAME.fullmatch(files[0])
    if match and len(files) != int(match[3]):
        raise InputError(
            f"{component}: {len(files)} of {int(match[3])} weight files are there. Fetch or copy "
            "the model again."
        )
    return files


def explain_no_weights(
    names: list[str], by_variant: Mapping[str | None, list[str]], library: str
) -> str:
    """Say what a folder has instead of weights that can be read, and what to do."""
    variants = sorted(variant for variant in by_variant if variant is not None)
    if variants:
        return (
            f"there are no plain weights, only variants: {', '.join(variants)}. Pass "
            f"model.variant={variants[0]}."
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"its weights are in {pickles[0]}. Pickles are not read: they can run code. Convert to "
            "safetensors once: load it with diffusers, .save_pretrained('a-folder') it, and give "
            "that folder."
        )
    quantized = [name for name in names if name.endswith(".gguf")]
    if quantized:
        return (
            f"its weights are in {quantized[0]}: quantized weights cannot be trained. Choose a "
            "base with safetensors weights."
        )
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return (
            f"its weights are in {others[0]}, and {library} reads {STEMS.get(library, 'model')}"
            ".safetensors, or what an index of that name names. Fetch or save the model again."
        )
    return "no safetensors weights are there. Is the model's folder complete?"


def has_usable_weights(
    component: str, names: Iterable[str], variant: str | None, library: str
) -> bool:
    """Return whether ``choose_files`` finds weights."""
    try:
        return bool(choose_files(component, names, variant, library))
    except InputError:
        return False


def parse_variant(path: Path) -> str | None:
    """Return the variant in a weight file's name; None for plain weights."""
    match = WEIGHTS_NAME.fullmatch(path.name)
    return match and (match[2] or match[4])


def check_length(path: Path) -> Header:
    """Compare the length of a safetensors file with its header, which is returned.

    Raises:
        InputError: when it is cut short, or not a safetensors file.
    """
    try:
        return safetensors.read_header(path)
    except SafetensorsError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes): {error}. Fetch "
            "or copy the model again."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Mend it first.") from error
