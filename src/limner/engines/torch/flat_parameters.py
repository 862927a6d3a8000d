"""All trainable parameters as views of one flat buffer, so that the optimizer, the gradient norm,
the average and the all-reduce are one call each."""

import math

import numpy as np
import torch

from limner.errors import IntegrityError
from limner.protocols import Arrays

ALIGN = (
    256  # numbers: no parameter shares a cache line, or a block of an 8-bit optimizer, with another
)


class FlatParameters:
    """The flat float32 parameter ``flat`` (its gradient too), and where each name lies in it.

    Args:
        named: the parameters that learn; they keep their identity, their memory moves into the
            buffer.
    """

    def __init__(self, named: dict[str, torch.nn.Parameter]):
        device = next(iter(named.values())).device
        self.spans: dict[str, tuple[int, torch.Size]] = {}
        total = 0
        for name, parameter in named.items():
            self.spans[name] = (total, parameter.shape)
            total += math.ceil(parameter.numel() / ALIGN) * ALIGN
        self.count = sum(p.numel() for p in named.values())
        self.flat = torch.nn.Parameter(torch.zeros(total, device=device))
        self.flat.grad = torch.zeros(total, device=device)
        weights, gradients = self.views(self.flat.data), self.views(self.flat.grad)
        for name, parameter in named.items():
            weights[name].copy_(parameter.data)
            # what it had is free now, or was never read into memory: both at once would be the
            # run's peak
            parameter.data = weights[name]
            parameter.grad = gradients[name]

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat tensor laid out like the parameters, by name."""
        return {
            name: flat[start : start + shape.numel()].view(shape)
            for name, (start, shape) in self.spans.items()
        }

    def read(self, flat: torch.Tensor) -> Arrays:
        """A flat tensor as numpy arrays by name, on the host."""
        host = flat.detach().cpu()
        return {name: view.numpy() for name, view in self.views(host).items()}

    def write(self, flat: torch.Tensor, arrays: Arrays, what: str) -> None:
        """The inverse of ``read``; names, shapes and dtypes must be those of the parameters."""
        views = self.views(flat)
        if strange := sorted(arrays.keys() ^ views.keys()):
            raise IntegrityError(
                f"{what}: {len(strange)} names differ from the model's, such as {strange[0]}"
            )
        for name, view in views.items():
            array = arrays[name]
            if (
                array.shape != tuple(view.shape)
                or torch.from_numpy(np.empty(0, array.dtype)).dtype != view.dtype
            ):
                raise IntegrityError(
                    f"{what}: {name} is {array.dtype} {list(array.shape)}, the model has "
                    f"{view.dtype} {list(view.shape)}"
                )
            with torch.no_grad():
                view.copy_(torch.tensor(array))
