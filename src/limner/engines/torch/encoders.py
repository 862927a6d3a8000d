"""The frozen encoders in PyTorch: numpy in, numpy out, always float32, loaded when first called and
let go of when told."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from limner.base_model.base import BaseModel
from limner.families.text import split_into_chunks

CLIP_STATISTICS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}  # of its training pictures, by colour, 0 to 1


class TorchEncoders:
    """Components of a base by name, on one device.

    Args:
        half: the precision of components that are safe in half; all others are float32.
    """

    def __init__(
        self, base: BaseModel, device: torch.device, half: dict[str, torch.dtype] | None = None
    ):
        self.base, self.device, self.half = base, device, half or {}
        self.loaded: dict[str, Any] = {}

    def component(self, name: str) -> Any:
        """A component in evaluation mode, without gradients."""
        if name not in self.loaded:
            self.loaded[name] = load_component(self.base, name)
            if isinstance(self.loaded[name], torch.nn.Module):
                self.loaded[name].requires_grad_(False).eval().to(
                    self.device, self.half.get(name, torch.float32)
                )
        return self.loaded[name]

    @torch.no_grad()
    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.Encoders``."""
        posterior = (
            self.component(name)
            .encode(torch.tensor(pixels, device=self.device, dtype=self.half.get(name)))
            .latent_dist
        )
        return posterior.mean.float().cpu().numpy(), posterior.std.float().cpu().numpy()

    @torch.no_grad()
    def encode_movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        latents: np.ndarray = (
            self.component(name)
            .encode(torch.tensor(pixels, device=self.device))
            .latents.float()
            .cpu()
            .numpy()
        )
        return latents

    @torch.no_grad()
    def encode_image(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        known = self.base.configs[processor]
        mean, std = (
            np.asarray(known.get(f"image_{what}", usual), np.float32)[:, None, None]
            for what, usual in CLIP_STATISTICS.items()
        )
        embeds: torch.Tensor = self.component(name)(
            torch.tensor(
                (pixels * np.float32(0.5) + np.float32(0.5) - mean) / std, device=self.device
            )
        ).image_embeds
        seen: np.ndarray = embeds.float().cpu().numpy()
        return seen

    @torch.no_grad()
    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.TextEncoders``."""
        states, pooled = run_text_encoder(
            self.component(name), torch.tensor(ids, device=self.device), skip
        )
        return states.cpu().numpy(), pooled.cpu().numpy()

    def concat_features(self, arrays: list[np.ndarray]) -> np.ndarray:
        """See ``protocols.TextEncoders``."""
        return np.concatenate(arrays, axis=-1)

    def tokenize(self, tokenizer: str, captions: list[str], chunks: int) -> np.ndarray:
        """See ``protocols.Encoders``; what does not fit is cut (which the index has counted and
        told)."""
        words = self.component(tokenizer)
        start, end = (words("", truncation=False).input_ids[i] for i in (0, -1))
        ids = words(captions, truncation=False, verbose=False).input_ids if captions else []
        return split_into_chunks(
            ids, chunks, words.model_max_length, start, end, words.pad_token_id
        )

    def count_tokens(self, tokenizer: str, captions: list[str]) -> list[int]:
        """Tokens of each caption, its start and end included, uncut."""
        return (
            [
                len(ids)
                for ids in self.component(tokenizer)(
                    captions, truncation=False, verbose=False
                ).input_ids
            ]
            if captions
            else []
        )

    def max_tokens(self, tokenizer: str) -> int:
        """Tokens that the text encoder can take."""
        return int(self.component(tokenizer).model_max_length)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of these components, of all where none are named; one that is asked for again is
        loaded again."""
        for name in list(self.loaded) if names is None else names:
            self.loaded.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class TrainableTextEncoders:
    """Text encoders that are being trained: token ids in, states with gradients out; see
    ``protocols.TextEncoders``."""

    def __init__(self, nets: dict[str, torch.nn.Module]):
        self.nets = nets

    def encode_text(
        self, name: str, ids: torch.Tensor, skip: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return run_text_encoder(self.nets[name], ids, skip)

    def concat_features(self, arrays: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(arrays, dim=-1)


def run_text_encoder(net: Any, ids: torch.Tensor, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A CLIP text encoder's states and its pooled, where it has a projection projected,
    embedding."""
    heard = net(ids, output_hidden_states=skip > 0)
    pooled = heard.text_embeds if "text_embeds" in heard else heard.pooler_output
    return heard.hidden_states[-1 - skip] if skip else heard.last_hidden_state, pooled


def load_component(base: BaseModel, name: str) -> Any:
    """A component of a base with the class that its model_index names, from safetensors only."""
    import diffusers
    import transformers

    silence_progress_bars()
    library, kind = base.component_class(name)
    cls = getattr(diffusers if library == "diffusers" else transformers, kind)
    folder = base.component_folder(name)
    if not hasattr(cls, "dtype"):
        return cls.from_pretrained(folder)
    return cls.from_pretrained(
        folder, use_safetensors=True, variant=base.variant, dtype=torch.float32
    )


def checkpoint_gradients(net: torch.nn.Module) -> None:
    """Gradient checkpointing: diffusers' own, where it has one for this network; else block by
    block of its transformer (arXiv:1604.06174)."""
    if getattr(net, "_supports_gradient_checkpointing", True):
        switch: Any = (
            getattr(net, "enable_gradient_checkpointing", None) or net.gradient_checkpointing_enable
        )
        switch()
        return
    for block in net.transformer_blocks:  # type: ignore[union-attr]
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def build_on_meta(base: BaseModel) -> torch.nn.Module:
    """The trained network of a base without memory for its weights."""
    return build_from_config(base.configs[base.trained_component])


def build_from_config(known: dict[str, Any]) -> torch.nn.Module:
    """A network on the meta device."""
    import diffusers

    with torch.device("meta"):
        net: torch.nn.Module = getattr(diffusers, known["_class_name"]).from_config(known)
    return net


def silence_progress_bars() -> None:
    """No progress bars of the libraries beside Limner's own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
