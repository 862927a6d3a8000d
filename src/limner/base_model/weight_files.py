"""Choose the weight files of a component, and check that they are whole; no weight is read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from limner.errors import InputError
from limner.storage import safetensors
from limner.storage.safetensors import SafetensorsError

# Groups: variant before a shard's number, number of shards, variant after a shard's number.
WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-(\d{5}))?(?:\.(\w+))?\.safetensors"
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


def list_files(folder: Path) -> list[str]:
    """List the names of the files directly in a folder."""
    return sorted(p.name for p in folder.glob("*") if p.is_file())


def has_weights(names: Iterable[str]) -> bool:
    """Return whether any of these files holds weights, in whatever format."""
    return any(name.endswith((".safetensors", ".gguf", *PICKLES)) for name in names)


def choose_files(component: str, names: Iterable[str], variant: str | None) -> list[str]:
    """Choose a component's weight files: those of a variant where there are any, else the plain.

    Args:
        names: of the files in its folder.

    Raises:
        InputError: when there are none, naming what there is instead, or when a shard is missing.
    """
    names = sorted(names)
    by_variant: dict[str | None, list[str]] = {}
    for name in names:
        if match := WEIGHTS_NAME.fullmatch(name):
            by_variant.setdefault(match[1] or match[3], []).append(name)
    files = by_variant.get(variant) or by_variant.get(None)
    if files:
        return choose_whole(component, files)
    raise InputError(f"{component}: {explain_no_weights(names, by_variant)}")


def choose_whole(component: str, files: list[str]) -> list[str]:
    """Choose the one file that holds all weights, else all shards.

    Raises:
        InputError: when a shard is missing.
    """
    whole = [name for name in files if "-of-" not in name]
    if whole:
        return whole[:1]
    count = int(WEIGHTS_NAME.fullmatch(files[0])[2])  # type: ignore[index]
    if len(files) != count:
        raise InputError(
            f"{component}: {len(files)} of {count} weight files are there. Fetch or copy "
            "the model again."
        )
    return files


def explain_no_weights(names: list[str], by_variant: Mapping[str | None, list[str]]) -> str:
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
    return "no safetensors weights are there. Is the model's folder complete?"


def has_usable_weights(component: str, names: Iterable[str], variant: str | None) -> bool:
    """Return whether ``choose_files`` finds weights."""
    try:
        return bool(choose_files(component, names, variant))
    except InputError:
        return False


def parse_variant(path: Path) -> str | None:
    """Return the variant in a weight file's name; None for plain weights."""
    match = WEIGHTS_NAME.fullmatch(path.name)
    return match and (match[1] or match[3])


def check_length(path: Path) -> None:
    """Compare the length of a safetensors file with its header.

    Raises:
        InputError: when it is cut short, or not a safetensors file.
    """
    try:
        safetensors.read_header(path)
    except SafetensorsError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes): {error}. Fetch "
            "or copy the model again."
        ) from error
