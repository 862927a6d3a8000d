"""Low-rank adaptation in PyTorch: peft puts the adapters in, their starting values come from the
host, addressed by parameter name."""

import math
import zlib

import torch

from limner import rng
from limner.config.schema import AdapterSettings
from limner.errors import InputError
from limner.families.family import Family


def add_adapters(
    nets: dict[str, torch.nn.Module], adapter: AdapterSettings, family: Family, seed: int
) -> dict[str, torch.nn.Parameter]:
    """Freeze the components, add adapters, and return their parameters by the names that files use,
    e.g. ``unet....to_q.lora_A.weight``.

    The down projection starts normal with standard deviation 1 / rank (peft's ``gaussian``), the up
    projection at zero.

    Raises:
        InputError: when a target names no module of the network.
    """
    named: dict[str, torch.nn.Parameter] = {}
    for component, net in nets.items():
        insert_adapters(
            net,
            adapter,
            choose_targets(net, adapter, family)
            if component == family.trained_component
            else list(family.lora_targets[component]),
        )
        named |= {
            f"{component}.{to_file_name(name, net)}": p
            for name, p in net.named_parameters()
            if p.requires_grad
        }
    for name, p in named.items():
        if ".lora_A." in name:
            address = zlib.crc32(name.removeprefix(f"{family.trained_component}.").encode())
            normal = (
                rng.at(seed, "lora", address)
                .standard_normal(math.prod(p.shape), "float32")
                .reshape(p.shape)
            )
            p.data = torch.from_numpy(normal / adapter.rank).to(p.device, torch.float32)
        else:
            p.data = torch.zeros_like(p.data, dtype=torch.float32)
    return named


def insert_adapters(net: torch.nn.Module, adapter: AdapterSettings, modules: list[str]) -> None:
    """Freeze a component and put adapters beside these modules of it."""
    from peft import LoraConfig

    net.requires_grad_(False)
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        init_lora_weights="gaussian",
        target_modules=modules,
    )
    net.add_adapter(settings)  # type: ignore[operator]


def to_file_name(name: str, net: torch.nn.Module) -> str:
    """A parameter's name in a file: without peft's adapter name, and with the ``text_model`` that
    CLIP's text encoder had before transformers 5.6."""
    name = name.replace(".default", "")
    return (
        f"text_model.{name}"
        if type(net).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
        else name
    )


def choose_targets(net: torch.nn.Module, adapter: AdapterSettings, family: Family) -> list[str]:
    """The modules of the trained network that get adapters, by the last parts of their names.

    Raises:
        InputError: when one names no module of the network.
    """
    own = family.lora_targets[family.trained_component]
    known = {
        part
        for name, _ in net.named_modules()
        for part in (name, *(name[i + 1 :] for i, c in enumerate(name) if c == "."))
    }
    if missing := [t for t in adapter.targets or own if t not in known]:
        raise InputError(
            f"adapter.targets: the {family.trained_component} has no module named {missing[0]}; "
            "this family's "
            f"own are {', '.join(own)}"
        )
    return list(adapter.targets or own)
