"""All trainable parameters as views of one flat buffer.

The optimizer, the gradient norm, the average and the all-reduce are then one call each.
"""

import math

import torch

from limner.engines.state import check_arrays
from limner.protocols import Arrays

# In numbers: no parameter shares a cache line, or a block of an 8-bit optimizer, with another.
ALIGN = 256


class FlatParameters:
    """The flat float32 parameter ``flat``, its gradient, and where each name lies in them.

    Args:
        named: the parameters to train; they keep their identity, their memory moves into the
            buffer.
    """

    def __init__(self, named: dict[str, torch.nn.Parameter]):
        device = next(iter(named.values())).device
        self.spans: dict[str, tuple[int, torch.Size]] = {}
        total = 0
        for name, parameter in named.items():
            self.spans[name] = (total, parameter.shape)
            total += math.ceil(parameter.numel() / ALIGN) * ALIGN
        self.flat = torch.nn.Parameter(torch.zeros(total, device=device))
        self.flat.grad = torch.zeros(total, device=device)
        weights = self.views(self.flat.data)
        gradients = self.views(self.flat.grad)
        for name, parameter in named.items():
            # One at a time: a parameter's old memory is freed (or, mapped from a file, never read)
            # before the next is copied. All at once would be the peak of the run.
            weights[name].copy_(parameter.data)
            parameter.data = weights[name]
            parameter.grad = gradients[name]

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of a flat tensor by name, each in its parameter's shape."""
        return {
            name: flat[start : start + shape.numel()].view(shape)
            for name, (start, shape) in self.spans.items()
        }

    def read(self, flat: torch.Tensor) -> Arrays:
        """Return a flat tensor as numpy arrays by name, on the host."""
        host = flat.detach().cpu()
        return {name: view.numpy() for name, view in self.views(host).items()}

    def write(self, flat: torch.Tensor, arrays: Arrays, source: str) -> None:
        """Write arrays into a flat tensor; the inverse of ``read``.

        Args:
            source: where the arrays are from, for the message.

        Raises:
            IntegrityError: unless names, shapes and dtypes are those of the parameters.
        """
        shapes = {name: tuple(shape) for name, (_, shape) in self.spans.items()}
        dtype = torch.empty(0, dtype=flat.dtype).numpy().dtype
        check_arrays(arrays, shapes, dtype, source)
        for name, view in self.views(flat).items():
            with torch.no_grad():
                view.copy_(torch.tensor(arrays[name]))
