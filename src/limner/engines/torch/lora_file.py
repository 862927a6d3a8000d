"""Put a LoRA file on a stock pipeline, and see that every array of it is used."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from limner.engines.adapters import Shape
from limner.engines.lora_file import (
    Arrays,
    explain_unused,
    fits_layer,
    guess_prefix,
    list_layers,
    read_lora_file,
    rename_lora_array,
)
from limner.engines.torch.lora import list_shapes
from limner.errors import InputError
from limner.families import FAMILIES
from limner.storage.layout import LORA_FILE

Nets = dict[str, torch.nn.Module]

ADAPTED_COMPONENTS = {name for family in FAMILIES.values() for name in family.lora_targets}
OTHER_MODEL_OR_LAYOUT = (
    "Was it trained on another model? Of kohya's layout, and of diffusers' own before 0.20, "
    "diffusers reads only some layers; write the file in diffusers' layout of today then."
)
# Parts of the names of arrays that diffusers puts beside a network's own.
ADAPTER_PARTS = (".lora_", ".lokr_")


def load_lora(pipeline: Any, folder: Path) -> None:
    """Put a LoRA on the networks of a pipeline.

    Raises:
        InputError: for a file that is damaged, or of which an array has no place in the networks or
            lacks its other half.
    """
    path = folder / LORA_FILE
    arrays, settings = read_lora_file(path)
    nets = list_networks(pipeline)
    hint = guess_prefix(arrays, [name for name in nets if name in ADAPTED_COMPONENTS])
    hint = hint or guess_two_layouts(arrays)
    shapes = {name: list_shapes(net) for name, net in nets.items()}
    try:
        with mute_libraries():
            put_on_networks(pipeline, nets, folder)
    # diffusers and peft raise whatever the first array that does not fit leads to.
    except Exception as error:
        if misfits := find_misfits(arrays, shapes):
            message = explain_unused(path, misfits, name_place(pipeline), hint)
        else:
            message = (
                f"{path}: it cannot be put on {name_place(pipeline)}: diffusers says "
                f"{take_first_line(error)!r}. {hint or OTHER_MODEL_OR_LAYOUT}"
            )
        raise InputError(message) from error
    for net in nets.values():
        net.eval()  # the dropout of layers that peft has added is on
    unused, missing = compare_with_networks(arrays, nets)
    if unused:
        raise InputError(explain_unused(path, unused, name_place(pipeline), hint))
    if missing:
        raise InputError(
            f"{path}: the other half of some arrays is missing; {len(missing)} in the networks "
            f"have no value ({', '.join(missing[:3])}). Fetch or copy it again."
        )
    # What a header says of a component, diffusers reads whole.
    described = {name.partition(".")[0] for name in settings}
    bare = {name: net for name, net in nets.items() if name not in described}
    set_scales(path, arrays, bare, get_rounding(nets))


def guess_two_layouts(names: Iterable[str]) -> str:
    """Return a hint where some names are of today's layout and others of an older one, of which
    diffusers reads only one; else nothing."""
    is_old = {name: rename_lora_array(name) != name for name in names if "lora" in name}
    if len(set(is_old.values())) < 2:
        return ""
    old, new = (min(name for name in is_old if is_old[name] is which) for which in (True, False))
    return (
        f"Its names are of two layouts, such as {old} and {new}, and diffusers reads one: write "
        "the file in that of today."
    )


@contextmanager
def mute_libraries() -> Iterator[None]:
    """Keep diffusers' and peft's pages of text from the screen: what they say is found out here."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def list_networks(pipeline: Any) -> Nets:
    """Return a pipeline's networks by the names that LoRA files have for them.

    In the pipeline of two stages one of them has a prefix.
    """
    stages = [family.stage for family in FAMILIES.values() if family.stage is not None]
    nets: Nets = {}
    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        for stage in stages:
            if stage.prefix and type(pipeline).__name__ == stage.combined_pipeline:
                name = name.removeprefix(stage.prefix)
        nets[name] = component
    return nets


def put_on_networks(pipeline: Any, nets: Nets, folder: Path) -> None:
    """Load a LoRA file by the pipeline's own loader, or by its networks' where it has none."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
        return
    for name, net in nets.items():
        if hasattr(net, "load_lora_adapter"):
            net.load_lora_adapter(folder, prefix=name, weight_name=LORA_FILE)  # type: ignore[operator]


def find_misfits(arrays: Arrays, shapes: Mapping[str, Mapping[str, Shape]]) -> list[str]:
    """Return the names, of those that are written as diffusers writes them, that fit nowhere."""
    renamed = {rename_lora_array(stored): stored for stored in arrays}
    by_component: dict[str, Arrays] = {}
    for name, stored in renamed.items():
        component, _, rest = name.partition(".")
        by_component.setdefault(component, {})[rest] = arrays[stored]
    misfits = []
    for name, stored in renamed.items():
        component, _, rest = name.partition(".")
        if component not in shapes:
            # Names of kohya's trainer have no dot after the component.
            fits = component.startswith("lora_")
        elif rest.endswith((".lora_A.weight", ".lora_B.weight")):
            fits = fits_layer(rest, by_component[component], shapes[component])
        else:
            fits = True
        if not fits:
            misfits.append(stored)
    return misfits


def compare_with_networks(arrays: Arrays, nets: Nets) -> tuple[list[str], list[str]]:
    """Compare a file's arrays with what lies beside the weights of networks, by content.

    Names are not compared: a file may have those of any trainer that diffusers reads.

    Returns:
        The file's names that are in no network, and the networks' names that are in no file.
    """
    added = list_added_parameters(nets)
    dtype = get_rounding(nets)
    # What a file has no values for stays on the meta device, or is drawn at random.
    digests = {name: None if p.is_meta else digest(p, dtype) for name, p in added.items()}
    surplus = Counter(digests.values())
    unused = []
    for name, array in arrays.items():
        key = digest(torch.from_numpy(array), dtype)
        surplus[key] -= 1
        # Alphas are read, and become scales.
        if surplus[key] < 0 and not name.endswith(".alpha"):
            unused.append(name)
    return unused, [name for name, key in digests.items() if surplus[key] > 0]


def list_added_parameters(nets: Nets) -> dict[str, torch.nn.Parameter]:
    """Return what lies beside the weights of networks, by their names and its own."""
    return {
        f"{name}.{parameter_name}": parameter
        for name, net in nets.items()
        for parameter_name, parameter in net.named_parameters()
        if any(part in parameter_name for part in ADAPTER_PARTS)
    }


def set_scales(path: Path, arrays: Arrays, nets: Nets, dtype: torch.dtype) -> None:
    """Give every layer the alpha / rank that the file has for it, 1 where it has no alpha.

    diffusers 0.42 reads alphas that differ by names that no layer has, and then gives all layers
    one alpha. Layers are found by content, as the file may have any trainer's names.

    Args:
        nets: those of which the file's header says nothing.
        dtype: what values were rounded to.

    Raises:
        InputError: for layers that are alike but for their alphas.
    """
    scales: dict[tuple[bytes, bytes], float] = {}
    names: dict[tuple[bytes, bytes], str] = {}
    for name, layer in list_layers(arrays).items():
        key = (
            digest(torch.from_numpy(layer.down), dtype),
            digest(torch.from_numpy(layer.up), dtype),
        )
        if layer.up.any() and scales.get(key, layer.scale) != layer.scale:
            raise InputError(
                f"{path}: {names[key]} and {name} have the same arrays and different alphas, so "
                "that it cannot be told which is whose. Write alpha / rank into the arrays."
            )
        scales[key], names[key] = layer.scale, name
    for module in [module for net in nets.values() for module in net.modules()]:
        downs, ups = (getattr(module, half, None) for half in ("lora_A", "lora_B"))
        if downs is None or ups is None:
            continue
        scaling: dict[str, float] = module.scaling  # type: ignore[assignment]
        for adapter in downs.keys() & ups.keys():
            key = digest(downs[adapter].weight, dtype), digest(ups[adapter].weight, dtype)
            scaling[adapter] = scales.get(key, scaling[adapter])


def get_rounding(nets: Nets) -> torch.dtype:
    """Return what values may have been rounded to: the type that pictures are drawn in."""
    return min((p.dtype for net in nets.values() for p in net.parameters()), key=get_bits)


def get_bits(dtype: torch.dtype) -> int:
    """Return the size of a number."""
    return dtype.itemsize


def digest(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """Return a digest of a tensor's values, rounded to a type."""
    values = tensor.detach().cpu().to(dtype).float().contiguous()
    return xxhash.xxh3_128_digest(values.numpy().tobytes())


def name_place(pipeline: Any) -> str:
    """Return what a message calls a pipeline."""
    return f"a {type(pipeline).__name__}"


def take_first_line(error: Exception) -> str:
    """Return the first line of an error's text that is no heading, cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 and lines[0].endswith(":") else [*lines, ""][0]
    return f"{type(error).__name__}, {line[:160]}"
