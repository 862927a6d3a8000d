"""What a PyTorch run trains and remembers, and its way into a checkpoint and back."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from limner.engines.state import join_moments, split_moments
from limner.engines.torch.dropout import Masks
from limner.engines.torch.flat_parameters import FlatParameters
from limner.errors import IntegrityError
from limner.protocols import Arrays

SWAP_PIECE = 1 << 24  # numbers that are held twice while weights and average change places
# bitsandbytes' tables of the values of 8 bits, alike for all pieces of a buffer.
SHARED_MEMORY = ("qmap1", "qmap2")


@dataclass
class TorchState:
    """Everything that a step changes, and what it computes with."""

    net: torch.nn.Module
    text_encoders: dict[str, torch.nn.Module]  # those that are trained, by name
    parameters: FlatParameters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: torch.Tensor | None  # laid out like the parameters
    fault: torch.Tensor  # the first step that was not finite, -1 where there was none
    masks: Masks  # of dropout


def snapshot(state: TorchState, frozen: Arrays) -> Iterator[tuple[str, Arrays]]:
    """Yield the groups of arrays of a checkpoint; see ``protocols.Engine``.

    Args:
        frozen: arrays that lie in the trained network's files and are not trained.
    """
    parameters = state.parameters
    yield "model", parameters.read(parameters.flat) | frozen
    if state.ema is not None:
        yield "ema", parameters.read(state.ema) | frozen
    yield "optimizer", read_optimizer(state)
    if state.scaler.is_enabled():
        values = state.scaler.state_dict()
        yield "scaler", {name: np.asarray(value) for name, value in values.items()}


def restore(state: TorchState, groups: Callable[[str], Arrays], frozen: Arrays) -> None:
    """Write the groups of a checkpoint into a state; the inverse of ``snapshot``.

    Raises:
        IntegrityError: for a wrong name, shape or dtype.
    """

    def read_trained(group: str) -> Arrays:
        return {name: array for name, array in groups(group).items() if name not in frozen}

    parameters = state.parameters
    parameters.write(parameters.flat.data, read_trained("model"), "the checkpoint's weights")
    if state.ema is not None:
        parameters.write(state.ema, read_trained("ema"), "the checkpoint's average")
    write_optimizer(state, groups("optimizer"))
    if state.scaler.is_enabled():
        values = {name: array.item() for name, array in groups("scaler").items()}
        state.scaler.load_state_dict(values)


def read_optimizer(state: TorchState) -> Arrays:
    """Return the optimizer's moments by parameter, and what else it remembers."""
    flat = state.parameters.flat
    moments: dict[str, Arrays] = {}
    others: Arrays = {}
    for name, value in join_memory(state.optimizer).items():
        if not isinstance(value, torch.Tensor):
            others[name] = np.asarray(value)
        elif value.is_floating_point() and value.numel() == flat.numel():
            moments[name] = state.parameters.read(value)
        else:
            others[name] = value.detach().cpu().numpy()
    return join_moments(moments) | others


def write_optimizer(state: TorchState, group: Arrays) -> None:
    """Give the optimizer the memory that a checkpoint has of it.

    Raises:
        IntegrityError: where it is another parameter's, or nothing.
    """
    flat = state.parameters.flat
    memory: dict[str, Any] = {}
    for name, arrays in split_moments(group).items():
        dtype = torch.from_numpy(np.empty(0, next(iter(arrays.values())).dtype)).dtype
        memory[name] = torch.zeros(flat.shape, dtype=dtype, device=flat.device)
        state.parameters.write(memory[name], arrays, "the checkpoint's optimizer")
    for name, array in group.items():
        if "/" in name:
            continue
        # PyTorch's AdamW counts steps in a tensor; the 8-bit one in a plain number.
        counts_in_tensor = isinstance(state.optimizer, torch.optim.AdamW) and name == "step"
        if counts_in_tensor or array.ndim:
            memory[name] = torch.tensor(array)
        else:
            memory[name] = array.item()
    if not memory:
        raise IntegrityError("the checkpoint's optimizer: it is empty")
    cut_memory(state.optimizer, memory)


def join_memory(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer remembers of the buffer; of several pieces, joined on the host."""
    first, *others = (optimizer.state[piece] for piece in optimizer.param_groups[0]["params"])
    joined = dict(first)
    for name, value in first.items():
        if others and is_cut(name, value):
            joined[name] = torch.cat([memory[name].cpu() for memory in (first, *others)])
    return joined


def cut_memory(optimizer: torch.optim.Optimizer, memory: dict[str, Any]) -> None:
    """Give each piece of the buffer its part of a memory; the inverse of ``join_memory``."""
    pieces = optimizer.param_groups[0]["params"]
    total = sum(piece.numel() for piece in pieces)
    start = 0
    for piece in pieces:
        part = dict(memory)
        for name, value in memory.items():
            if is_cut(name, value):
                # One value for each number, or for each block of numbers.
                first, last = (n * len(value) // total for n in (start, start + piece.numel()))
                part[name] = value[first:last]
            if isinstance(value, torch.Tensor):
                part[name] = part[name].to(piece.device)
        optimizer.state[piece] = part
        start += piece.numel()


def is_cut(name: str, value: Any) -> bool:
    """Whether each piece of the buffer has a part of this value; else all have the same."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and name not in SHARED_MEMORY


@contextlib.contextmanager
def evaluating(state: TorchState) -> Iterator[None]:
    """Switch dropout off inside."""
    nets = [state.net, *state.text_encoders.values()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for net in nets:
            net.train()


@contextlib.contextmanager
def swapped(flat: torch.Tensor, other: torch.Tensor | None) -> Iterator[None]:
    """Exchange the contents of two flat buffers inside; None exchanges nothing."""
    exchange(flat, other)
    try:
        yield
    finally:
        exchange(flat, other)


def exchange(flat: torch.Tensor, other: torch.Tensor | None) -> None:
    """Exchange the contents of two buffers a piece at a time: no second model in memory."""
    if other is None:
        return
    for one, two in zip(flat.split(SWAP_PIECE), other.split(SWAP_PIECE), strict=True):
        copy = one.clone()
        one.copy_(two)
        two.copy_(copy)
