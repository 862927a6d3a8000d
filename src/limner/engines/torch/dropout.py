"""Dropout in PyTorch with masks of ``engines.dropout``, in place of the networks' own."""

import numpy as np
import torch

from limner.engines.dropout import keep_elements, mix
from limner.engines.torch.lora import to_file_name


class Masks:
    """The dropout masks of the micro-batch that is being computed, for all layers of a run."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        # int32 [rows, layers, 2]. Set until the backward pass is over: gradient checkpointing
        # makes masks there again, and in another thread.
        self.keys: torch.Tensor | None = None
        self.hashes = torch.empty(0, dtype=torch.int32)

    def add_layer(self, name: str) -> int:
        """Return the number of a new layer."""
        self.layers.append(name)
        return len(self.layers) - 1

    def keep(self, layer: int, shape: torch.Size, rate: float) -> torch.Tensor:
        """Return which elements of a layer's input are kept.

        Args:
            shape: [rows, ...]; or, of captions in chunks, [rows * chunks, ...].
        """
        assert self.keys is not None
        count = shape.numel() // len(self.keys)
        keep: torch.Tensor = keep_elements(self.keys[:, layer], self.hash_elements(count), rate)
        return keep.view(shape)

    def hash_elements(self, count: int) -> torch.Tensor:
        """Return the hashes of 0 to count - 1; those of more elements begin with them."""
        assert self.keys is not None
        if len(self.hashes) < count:
            hashes = mix(np.arange(count, dtype=np.uint32)).view(np.int32)
            self.hashes = torch.from_numpy(hashes).to(self.keys.device)
        return self.hashes[:count]


class AddressedDropout(torch.nn.Module):
    """Dropout whose mask is a function of seed, example and layer alone."""

    def __init__(self, rate: float, layer: int, masks: Masks):
        super().__init__()
        self.rate = rate
        self.layer = layer
        self.masks = masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of x, and scale the others up."""
        if not self.training:
            return x
        keep = self.masks.keep(self.layer, x.shape, self.rate)
        return torch.where(keep, x / (1 - self.rate), 0)


def replace_dropout(nets: dict[str, torch.nn.Module]) -> Masks:
    """Replace every active ``nn.Dropout`` of the trained networks; return their masks."""
    masks = Masks()
    for component, net in nets.items():
        for name, module in list(net.named_modules()):
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                layer = masks.add_layer(f"{component}.{to_file_name(name, net)}")
                net.set_submodule(name, AddressedDropout(module.p, layer, masks))
    return masks
