"""AdamW on the flat buffer: gradient norm, clipping and update, without a wait for the device."""

import math
from typing import Any

import torch

from limner.config.schema import OptimizerSettings
from limner.engines.torch.flat_parameters import ALIGN
from limner.engines.torch.state import TorchState
from limner.errors import InputError

# bitsandbytes 0.50 counts in 32 bits: above 2**31 - 1 numbers it ends the process.
ADAMW8BIT_MOST = 1 << 30


def make_optimizer(settings: OptimizerSettings, flat: torch.nn.Parameter) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of the flat buffer.

    Raises:
        InputError: where it cannot run.
    """
    numbers: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw8bit":
        return load_adamw8bit()(split_for_adamw8bit(flat, ADAMW8BIT_MOST), **numbers)
    has_kernel = flat.device.type in ("cpu", "cuda", "xpu", "mps")
    return torch.optim.AdamW([flat], fused=has_kernel, **numbers)


def split_for_adamw8bit(flat: torch.nn.Parameter, most: int) -> list[torch.nn.Parameter]:
    """Return the buffer in pieces of at most ``most`` numbers, each with its part of the gradient.

    They are whole blocks, so that moments are what they would be in one piece.
    """
    assert flat.grad is not None
    # All about equally long: fewer than 4096 numbers get moments of 32 bits.
    count = math.ceil(flat.numel() / most)
    size = math.ceil(flat.numel() / count / ALIGN) * ALIGN
    pieces = []
    for weights, gradient in zip(flat.data.split(size), flat.grad.split(size), strict=True):
        pieces.append(torch.nn.Parameter(weights))
        pieces[-1].grad = gradient
    return pieces


def load_adamw8bit() -> Any:
    """Return the class of AdamW with 8-bit moments, from bitsandbytes (arXiv:2110.02861).

    Raises:
        InputError: where it cannot run.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            'optim.kind: adamw8bit needs bitsandbytes, "pip install bitsandbytes", and a CUDA '
            'device; or use optim.kind="adamw"'
        ) from error
    if not torch.cuda.is_available():
        raise InputError(
            "optim.kind: adamw8bit runs on CUDA devices only, and there is none; use "
            'optim.kind="adamw"'
        )
    return AdamW8bit


def compute_norm(flat: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of a buffer."""
    # In two steps: in one, PyTorch's kernel for the CPU loses 6e-5 over three million numbers, and
    # more over more.
    return torch.linalg.vector_norm(flat.view(-1, ALIGN), dim=1).square().sum().sqrt()


def clip_and_update(
    state: TorchState, loss: torch.Tensor, step: int, max_grad_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the gradient and update the weights, unless something is not finite.

    All decisions are tensors on the device: the host never waits to know them.

    Returns:
        the gradient's norm, and whether the weights were updated.
    """
    gradient = state.parameters.flat.grad
    assert gradient is not None
    # With a scaler the gradient is that of the scaled loss. The public get_scale() would wait for
    # the device; this is the same number, still on it.
    enabled = state.scaler.is_enabled()
    scale = state.scaler._get_scale_async() if enabled else torch.ones_like(loss)
    assert scale is not None
    norm = compute_norm(gradient) / scale
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    # A gradient that overflows for its scale is no fault: the scaler leaves out this step, lowers
    # the scale and goes on, down to a scale of 1.
    overflow = torch.isfinite(loss) & (scale > 1.0)
    is_first_fault = (state.fault < 0) & ~finite & ~overflow
    # The host reads it when metrics are fetched.
    state.fault = torch.where(is_first_fault, step, state.fault)
    shrink = torch.clamp((norm + 1e-6) / max_grad_norm, min=1.0)
    update(state, gradient, shrink, finite)
    return norm, finite


def update(
    state: TorchState, gradient: torch.Tensor, shrink: torch.Tensor, finite: torch.Tensor
) -> None:
    """Step the optimizer with the gradient divided by ``shrink``, if ``finite`` is true."""
    optimizer: Any = state.optimizer
    scaler = state.scaler
    if scaler.is_enabled():
        # From here on the scaler leaves the gradient as it is, and has looked for overflows in it.
        scaler.unscale_(optimizer)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        # No flags, so the gradient itself is clipped, and is zero where it must change nothing.
        gradient.div_(shrink).masked_fill_(~finite, 0.0)
        scaler.step(optimizer)
        scaler.update()
        return
    # The fused kernel divides by grad_scale, and does nothing where found_inf is set: weights and
    # moments keep their bits.
    optimizer.grad_scale = shrink
    optimizer.found_inf = (~finite).float()
    if scaler.is_enabled():
        # The scaler puts in its own found_inf, takes grad_scale as it is, and deletes both.
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
        # A flag that stays behind would be read in the next step.
        del optimizer.grad_scale
        del optimizer.found_inf
