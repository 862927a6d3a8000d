"""The pipelines that diffusers had for Flax, by their names and calls.

Scripts that used them run with only their imports changed:

    from limner.compat.flax import FlaxStableDiffusionPipeline, replicate, shard

One compiled program draws the pictures of all devices: prompts are divided over them, weights are
on each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image

from limner.base_model.base import BaseModel
from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.engines.jax.sampler import make_base_table
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.sdxl import decode_latents
from limner.protocols import Array

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from limner.engines.jax.attention import Kernel

Weights = dict[str, dict[str, Array]]  # arrays by component and name


@dataclass(frozen=True)
class FlaxOutput:
    """The result of a pipeline.

    Args:
        images: float32 [n, height, width, 3] in [0, 1], with another first axis of devices where
            the prompts had one.
    """

    images: Array

    def __getitem__(self, i: int) -> Array:
        """Return the images at 0, as outputs of diffusers do."""
        return (self.images,)[i]


class DrawInputs(NamedTuple):
    """The arrays of one call besides the weights; rows are prompts."""

    ids: Array  # token ids, [n, length] or with several tokenizers [n, tokenizers, length]
    negative_ids: Array  # of the negative prompts
    noise: Array  # standard normal, [n, channels, h, w]
    table: tuple[Array, Array]  # the sampler's timesteps and coefficients
    guidance_scale: Array

    def divide_rows(self) -> "DrawInputs":
        """Divide the prompts over all devices."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        rows = NamedSharding(make_mesh(), PartitionSpec("data"))
        ids, negative_ids, noise = jax.device_put((self.ids, self.negative_ids, self.noise), rows)
        return self._replace(ids=ids, negative_ids=negative_ids, noise=noise)


def replicate(tree: Any) -> Any:
    """Put weights on every device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.device_put(tree, NamedSharding(make_mesh(), PartitionSpec()))


def shard(array: Array) -> np.ndarray:
    """Divide rows over devices: [devices, rows / devices, ...].

    Raises:
        InputError: when they cannot be divided.
    """
    import jax

    rows, count = np.asarray(array), jax.device_count()
    if len(rows) % count:
        raise InputError(
            f"{len(rows)} rows cannot be divided among {count} devices; give a multiple of {count}"
        )
    return rows.reshape(count, -1, *rows.shape[1:])


def make_mesh() -> "Mesh":
    """Return all devices in a row."""
    import jax
    from jax.sharding import AxisType, Mesh

    return Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


class FlaxStableDiffusionPipeline:
    """Stable Diffusion in JAX; see the module."""

    family = "sd"

    def __init__(self, base: BaseModel, dtype: np.dtype):
        from limner.engines.jax.encoders import JaxEncoders

        self.base = base
        self.dtype = dtype
        self.record = FAMILIES[self.family]
        self.encoders = JaxEncoders(base)
        self.compiled: dict[tuple[bool, bool, bool], Callable[[Weights, DrawInputs], Array]] = {}

    # The arguments of this and of __call__ are those of diffusers.
    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike = np.float32,
        *,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | None = None,
        from_pt: bool = False,
        safety_checker: object = None,
        feature_extractor: object = None,
    ) -> tuple["FlaxStableDiffusionPipeline", Weights]:
        """Load a pipeline and its weights from a folder or a Hub repository.

        Args:
            dtype: what the UNet and the text encoders compute in.
            from_pt: has no effect: PyTorch's weights are read as they are.

        Raises:
            InputError: for a model that there is no code for.
        """
        from limner.engines.jax.weights import read_component

        settings = ModelSettings(
            model, cls.family, revision=revision, variant=variant, cache_dir=cache_dir
        )
        pipeline = cls(open_base(settings, FAMILIES[cls.family]), np.dtype(dtype))
        params: Weights = {}
        for component in pipeline.record.components:
            if component == "scheduler" or component in pipeline.record.text.tokenizers:
                continue
            # The autoencoder of XL overflows in half precision.
            stored_as = np.float32 if component == "vae" else pipeline.dtype
            params[component] = {
                name: array.astype(stored_as)
                for name, array in read_component(pipeline.base, component).items()
            }
        return pipeline, params

    def prepare_inputs(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Return token ids, int32 [n, length].

        With several tokenizers they are [n, tokenizers, length].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [
            one.tokenize(self.encoders, prompts, 1)[:, 0].astype(np.int32)
            for one in self.record.text.inputs
        ]
        return ids[0] if len(ids) == 1 else np.stack(ids, axis=1)

    def __call__(
        self,
        prompt_ids: Array,
        params: Weights,
        prng_seed: Array,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 7.5,
        latents: Array | None = None,
        neg_prompt_ids: Array | None = None,
        return_dict: bool = True,
        jit: bool = False,
    ) -> FlaxOutput | tuple[Array]:
        """Draw pictures of prompts.

        Args:
            prompt_ids: of ``prepare_inputs``, or with ``jit`` of ``shard``.
            params: the weights, with ``jit`` those of ``replicate``.
            prng_seed: a key of ``jax.random``; with ``jit`` one for each device.
            latents: the starting noise in place of the key's, standard normal, first axes as those
                of ``prompt_ids``.
            jit: whether prompts are divided over all devices.
        """
        import jax

        ids = np.asarray(prompt_ids)
        lead = ids.shape[: 2 if jit else 1]
        ids = ids.reshape(-1, *ids.shape[len(lead) :])
        shape = (len(ids), *self.latent_shape(height, width))
        table = make_base_table(self.base, self.record, num_inference_steps)
        if latents is None:
            latents = draw_noise(prng_seed if jit else prng_seed[None], shape)
        no_negative = neg_prompt_ids is None
        if no_negative:
            neg_prompt_ids = self.prepare_inputs([""] * len(ids))
        inputs = DrawInputs(
            ids,
            np.asarray(neg_prompt_ids).reshape(ids.shape),
            np.asarray(latents, np.float32).reshape(shape),
            (table.timesteps, table.coefficients),
            np.float32(guidance_scale),
        )
        if jit:
            inputs = inputs.divide_rows()
        program = self.get_program(guidance_scale > 1, no_negative, jit)
        with jax.default_matmul_precision("highest" if self.dtype == np.float32 else None):
            images = program(params, inputs)
        images = images.reshape(*lead, *images.shape[1:])
        return FlaxOutput(images) if return_dict else (images,)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return (channels, height, width) of latents for a picture's sides in pixels."""
        from limner.engines.jax.pipeline import latent_side

        channels = self.base.configs["unet"].get("in_channels", 4)
        return channels, latent_side(self.base, height), latent_side(self.base, width)

    def get_program(
        self, guided: bool, no_negative: bool, jit: bool
    ) -> Callable[[Weights, DrawInputs], Array]:
        """Return ``draw`` for one kind of call, jitted once."""
        import jax

        from limner.engines.jax.attention import choose_kernel

        key = guided, no_negative, jit
        if key not in self.compiled:
            mesh = make_mesh()
            kernel = choose_kernel(mesh.devices.flat[0], mesh) if jit else None
            program = partial(self.draw, guided=guided, no_negative=no_negative, kernel=kernel)
            self.compiled[key] = jax.jit(program)
        return self.compiled[key]

    def draw(
        self,
        params: Weights,
        inputs: DrawInputs,
        *,
        guided: bool,
        no_negative: bool,
        kernel: "Kernel | None",
    ) -> Array:
        """Draw pictures [n, height, width, 3] in [0, 1], as one pure function.

        Args:
            no_negative: whether the negative prompts are empty because none were given.
        """
        import jax.numpy as jnp

        from limner.engines.jax import vae
        from limner.engines.jax.denoiser import Denoiser
        from limner.engines.jax.nn import Params
        from limner.engines.jax.pipeline import latent_factor

        configs = self.base.configs
        features = self.encode_prompts(params, inputs.ids)
        if guided:
            negative = self.encode_prompts(params, inputs.negative_ids)
            if no_negative and self.record.text.zeros_for_empty_prompt(configs):
                negative = {name: jnp.zeros_like(array) for name, array in negative.items()}
            features = {
                name: jnp.concatenate([negative[name], array]) for name, array in features.items()
            }
        height, width = (side * latent_factor(self.base) for side in inputs.noise.shape[2:])
        size_and_crop = jnp.array([height, width, 0, 0, height, width], jnp.float32)
        rows = len(inputs.noise) * (1 + guided)
        features |= {"size_and_crop": jnp.tile(size_and_crop, (rows, 1))}
        latents = Denoiser(self.record, configs["unet"], self.dtype, kernel).sample(
            params["unet"],
            inputs.table,
            inputs.noise,
            features,
            inputs.guidance_scale,
            guided,
        )
        latents = decode_latents(latents, configs)
        pixels = vae.decode(Params(params["vae"]), configs["vae"], latents)
        return jnp.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)

    def encode_prompts(self, params: Weights, ids: Array) -> dict[str, Array]:
        """Return the text features of token ids; see ``prepare_inputs`` for their shape."""
        from limner.engines.jax.encoders import GivenTextEncoders

        by_tokenizer = ids if ids.ndim == 3 else ids[:, None]
        return self.record.text.encode(
            GivenTextEncoders(params, self.base, self.dtype),
            {
                name: by_tokenizer[:, i : i + 1]
                for i, name in enumerate(self.record.text.tokenizers)
            },
        )

    @staticmethod
    def numpy_to_pil(images: Array) -> list[Image.Image]:
        """Convert pictures [n, height, width, 3] in [0, 1] to PIL's."""
        return [
            Image.fromarray((image * 255).round().astype(np.uint8))
            for image in np.asarray(images, np.float32)
        ]


class FlaxStableDiffusionXLPipeline(FlaxStableDiffusionPipeline):
    """Stable Diffusion XL in JAX; see the module."""

    family = "sdxl"


def draw_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """Draw standard normal numbers, an equal part of the rows from each key of ``jax.random``."""
    import jax

    part = (shape[0] // len(keys), *shape[1:])
    return jax.vmap(lambda key: jax.random.normal(key, part))(keys).reshape(shape)
