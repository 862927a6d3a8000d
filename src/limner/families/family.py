"""The record of a model family: its components, its features, and how its network is called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from limner.config.declare import PIXELS, Need
from limner.families.text import Text
from limner.json_types import Plain
from limner.protocols import Arguments, Array, BaseConfigs, Features


def keep_signal(output: Array, x: Array) -> Array:
    """Return the prediction of the signal; some networks predict a variance in further channels."""
    return output[:, : x.shape[1]]


@dataclass(frozen=True)
class Images:
    """How pictures become features, and features clean latents."""

    components: tuple[str, ...]  # they make image features
    # Encoders, and for each of ``views`` pixels in [-1, 1], [n, 3, H, W] -> image features, which
    # are cached.
    encode: Callable[..., Features]
    # Image features, configs, standard normal numbers -> clean latents.
    clean_latents: Callable[[Features, BaseConfigs, np.ndarray], np.ndarray]
    # The image features that ``clean_latents`` reads; all have the shape of its result.
    latent_features: tuple[str, ...]
    # The views of a picture that are encoded: as the recipe crops it, the middle square of it all.
    views: tuple[Literal["crop", "center_square"], ...] = ("crop",)
    # Pixels a side of the middle square.
    clip_size: Callable[[BaseConfigs], int] = lambda configs: 0
    # Configs -> what width and height of a crop are multiples of, in pixels.
    pixel_multiple: Callable[[BaseConfigs], int] = lambda configs: 1
    # Configs -> the longest side of a crop, in pixels.
    longest_side: Callable[[BaseConfigs], int] = lambda configs: PIXELS.most
    # Arrays among the trained network's weights that ``clean_latents`` reads.
    statistics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """The network that learns, and how it is called."""

    component: str
    # Noisy latents, timestep, batch -> keyword arguments. The timestep is float32 [n]: the number
    # of a step of the noise schedule, or a thousand times the sigma of a flow.
    enter: Callable[[Array, Array, dict[str, Array]], Arguments]
    # Output, noisy latents -> the prediction, of the latents' shape.
    leave: Callable[[Array, Array], Array] = keep_signal
    # Arrays among its weights that do not learn.
    frozen_arrays: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One of two models that make pictures together, one after the other."""

    other_stage: str  # the other one's family
    # The components of the other stage that make this one's features -> class name.
    needed_components: dict[str, str]
    combined_pipeline: str  # class name of the stock pipeline of both
    prefix: str  # of the names of this stage's components in the combined pipeline
    part: str  # the attribute of the combined pipeline that is this stage's own pipeline
    variable: str  # the name of its pipeline in example code
    # Prompt, as a Python literal -> lines of example code, with both pipelines open.
    draw: Callable[[str], Sequence[str]]
    # What a model card calls the other stage, for AutoPipelineForText2Image to find it.
    card_key: str = ""


@dataclass(frozen=True)
class Family:
    """One model family.

    Its functions take and return arrays whose first axis is the example; they work on numpy, torch
    and jax alike.
    """

    name: str
    pipeline: str  # class name of the stock diffusers pipeline
    components: dict[str, str]  # all that are read -> class name; "" for any scheduler
    images: Images
    text: Text
    network: Network
    # Component -> the modules that get adapters; those of text encoders only where the recipe asks.
    lora_targets: dict[str, tuple[str, ...]]
    stage: Stage | None = None  # where two models make pictures together
    lacks: tuple[Need, ...] = ()  # what settings need, and this family does not have
    # What in a base's configs does not fit together, in words.
    incompatibilities: Callable[[BaseConfigs], list[str]] = lambda configs: []
    # Configs -> arguments of the stock pipeline besides its components.
    pipeline_options: Callable[[BaseConfigs], Plain] = lambda configs: {}
    card_tag: str = "stable-diffusion"  # on a model card

    def trained_components(self, text_encoders: bool) -> tuple[str, ...]:
        """Return the components that a LoRA changes, the trained network first."""
        if not text_encoders:
            return (self.network.component,)
        encoders = [name for name in self.text.components if name in self.lora_targets]
        return (self.network.component, *encoders)

    @property
    def feature_components(self) -> tuple[str, ...]:
        """All components that weights and features depend on, those of the other stage last."""
        others = () if self.stage is None else tuple(self.stage.needed_components)
        return (*self.components, *others)

    @property
    def other_stage(self) -> str | None:
        """The family of the other stage; None where one model makes pictures alone."""
        return None if self.stage is None else self.stage.other_stage

    def link_other_stage(self, repository: str | None) -> dict[str, list[str]]:
        """Return what a model card says of the other stage, where it lies on the Hub."""
        if repository is None or self.stage is None or not self.stage.card_key:
            return {}
        return {self.stage.card_key: [repository]}
