"""What a model family is: how its parts are named, what is encoded once, how the trained network is
called. No framework in here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from limner.protocols import Configs, Features, TextEncoders


@dataclass(frozen=True)
class Stage:
    """One of two models that make pictures together, one after the other."""

    other_stage: str  # the family of the other one
    needed_components: dict[
        str, str
    ]  # the components of the other one that this one's features are made with -> class name
    combined_pipeline: str  # class name of the stock pipeline of both
    prefix: str  # what the names of this one's components begin with in it


@dataclass(frozen=True)
class Family:
    """One model family. Functions take and return arrays whose first axis is the example; they work
    on numpy, torch and jax alike."""

    name: str
    pipeline: str  # class name of the stock diffusers pipeline
    trained_component: str  # the component that learns
    components: dict[str, str]  # every component that is read -> its class name
    # parts, and for each of ``views`` pixels in [-1, 1], [n, 3, H, W] -> what is cached per picture
    encode_image: Callable[..., Features]
    encode_text: Callable[
        [TextEncoders, dict[str, Any]], dict[str, Any]
    ]  # token ids by tokenizer, [n, chunks, length] -> what the network is told of a caption
    clean_latents: Callable[
        [Features, Configs, np.ndarray], np.ndarray
    ]  # features, configs (with ``fixed``), standard normal -> x0
    latent_features: tuple[
        str, ...
    ]  # the image features that ``clean`` turns into x0; all have the shape of x0
    network_inputs: Callable[
        [dict[str, Any]], dict[str, Any]
    ]  # batch -> keyword arguments of the trained network
    lora_targets: dict[
        str, tuple[str, ...]
    ]  # component -> the modules that get adapters; those of text encoders by wish only
    card_tag: str = "stable-diffusion"  # on a model card
    image_views: tuple[Literal["crop", "center_square"], ...] = (
        "crop",
    )  # of a picture: as the recipe cuts it; the middle square of the whole of it
    clip_image_size: Callable[[Configs], int] = lambda configs: 0  # pixels a side of ``whole``
    stage: Stage | None = None  # where two models make pictures together
    # arrays among the trained network's weights that do not learn; their numbers are
    # ``configs["fixed"]``
    frozen_arrays: tuple[str, ...] = ()
    ignored_settings: tuple[str, ...] = ()  # settings that mean nothing to it
    uses_attention_mask: bool = (
        False  # whether the network is told which tokens are words: ``mask``, bool [n, length]
    )
    tokenizers: tuple[str, ...] = ("tokenizer",)
    text_components: tuple[str, ...] = ("text_encoder",)  # the components that make text features
    image_components: tuple[str, ...] = ("vae",)  # the components that make image features
    incompatibilities: Callable[[Configs], list[str]] = (
        lambda configs: []
    )  # what in a base's configs does not fit together, in words
    zeros_for_empty_prompt: Callable[[Configs], bool] = lambda configs: (
        False
    )  # whether the stock pipeline has zeros for a prompt that is not given

    def trained_components(self, text_encoders: bool) -> tuple[str, ...]:
        """The components that a LoRA changes, the trained network first."""
        return (
            self.trained_component,
            *(name for name in self.text_components if text_encoders and name in self.lora_targets),
        )
