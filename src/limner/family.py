"""What a model family is: how its parts are named, what is encoded once, how the trained network is called. No framework in here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Features = dict[str, np.ndarray]  # first axis: examples
Configs = dict[str, dict[str, Any]]  # component name -> its config.json, from the base


class Parts(Protocol):
    """The frozen encoders of a base, numpy in and numpy out, loaded when first called; every engine has its own."""

    def vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the posterior, float32 [n, channels, h, w], for pixels in [-1, 1], float32 [n, 3, H, W]."""
        ...

    def text(self, name: str, tokenizer: str, captions: list[str]) -> np.ndarray:
        """Hidden states after the last layer norm, float32 [n, tokens, width]."""
        ...


@dataclass(frozen=True)
class Family:
    """One model family. Functions take and return arrays whose first axis is the example; they work on numpy, torch and jax alike."""

    name: str
    pipeline: str  # class name of the stock diffusers pipeline
    trains: str  # the component that learns
    components: dict[str, str]  # every component that is read -> its class name
    image: Callable[[Parts, np.ndarray], Features]  # pixels in [-1, 1], [n, 3, H, W] -> what is cached per picture
    text: Callable[[Parts, list[str]], Features]  # what is cached per caption
    clean: Callable[[Features, Configs, np.ndarray], np.ndarray]  # features, configs, standard normal -> x0
    latent: tuple[str, ...]  # the image features that ``clean`` turns into x0; all have the shape of x0
    inputs: Callable[[dict[str, Any]], dict[str, Any]]  # batch -> keyword arguments of the trained network
    lora_targets: tuple[str, ...]
    tokenizers: tuple[str, ...] = ("tokenizer",)
    misfits: Callable[[Configs], list[str]] = lambda configs: []  # what in a base's configs does not fit together, in words
