"""Draw pictures in JAX: encode prompts, run a sampler's table, decode latents."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from limner.base_model.base import BaseModel
from limner.base_model.configs import list_components
from limner.base_model.open import check_trained_on, open_base, read_pipeline_class
from limner.diffusion.sampler_settings import list_served
from limner.diffusion.starting_noise import draw_starting_noise
from limner.engines.jax import vae
from limner.engines.jax.attention import Array, Kernel, choose_kernel
from limner.engines.jax.denoiser import Denoiser, make_outputs
from limner.engines.jax.encoders import JaxEncoders
from limner.engines.jax.lora_file import read_lora
from limner.engines.jax.nn import Params
from limner.engines.jax.processes import choose_devices, local_device
from limner.engines.jax.sampler import make_base_table
from limner.engines.jax.settings import complete
from limner.engines.jax.weights import check_base, read_component, serves
from limner.engines.pictures import report_broken, round_pictures
from limner.engines.state import find_half_dtype
from limner.errors import InputError
from limner.families import FAMILIES, find_pipeline_family
from limner.families.family import Family
from limner.families.sdxl import decode_latents
from limner.families.text import encode_captions, tokenize
from limner.features.arrays import NumpyFeatures
from limner.features.caption_lengths import report_cut_prompts
from limner.progress import print_line
from limner.protocols import DrawCall, ModelSource, Report
from limner.storage.layout import LORA_FILE

OLD_SAMPLE_SIZE = 64  # latents a side of Stable Diffusion 1.x, where diffusers wrote another
GUIDANCE_SCALES = {"sd": 7.5, "sdxl": 5.0}  # of the stock pipelines


@dataclass
class Pipeline(NumpyFeatures):
    """A base model that draws, with other weights for some of its networks.

    Args:
        nets: components whose arrays differ from the base's, among them the trained network.
        half: the type that the UNet computes in; None: float32.
        scheduler: the sampler; None: the base's own.
        kernel: of attention.
        text_dtype: the type that text encoders have in the stock pipeline, unless in ``nets``.
    """

    base: BaseModel
    family: Family
    encoders: JaxEncoders
    nets: dict[str, Params]
    prediction_type: str | None
    half: Any = None
    scheduler: str | None = None
    kernel: Kernel | None = None
    text_dtype: Any = jnp.float32
    compiled: dict[float, Any] = field(default_factory=dict)

    @property
    def noise_dtype(self) -> Any:
        """The type that the stock pipeline draws noise in: that of its last text encoder."""
        net = self.nets.get(self.family.text.components[-1])
        return self.text_dtype if net is None else next(iter(net.arrays.values())).dtype

    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.TextEncoders``; trained text encoders replace the base's."""
        return self.encoders.encode_text(name, ids, skip, self.nets.get(name))

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the text features of prompts."""
        tokens = tokenize(self.family.text, self.encoders, list(prompts), 1)
        return encode_captions(self.family.text, self, tokens)

    def encode_negative(self, negative: str | None, count: int) -> dict[str, np.ndarray]:
        """Return the text features of a negative prompt, ``count`` times.

        Without one the stock pipelines of some bases have zeros in their place.
        """
        features = self.encode_prompts([negative or ""] * count)
        if negative is None and self.family.text.zeros_for_empty_prompt(self.base.configs):
            return {name: np.zeros_like(array) for name, array in features.items()}
        return features

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str | None = None,
        batch: int = 4,
        report: Report = print_line,
        check_stop: Callable[[], None] = lambda: None,
        keep: Callable[[list[np.ndarray]], None] = lambda pictures: None,
        **call: Unpack[DrawCall],
    ) -> list[np.ndarray]:
        """Draw one picture per prompt and seed, uint8 [size, size, 3].

        A picture depends on its seed, but not on the device or the size of the batch. It is that
        of the stock pipeline with ``torch.Generator("cpu").manual_seed(seed)``.

        Args:
            negative: the negative prompt of all pictures.
            report: told of pictures that are not finite.
            check_stop: called after each step of the sampler; what it raises ends the drawing.
            keep: called with the pictures of each batch, as soon as they are drawn.
        """
        side = latent_side(self.base, call["size"])
        shape = (self.base.configs["unet"].get("in_channels", 4), side, side)
        pictures: list[np.ndarray] = []
        broken: list[bool] = []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            noise = [
                draw_starting_noise(shape, seed, self.noise_dtype).astype(np.float32)
                for seed in seeds[start : start + batch]
            ]
            count = len(part)
            if len(prompts) > batch:
                # The last batch is filled up, so that only one shape is compiled.
                part += part[-1:] * (batch - count)
                noise += noise[-1:] * (batch - count)
            images = self.draw_from_noise(
                part, np.stack(noise), negative=negative, check_stop=check_stop, **call
            )
            drawn, flags = round_pictures(images[:count])
            keep(drawn)
            pictures += drawn
            broken += flags
        report_broken(prompts, seeds, broken, report)
        return pictures

    def draw_from_noise(
        self,
        prompts: Sequence[str],
        noise: np.ndarray,
        *,
        steps: int,
        guidance_scale: float | None,
        size: int | None,
        negative: str | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Draw one picture per prompt from the starting noise, float32 [n, size, size, 3] in
        [0, 1]; see ``draw``.

        Args:
            noise: standard normal, [n, channels, h, w].
        """
        if guidance_scale is None:
            guidance_scale = GUIDANCE_SCALES[self.family.name]
        pixels = latent_side(self.base, size) * latent_factor(self.base)
        guided = guidance_scale > 1
        features = self.encode_prompts(prompts)
        if guided:
            against = self.encode_negative(negative, len(prompts))
            features = {
                name: np.concatenate([against[name], array]) for name, array in features.items()
            }
        latents = self.denoise(noise, features, steps, guidance_scale, pixels, check_stop)
        decoded = self.encoders.decode("vae", decode_latents(latents, self.base.configs))
        return np.clip(decoded / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)

    def denoise(
        self,
        noise: np.ndarray,
        features: dict[str, np.ndarray],
        steps: int,
        guidance_scale: float,
        size: int,
        check_stop: Callable[[], None],
    ) -> np.ndarray:
        """Sample clean latents, float32 [n, channels, h, w]; see ``Denoiser.sample``.

        Args:
            size: pixels a side, which XL is conditioned on.
            check_stop: called after each step.
        """
        table = make_base_table(
            self.base,
            self.family,
            steps,
            name=self.scheduler,
            prediction_type=self.prediction_type,
        )
        net = self.nets[self.family.network.component]
        rows = len(next(iter(features.values())))
        size_and_crop = np.array([size, size, 0, 0, size, size], np.float32)
        features = features | {"size_and_crop": np.tile(size_and_crop, (rows, 1))}
        step = self.make_step(net.scale)
        features = jax.tree.map(jnp.asarray, features)
        scale, guided = np.float32(guidance_scale), guidance_scale > 1
        outputs = make_outputs(len(table.coefficients), jnp.asarray(noise))
        with jax.default_matmul_precision("highest" if self.half is None else None):
            for row in zip(
                np.arange(len(table.timesteps)),
                table.timesteps,
                table.coefficients[:-1],
                strict=True,
            ):
                outputs = step(net.arrays, outputs, row, features, scale, guided=guided)
                # Unless the device is waited for, all steps are under way when a stop is heard.
                outputs.block_until_ready()
                check_stop()
            latents = jnp.tensordot(table.coefficients[-1], outputs, 1)
        return np.asarray(latents, np.float32)

    def make_step(self, scale: float) -> Any:
        """Return the compiled step of a sampler; see ``Denoiser.step``.

        One program serves all arrays, which it must not hold: previews change them.

        Args:
            scale: alpha / rank of the network's LoRA.
        """
        if scale not in self.compiled:
            config = self.base.configs[self.family.network.component]
            dtype = self.half or jnp.float32
            denoiser = Denoiser(self.family, config, dtype, self.kernel, scale)
            self.compiled[scale] = jax.jit(
                denoiser.step, static_argnames="guided", donate_argnames="outputs"
            )
        return self.compiled[scale]


def latent_factor(base: BaseModel) -> int:
    """Return how many pixels a side one latent stands for."""
    levels = len(complete(base.configs["vae"], vae.DEFAULTS)["block_out_channels"])
    factor: int = 2 ** (levels - 1)
    return factor


def latent_side(base: BaseModel, size: int | None) -> int:
    """Return the latents a side of pictures of ``size`` pixels; None: the model's own.

    Raises:
        InputError: when latents cannot have that side.
    """
    factor = latent_factor(base)
    if size is None:
        config = base.configs["unet"]
        sample_size = config.get("sample_size")
        if isinstance(sample_size, int) and is_before_sizes(config, base):
            sample_size = max(sample_size, OLD_SAMPLE_SIZE)
        if not isinstance(sample_size, int):
            raise InputError(
                f"size: the model's own is not stated (sample_size is {sample_size}); give one, a "
                f"multiple of {factor} pixels"
            )
        size = sample_size * factor
    if size < factor or size % factor:
        nearest = max(1, round(size / factor)) * factor
        raise InputError(f"size: {size} pixels are no multiple of {factor}; choose {nearest}")
    return size // factor


def is_before_sizes(config: dict[str, Any], base: BaseModel) -> bool:
    """Return whether the stock pipeline takes a UNet's ``sample_size`` below 64 as 64.

    That of Stable Diffusion 1.x and 2.x does for what diffusers before 0.9 wrote.
    """
    version = re.match(r"0\.(\d+)\b", str(config.get("_diffusers_version")))
    kind = base.configs.model_index.get("_class_name")
    return kind == "StableDiffusionPipeline" and version is not None and int(version[1]) < 9


def open_pipeline(
    source: ModelSource,
    other_stage: ModelSource | None,
    *,
    scheduler: str | None,
    precision: str | None,
    device: str | None,
    safety_checker: bool = True,
) -> Pipeline:
    """Open a diffusers folder or a Hub repository for drawing, with a LoRA on it if there is one.

    Args:
        precision: of all weights; None: that in which the run drew its previews.
        safety_checker: whether to say that there is none in JAX, where the model has one.

    Raises:
        InputError: for a scheduler or a model that there is no code for.
    """
    if scheduler is not None and scheduler not in list_served():
        raise InputError(
            f"scheduler: {scheduler!r} has no table in JAX; it has {', '.join(list_served())}"
        )
    choose_devices(device)
    family = find_family(source)
    base = open_base(source.to_settings(family.name), family)
    check_trained_on(base, family, source)
    check_base(base, family)
    if safety_checker:
        report_unchecked(base, print_line)
    half = find_half_dtype(jnp, precision or source.precision)
    # Previews have float32 in the text encoders.
    text_dtype = (half or jnp.float32) if precision else jnp.float32
    component = family.network.component
    nets = {component: Params(to_device(read_component(base, component), half))}
    if source.lora is not None:
        add_lora(nets, source.lora, base, family, half)
    return Pipeline(
        base,
        family,
        JaxEncoders(base),
        nets,
        source.prediction_type,
        half,
        scheduler,
        choose_kernel(local_device()),
        text_dtype,
    )


def report_cut(pipeline: Pipeline, prompts: Sequence[str], report: Report) -> None:
    """Name the prompts that text encoders see cut."""
    report_cut_prompts(pipeline.family.text, pipeline.encoders, prompts, report)


def report_unchecked(base: BaseModel, report: Report) -> None:
    """Say that nothing looks at the pictures, where the base has a network that would."""
    if "safety_checker" in list_components(base.configs.model_index):
        report(f"{base.name}: JAX has no safety checker; pictures are drawn without this base's")


def find_family(source: ModelSource) -> Family:
    """Find the family that a model's index names.

    Raises:
        InputError: when the JAX engine does not draw with it.
    """
    # Old Flax bases become ordinary ones when they are opened.
    pipeline = read_pipeline_class(source).removeprefix("Flax")
    family = find_pipeline_family(pipeline)
    if family is None or not serves(family):
        supported = ", ".join(f.pipeline for f in FAMILIES.values() if serves(f))
        raise InputError(
            f"{source.model} is of a {pipeline}; the JAX engine draws with {supported}"
        )
    return family


def to_device(arrays: dict[str, np.ndarray], half: Any) -> dict[str, Array]:
    """Put arrays on the first device, in the type that is computed in."""
    return {
        name: jax.device_put(array.astype(half or np.float32), local_device())
        for name, array in arrays.items()
    }


def add_lora(
    nets: dict[str, Params], folder: Path, base: BaseModel, family: Family, half: Any
) -> None:
    """Add the layers of a LoRA to the networks that it was trained for.

    Raises:
        InputError: for a file that is damaged or does not fit; see ``lora_file``.
    """
    lora = read_lora(folder / LORA_FILE, family)
    for component, layers in lora.components.items():
        if component not in nets:
            nets[component] = Params(to_device(read_component(base, component), half))
        weights = nets[component].arrays
        lora.check_fit(component, weights)
        arrays = {**weights, **to_device(layers, half)}
        nets[component] = Params(arrays, scale=lora.scale(component))
