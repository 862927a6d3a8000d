"""What a PyTorch run begins with: its networks, what of them is trained, the optimizer's memory."""

import torch

from limner.base_model.base import BaseModel
from limner.config.schema import AdapterSettings, Config
from limner.engines.dropout import refuse_attention_dropout
from limner.engines.state import find_half_dtype
from limner.engines.torch import lora
from limner.engines.torch.dropout import replace_dropout
from limner.engines.torch.encoders import checkpoint_gradients
from limner.engines.torch.flat_parameters import FlatParameters
from limner.engines.torch.optimizer import load_adamw8bit, make_optimizer
from limner.engines.torch.processes import TorchProcessGroup
from limner.engines.torch.state import TorchState
from limner.engines.torch.weights import build_on_meta, find_class, load_component
from limner.errors import InputError
from limner.families.family import Family
from limner.protocols import Report

Networks = dict[str, torch.nn.Module]


def refuse_settings(config: Config, base: BaseModel, family: Family) -> None:
    """Refuse what cannot be trained, before a weight is loaded.

    Raises:
        InputError: naming the setting.
    """
    if config.optim.kind == "adamw8bit":
        load_adamw8bit()
    name = family.network.component
    if config.engine.attention == "math":
        network_class = find_class(*base.component_class(name))
        if not hasattr(network_class, "set_default_attn_processor"):
            raise InputError(
                f"engine.attention: a {network_class.__name__} has no attention of plain products. "
                "Leave engine.attention out."
            )
    if config.adapter.targets:
        lora.match_adapters({name: build_on_meta(base)}, config.adapter, family)
    trained = family.trained_components(config.adapter.text_encoders)
    refuse_attention_dropout(base, trained)


def make_state(
    config: Config,
    base: BaseModel,
    family: Family,
    process: TorchProcessGroup,
    seed: int,
    report: Report,
) -> TorchState:
    """Load the networks that are trained, on the process's device, and make what a step changes.

    Args:
        seed: of the adapters' first values.
        report: told by the first process where the attention that is asked for cannot run.
    """
    half: torch.dtype | None = find_half_dtype(torch, process.precision)
    nets: Networks = {
        name: load_component(base, name)
        for name in family.trained_components(config.adapter.text_encoders)
    }
    choose_attention(nets[family.network.component], config.engine.attention, process.rank, report)
    if config.engine.gradient_checkpointing:
        for one in nets.values():
            checkpoint_gradients(one)
    named = choose_parameters(nets, config.adapter, family, half, seed)
    masks = replace_dropout(nets)
    for one in nets.values():
        one.to(process.device).train()
    parameters = FlatParameters(named)
    ema = None
    if config.optim.ema is not None:
        place = torch.device("cpu") if config.optim.ema_offload else process.device
        ema = parameters.flat.detach().to(place, copy=True)
    net = nets.pop(family.network.component)
    return TorchState(
        net=net,
        text_encoders=nets,
        parameters=parameters,
        optimizer=make_optimizer(config.optim, parameters.flat),
        scaler=torch.amp.GradScaler(process.device.type, enabled=half is torch.float16),
        ema=ema,
        fault=torch.full((), -1, dtype=torch.int64, device=process.device),
        masks=masks,
    )


def choose_attention(net: torch.nn.Module, wanted: str, rank: int, report: Report) -> None:
    """Set plain products or xFormers, where the recipe asks for them and they can run."""
    if wanted == "math":
        net.set_default_attn_processor()  # type: ignore[operator]
    if wanted == "xformers":
        try:
            net.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        except Exception as error:
            if rank == 0:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                report(
                    f"xFormers cannot run here ({reason}); PyTorch's own memory-efficient "
                    "attention is used"
                )


def choose_parameters(
    nets: Networks,
    adapter: AdapterSettings,
    family: Family,
    half: torch.dtype | None,
    seed: int,
) -> dict[str, torch.nn.Parameter]:
    """Return the parameters to train by their names in files; all others are frozen.

    Args:
        half: the precision of what is frozen beside adapters; None: float32.
        seed: of the adapters' first values.
    """
    if adapter.kind != "full":
        if half is not None:
            for one in nets.values():
                # Not one.to(): diffusers' own warns of modules to keep in float32, naming none.
                torch.nn.Module.to(one, half)
        return lora.add_adapters(nets, adapter, family, seed)
    trained: dict[str, torch.nn.Parameter] = {}
    for name, parameter in nets[family.network.component].named_parameters():
        parameter.requires_grad_(name not in family.network.frozen_arrays)
        if parameter.requires_grad:
            trained[name] = parameter
    return trained
