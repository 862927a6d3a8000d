"""The record of a model family: its components, its features, and how its network is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from limner.config.declare import Need
from limner.protocols import BaseConfigs, Features, TextEncoders


@dataclass(frozen=True)
class Stage:
    """One of two models that make pictures together, one after the other."""

    other_stage: str  # the other one's family
    # The components of the other stage that make this one's features -> class name.
    needed_components: dict[str, str]
    combined_pipeline: str  # class name of the stock pipeline of both
    prefix: str  # of the names of this stage's components in the combined pipeline


@dataclass(frozen=True)
class Family:
    """One model family.

    Functions take and return arrays whose first axis is the example; they work on numpy, torch and
    jax alike.
    """

    name: str
    pipeline: str  # class name of the stock diffusers pipeline
    trained_component: str  # the component that learns
    components: dict[str, str]  # every component that is read -> class name
    # Encoders, and for each of ``image_views`` pixels in [-1, 1], [n, 3, H, W] -> image features,
    # which are cached.
    encode_image: Callable[..., Features]
    # Encoders, token ids [n, chunks, length] by tokenizer -> text features.
    encode_text: Callable[[TextEncoders, dict[str, Any]], dict[str, Any]]
    # Image features, configs, standard normal numbers -> clean latents.
    clean_latents: Callable[[Features, BaseConfigs, np.ndarray], np.ndarray]
    # The image features that ``clean_latents`` reads; all have the shape of its result.
    latent_features: tuple[str, ...]
    # Batch -> keyword arguments of the trained network.
    network_inputs: Callable[[dict[str, Any]], dict[str, Any]]
    # Component -> the modules that get adapters; those of text encoders only where the recipe asks.
    lora_targets: dict[str, tuple[str, ...]]
    card_tag: str = "stable-diffusion"  # on a model card
    # The views of a picture that are encoded: as the recipe crops it, the middle square of it all.
    image_views: tuple[Literal["crop", "center_square"], ...] = ("crop",)
    # Pixels a side of the middle square.
    clip_image_size: Callable[[BaseConfigs], int] = lambda configs: 0
    stage: Stage | None = None  # where two models make pictures together
    # Arrays among the trained network's weights that do not learn.
    frozen_arrays: tuple[str, ...] = ()
    lacks: tuple[Need, ...] = ()  # what settings need, and this family does not have
    # Whether the network reads which tokens are words: ``mask``, bool [n, length].
    uses_attention_mask: bool = False
    tokenizers: tuple[str, ...] = ("tokenizer",)
    text_components: tuple[str, ...] = ("text_encoder",)  # they make text features
    image_components: tuple[str, ...] = ("vae",)  # they make image features
    # What in a base's configs does not fit together, in words.
    incompatibilities: Callable[[BaseConfigs], list[str]] = lambda configs: []
    # Whether the stock pipeline takes zeros for the features of a prompt that is not given.
    zeros_for_empty_prompt: Callable[[BaseConfigs], bool] = lambda configs: False

    def trained_components(self, text_encoders: bool) -> tuple[str, ...]:
        """Return the components that a LoRA changes, the trained network first."""
        if not text_encoders:
            return (self.trained_component,)
        encoders = [name for name in self.text_components if name in self.lora_targets]
        return (self.trained_component, *encoders)
