"""Low-rank adaptation in PyTorch: peft puts the adapters in, their starting values come from the host, addressed by parameter name."""

import math
import zlib

import torch

from limner import config, rng
from limner.family import Family
from limner.faults import InputFault


def add(net: torch.nn.Module, adapt: config.Adapt, family: Family, seed: int) -> dict[str, torch.nn.Parameter]:
    """Freeze ``net``, add adapters, and return their parameters by the names that files use, e.g. ``....to_q.lora_A.weight``.

    The down projection starts normal with standard deviation 1 / rank (peft's ``gaussian``), the up projection at zero.

    Raises:
        InputFault: when a target names no module of the network.
    """
    from peft import LoraConfig

    net.requires_grad_(False)
    alpha = adapt.rank if adapt.alpha is None else adapt.alpha
    settings = LoraConfig(r=adapt.rank, lora_alpha=alpha, lora_dropout=adapt.dropout, init_lora_weights="gaussian", target_modules=targets(net, adapt, family))  # type: ignore[arg-type]
    net.add_adapter(settings)  # type: ignore[operator]
    named = {name.replace(".default", ""): p for name, p in net.named_parameters() if p.requires_grad}
    for name, p in named.items():
        if ".lora_A." in name:
            normal = rng.at(seed, "lora", zlib.crc32(name.encode())).standard_normal(math.prod(p.shape), "float32").reshape(p.shape)
            p.data = torch.from_numpy(normal / adapt.rank).to(p.device, torch.float32)
        else:
            p.data = torch.zeros_like(p.data, dtype=torch.float32)
    return named


def targets(net: torch.nn.Module, adapt: config.Adapt, family: Family) -> list[str]:
    """The modules that get adapters, by the last parts of their names.

    Raises:
        InputFault: when one names no module of the network.
    """
    wanted = adapt.targets or family.lora_targets
    known = {part for name, _ in net.named_modules() for part in (name, *(name[i + 1 :] for i, c in enumerate(name) if c == "."))}
    if missing := [t for t in wanted if t not in known]:
        raise InputFault(f"adapt.targets: the {family.trains} has no module named {missing[0]}; this family's own are {', '.join(family.lora_targets)}")
    return list(wanted)
