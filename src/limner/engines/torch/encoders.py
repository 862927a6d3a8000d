"""The frozen encoders in PyTorch, numpy in and numpy out, each loaded when it is first used."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from limner.base_model.base import BaseModel
from limner.engines.torch.weights import load_component
from limner.features.arrays import NumpyFeatures

# Of CLIP's training images, by colour, 0 to 1.
CLIP_STATISTICS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


class StockTokenizers:
    """Tokenizers of transformers, by name; see ``protocols.Tokenizers``."""

    def component(self, name: str) -> Any:
        """Return a tokenizer."""
        raise NotImplementedError

    def list_token_ids(self, tokenizer: str, texts: list[str]) -> list[list[int]]:
        """See ``protocols.Tokenizers``."""
        # Tokenizers do not take an empty list.
        if not texts:
            return []
        tokens = self.component(tokenizer)(texts, truncation=False, verbose=False)
        ids: list[list[int]] = tokens.input_ids
        return ids

    def pad_token(self, tokenizer: str) -> int:
        """See ``protocols.Tokenizers``."""
        return int(self.component(tokenizer).pad_token_id)

    def max_tokens(self, tokenizer: str) -> int:
        """See ``protocols.Tokenizers``."""
        return int(self.component(tokenizer).model_max_length)


class PipelineTokenizers(StockTokenizers):
    """Those of a stock pipeline.

    Args:
        prefix: of their names in it.
    """

    def __init__(self, pipeline: Any, prefix: str):
        self.components = pipeline.components
        self.prefix = prefix

    def component(self, name: str) -> Any:
        """Return a tokenizer."""
        return self.components[f"{self.prefix}{name}"]


class TorchEncoders(StockTokenizers, NumpyFeatures):
    """Components of a base by name, on one device.

    Args:
        half: the precision of components that are safe in half; all others are float32.
    """

    def __init__(
        self, base: BaseModel, device: torch.device, half: dict[str, torch.dtype] | None = None
    ):
        self.base = base
        self.device = device
        self.half = half or {}
        self.loaded: dict[str, Any] = {}

    def component(self, name: str) -> Any:
        """Return a component; a network is in evaluation mode, without gradients."""
        if name not in self.loaded:
            component = load_component(self.base, name)
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
                # diffusers' own .to() warns of modules to keep in float32, and names none.
                torch.nn.Module.to(component, self.device, self.half.get(name, torch.float32))
            self.loaded[name] = component
        return self.loaded[name]

    @torch.no_grad()
    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.Encoders``."""
        images = torch.tensor(pixels, device=self.device, dtype=self.half.get(name))
        posterior = self.component(name).encode(images).latent_dist
        return to_numpy(posterior.mean), to_numpy(posterior.std)

    @torch.no_grad()
    def encode_movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        images = torch.tensor(pixels, device=self.device)
        return to_numpy(self.component(name).encode(images).latents)

    @torch.no_grad()
    def encode_image(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        config = self.base.configs[processor]
        mean, std = (
            np.asarray(config.get(f"image_{statistic}", usual), np.float32)[:, None, None]
            for statistic, usual in CLIP_STATISTICS.items()
        )
        normalized = (pixels * np.float32(0.5) + np.float32(0.5) - mean) / std
        images = torch.tensor(normalized, device=self.device)
        return to_numpy(self.component(name)(images).image_embeds)

    @torch.no_grad()
    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """See ``protocols.TextEncoders``."""
        tokens = torch.tensor(ids, device=self.device)
        states, pooled = run_text_encoder(self.component(name), tokens, skip)
        return states.cpu().numpy(), None if pooled is None else pooled.cpu().numpy()

    def release(self, names: Iterable[str] | None = None) -> None:
        """Free these components, or all; they are loaded again when they are next used."""
        for name in list(self.loaded) if names is None else names:
            self.loaded.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class TrainableTextEncoders:
    """Text encoders that are trained, as ``protocols.TextEncoders``."""

    def __init__(self, nets: dict[str, torch.nn.Module]):
        self.nets = nets

    def encode_text(
        self, name: str, ids: torch.Tensor, skip: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``protocols.TextEncoders``."""
        return run_text_encoder(self.nets[name], ids, skip)

    def concat(self, arrays: list[torch.Tensor], axis: int) -> torch.Tensor:
        """See ``protocols.TextEncoders``."""
        return torch.cat(arrays, dim=axis)

    def pad_width(self, array: torch.Tensor, width: int) -> torch.Tensor:
        """See ``protocols.TextEncoders``."""
        return torch.nn.functional.pad(array, (0, width - array.shape[-1]))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor on the host, float32."""
    array: np.ndarray = tensor.float().cpu().numpy()
    return array


def run_text_encoder(
    net: Any, ids: torch.Tensor, skip: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the states and the pooled embedding of a text encoder.

    The embedding is the projected one, where there is a projection; T5 has none.
    """
    output = net(ids, output_hidden_states=skip > 0)
    states = output.hidden_states[-1 - skip] if skip else output.last_hidden_state
    return states, output.get("text_embeds", output.get("pooler_output"))


def checkpoint_gradients(net: torch.nn.Module) -> None:
    """Switch gradient checkpointing on (arXiv:1604.06174)."""
    if getattr(net, "_supports_gradient_checkpointing", True):
        # diffusers' name, and transformers'.
        enable: Any = getattr(net, "enable_gradient_checkpointing", None)
        enable = enable or net.gradient_checkpointing_enable
        enable()
        return
    # diffusers has none for a prior: each block of its transformer is recomputed as a whole.
    for block in net.transformer_blocks:  # type: ignore[union-attr]
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
