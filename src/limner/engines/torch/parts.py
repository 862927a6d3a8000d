"""The frozen encoders in PyTorch: numpy in, numpy out, always float32, loaded when first called and let go of when told."""

from typing import Any

import numpy as np
import torch

from limner.base import Base


class TorchParts:
    """Components of a base by name, on one device."""

    def __init__(self, base: Base, device: torch.device):
        self.base, self.device = base, device
        self.loaded: dict[str, Any] = {}

    def component(self, name: str) -> Any:
        """A component in evaluation mode, without gradients."""
        if name not in self.loaded:
            self.loaded[name] = load(self.base, name)
            if isinstance(self.loaded[name], torch.nn.Module):
                self.loaded[name].requires_grad_(False).eval().to(self.device)
        return self.loaded[name]

    @torch.no_grad()
    def vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``family.Parts``."""
        posterior = self.component(name).encode(torch.tensor(pixels, device=self.device)).latent_dist
        return posterior.mean.cpu().numpy(), posterior.std.cpu().numpy()

    @torch.no_grad()
    def text(self, name: str, tokenizer: str, captions: list[str]) -> np.ndarray:
        """See ``family.Parts``; captions are padded, and cut at the tokenizer's length (which the index has counted and told)."""
        words = self.component(tokenizer)
        ids = words(captions, padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt").input_ids
        return self.component(name)(ids.to(self.device))[0].cpu().numpy()

    def lengths(self, tokenizer: str, captions: list[str]) -> list[int]:
        """Tokens of each caption, its start and end included, uncut."""
        return [len(ids) for ids in self.component(tokenizer)(captions, truncation=False, verbose=False).input_ids] if captions else []

    def limit(self, tokenizer: str) -> int:
        """Tokens that the text encoder can take."""
        return int(self.component(tokenizer).model_max_length)

    def release(self) -> None:
        """Let go of all components."""
        self.loaded.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load(base: Base, name: str) -> Any:
    """A component of a base with the class that its model_index names, from safetensors only."""
    import diffusers
    import transformers

    quiet()
    library, kind = base.configs["model_index"][name][:2]
    cls = getattr(diffusers if library == "diffusers" else transformers, kind)
    folder = base.part(name)
    if not hasattr(cls, "dtype"):
        return cls.from_pretrained(folder)
    return cls.from_pretrained(folder, use_safetensors=True, variant=base.variant, dtype=torch.float32)


def on_meta(base: Base) -> torch.nn.Module:
    """The trained network of a base without memory for its weights."""
    return of_config(base.configs[base.trains])


def of_config(known: dict[str, Any]) -> torch.nn.Module:
    """A network on the meta device."""
    import diffusers

    with torch.device("meta"):
        net: torch.nn.Module = getattr(diffusers, known["_class_name"]).from_config(known)
    return net


def quiet() -> None:
    """No progress bars of the libraries beside Limner's own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
