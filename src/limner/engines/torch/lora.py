"""Low-rank adaptation in PyTorch: peft puts the adapters in, their starting values come from the
host, addressed by parameter name."""

import math
import zlib

import torch

from limner import config, rng
from limner.family import Family
from limner.faults import InputFault


def add(
    nets: dict[str, torch.nn.Module], adapt: config.Adapt, family: Family, seed: int
) -> dict[str, torch.nn.Parameter]:
    """Freeze the components, add adapters, and return their parameters by the names that files use,
    e.g. ``unet....to_q.lora_A.weight``.

    The down projection starts normal with standard deviation 1 / rank (peft's ``gaussian``), the up
    projection at zero.

    Raises:
        InputFault: when a target names no module of the network.
    """
    named: dict[str, torch.nn.Parameter] = {}
    for component, net in nets.items():
        insert(
            net,
            adapt,
            targets(net, adapt, family)
            if component == family.trains
            else list(family.lora[component]),
        )
        named |= {
            f"{component}.{plain_name(name, net)}": p
            for name, p in net.named_parameters()
            if p.requires_grad
        }
    for name, p in named.items():
        if ".lora_A." in name:
            address = zlib.crc32(name.removeprefix(f"{family.trains}.").encode())
            normal = (
                rng.at(seed, "lora", address)
                .standard_normal(math.prod(p.shape), "float32")
                .reshape(p.shape)
            )
            p.data = torch.from_numpy(normal / adapt.rank).to(p.device, torch.float32)
        else:
            p.data = torch.zeros_like(p.data, dtype=torch.float32)
    return named


def insert(net: torch.nn.Module, adapt: config.Adapt, modules: list[str]) -> None:
    """Freeze a component and put adapters beside these modules of it."""
    from peft import LoraConfig

    net.requires_grad_(False)
    alpha = adapt.rank if adapt.alpha is None else adapt.alpha
    settings = LoraConfig(
        r=adapt.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=adapt.dropout,
        init_lora_weights="gaussian",
        target_modules=modules,
    )
    net.add_adapter(settings)  # type: ignore[operator]


def plain_name(name: str, net: torch.nn.Module) -> str:
    """A parameter's name in a file: without peft's adapter name, and with the ``text_model`` that
    CLIP's text encoder had before transformers 5.6."""
    name = name.replace(".default", "")
    return (
        f"text_model.{name}"
        if type(net).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
        else name
    )


def targets(net: torch.nn.Module, adapt: config.Adapt, family: Family) -> list[str]:
    """The modules of the trained network that get adapters, by the last parts of their names.

    Raises:
        InputFault: when one names no module of the network.
    """
    own = family.lora[family.trains]
    known = {
        part
        for name, _ in net.named_modules()
        for part in (name, *(name[i + 1 :] for i, c in enumerate(name) if c == "."))
    }
    if missing := [t for t in adapt.targets or own if t not in known]:
        raise InputFault(
            f"adapt.targets: the {family.trains} has no module named {missing[0]}; this family's "
            f"own are {', '.join(own)}"
        )
    return list(adapt.targets or own)
