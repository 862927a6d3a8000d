"""The weight files of a component: which of a folder's files they are, and whether they are whole;
no weight is read."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from limner.errors import InputError

WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-(\d{5}))?(?:\.(\w+))?\.safetensors"
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


def list_files(folder: Path) -> list[str]:
    """The names of the files directly in a folder."""
    return sorted(p.name for p in folder.glob("*") if p.is_file())


def has_weights(names: Iterable[str]) -> bool:
    """Whether any of these files holds weights, in whatever format."""
    return any(name.endswith((".safetensors", ".gguf", *PICKLES)) for name in names)


def choose_files(component: str, names: Iterable[str], variant: str | None) -> list[str]:
    """Those of a component's files that hold its weights: the chosen variant's, else the plain
    ones.

    Raises:
        InputError: when there are none, naming what there is instead.
    """
    names = sorted(names)
    found: dict[str | None, list[str]] = {}
    for name in names:
        if match := WEIGHTS_NAME.fullmatch(name):
            found.setdefault(match[1] or match[3], []).append(name)
    for wanted in (variant, None):
        files = found.get(wanted, [])
        whole = [n for n in files if "-of-" not in n]
        if files and not whole:
            count = int(WEIGHTS_NAME.fullmatch(files[0])[2])  # type: ignore[index]
            if len(files) != count:
                raise InputError(
                    f"{component}: {len(files)} of {count} weight files are there. Fetch or copy "
                    "the model again."
                )
        if files:
            return whole[:1] or files
    variants = sorted(v for v in found if v is not None)
    if variants:
        raise InputError(
            f"{component}: there are no plain weights, only variants: {', '.join(variants)}. Pass "
            f"model.variant={variants[0]}."
        )
    if pickles := [n for n in names if n.endswith(PICKLES)]:
        how = "load it with diffusers, .save_pretrained('a-folder') it, and give that folder"
        raise InputError(
            f"{component}: its weights are in {pickles[0]}. Pickles are not read: they can run "
            f"code. Convert to safetensors once: {how}."
        )
    if ggufs := [n for n in names if n.endswith(".gguf")]:
        raise InputError(
            f"{component}: its weights are in {ggufs[0]}: quantized weights cannot be trained. "
            "Choose a base with safetensors weights."
        )
    raise InputError(
        f"{component}: no safetensors weights are there. Is the model's folder complete?"
    )


def has_usable_weights(component: str, names: Iterable[str], variant: str | None) -> bool:
    """Whether ``choose_files`` finds weights."""
    try:
        return bool(choose_files(component, names, variant))
    except InputError:
        return False


def parse_variant(path: Path) -> str | None:
    """The variant that a weight file's name tells."""
    match = WEIGHTS_NAME.fullmatch(path.name)
    return match and (match[1] or match[3])


def check_length(path: Path) -> None:
    """Compare a safetensors file's size with its header.

    Raises:
        InputError: when it is cut short, or not a safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        try:
            if len(start) < 8 or length > min(size - 8, 100_000_000):
                raise ValueError("no header")
            header = json.loads(file.read(length))
            end = max(
                (
                    entry["data_offsets"][1]
                    for name, entry in header.items()
                    if name != "__metadata__"
                ),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            pointer = (
                " It is a Git LFS pointer: run git lfs pull."
                if start.startswith(b"version ")
                else ""
            )
            raise InputError(
                f"{path}: not a whole safetensors file ({size} bytes).{pointer} Fetch or copy the "
                "model again."
            ) from error
    if size != 8 + length + end:
        raise InputError(
            f"{path}: {size} bytes, {8 + length + end} are expected: the file is cut short or "
            "damaged. Fetch or copy the model again."
        )
