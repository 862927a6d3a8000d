"""Adapters in PyTorch: peft puts them in, their first values come from the host."""

from functools import partial

import numpy as np
import torch

from limner.config.schema import AdapterSettings
from limner.engines.adapters import AdapterArray, Shape, get_alpha, list_adapters
from limner.errors import InputError
from limner.families.family import Family
from limner.storage.layout import target_modules


def add_adapters(
    nets: dict[str, torch.nn.Module], settings: AdapterSettings, family: Family, seed: int
) -> dict[str, torch.nn.Parameter]:
    """Freeze the components and add adapters with their first values.

    Returns:
        the adapters' parameters by their names in files, float32, e.g.
        ``unet....to_q.lora_A.weight``.

    Raises:
        InputError: for a target that names no module, or one that cannot have such an adapter.
    """
    weights = {component: name_parameters(net) for component, net in nets.items()}
    listed, parameters = match_adapters(nets, settings, family)
    for name, parameter in parameters.items():
        array = listed[name]
        read_weight = partial(read_array, weights[array.component][array.weight])
        values = array.initial_values(settings, family, seed, read_weight)
        parameter.data = torch.from_numpy(values).to(parameter.device)
    return parameters


def match_adapters(
    nets: dict[str, torch.nn.Module], settings: AdapterSettings, family: Family
) -> tuple[dict[str, AdapterArray], dict[str, torch.nn.Parameter]]:
    """Put adapters beside their targets, on the meta device too, and compare them with the list.

    Returns:
        The arrays as they are listed, and the parameters as peft starts them, by names in files.

    Raises:
        InputError: see ``add_adapters``.
    """
    shapes = {component: list_shapes(net) for component, net in nets.items()}
    listed = list_adapters(shapes, settings, family)
    try:
        parameters = insert_adapters(nets, settings, family)
    except ValueError as error:
        # peft finds modules by name that have no weight of their own.
        reason = str(error).splitlines()[0][:160]
        raise InputError(
            f"adapter.targets: peft refuses them ({reason}); name linear layers and convolutions"
        ) from error
    different = sorted(parameters.keys() ^ listed.keys())
    if different:
        # peft adapts embeddings too, by arrays of other names and shapes.
        raise InputError(
            f"adapter.targets: {different[0]} is no part of a {settings.kind} adapter; name linear "
            "layers and convolutions"
        )
    return listed, parameters


def insert_adapters(
    nets: dict[str, torch.nn.Module], settings: AdapterSettings, family: Family
) -> dict[str, torch.nn.Parameter]:
    """Freeze the components and put adapters beside their targets, as peft starts them.

    Returns:
        the adapters' parameters by their names in files.
    """
    parameters: dict[str, torch.nn.Parameter] = {}
    for component, net in nets.items():
        targets = target_modules(settings, family, component)
        net.requires_grad_(False)
        net.add_adapter(make_peft_config(settings, list(targets)))  # type: ignore[operator]
        for name, parameter in name_parameters(net).items():
            if parameter.requires_grad:
                parameters[f"{component}.{name}"] = parameter
    return parameters


def make_peft_config(settings: AdapterSettings, targets: list[str]) -> object:
    """Return peft's configuration of an adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=get_alpha(settings),  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
        target_modules=targets,
    )


def name_parameters(net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return a component's parameters by their names in files."""
    return {to_file_name(name, net): parameter for name, parameter in net.named_parameters()}


def list_shapes(net: torch.nn.Module) -> dict[str, Shape]:
    """Return the shapes of a component's parameters by their names in files."""
    return {name: tuple(parameter.shape) for name, parameter in name_parameters(net).items()}


def to_file_name(name: str, net: torch.nn.Module) -> str:
    """Return the name in files of a parameter or module of a component.

    Files do not have peft's name of the adapter, and have the ``text_model`` that CLIP's text
    encoder had before transformers 5.6.
    """
    name = name.replace(".default", "")
    if type(net).__name__ == "CLIPTextModel" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def read_array(weight: torch.Tensor) -> np.ndarray:
    """Return a weight on the host, float32."""
    array: np.ndarray = weight.detach().float().cpu().numpy()
    return array
