"""The pipelines that diffusers had for Flax, by their names and calls: scripts that used them run
with only their imports changed.

    from limner.compat.flax import FlaxStableDiffusionPipeline, replicate, shard

One compiled program makes the pictures of all devices: prompts are divided over them, weights are
on each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.diffusion.samplers import make_table
from limner.errors import InputError


@dataclass(frozen=True)
class FlaxOutput:
    """``images``: float32 [n, height, width, 3] in [0, 1], with another first axis of devices where
    the prompts had one."""

    images: Any

    def __getitem__(self, i: int) -> Any:
        return (self.images,)[i]


def replicate(tree: Any) -> Any:
    """Weights on every device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.device_put(tree, NamedSharding(make_mesh(), PartitionSpec()))


def shard(array: Any) -> np.ndarray:
    """Rows divided over devices: [devices, rows / devices, ...].

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


def make_mesh() -> Any:
    """All devices in a row."""
    import jax
    from jax.sharding import AxisType, Mesh

    return Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


class FlaxStableDiffusionPipeline:
    """Stable Diffusion in JAX; see the module."""

    family = "sd"

    def __init__(self, base: Any, dtype: Any):
        from limner.engines.jax.encoders import JaxEncoders
        from limner.families import FAMILIES

        self.base, self.dtype, self.record, self.parts = (
            base,
            dtype,
            FAMILIES[self.family],
            JaxEncoders(base),
        )
        self.compiled: dict[Any, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: Any = np.float32,
        *,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | None = None,
        from_pt: bool = False,
        safety_checker: Any = None,
        feature_extractor: Any = None,
    ) -> tuple["FlaxStableDiffusionPipeline", dict[str, Any]]:
        """The pipeline and its weights, from a folder or a Hub repository; ``from_pt`` has nothing
        to do: weights are read as they are.

        Args:
            dtype: what the UNet and the text encoders compute in.

        Raises:
            InputError: for a model that there is no code for.
        """
        from limner.engines.jax.weights import read_component
        from limner.families import FAMILIES

        base = open_base(
            ModelSettings(
                model, cls.family, revision=revision, variant=variant, cache_dir=cache_dir
            ),
            FAMILIES[cls.family],
        )
        pipeline = cls(base, np.dtype(dtype))
        names = [
            name
            for name in pipeline.record.components
            if name != "scheduler" and name not in pipeline.record.tokenizers
        ]
        kinds = {name: np.float32 if name == "vae" else pipeline.dtype for name in names}
        return pipeline, {
            name: {key: a.astype(kinds[name]) for key, a in read_component(base, name).items()}
            for name in names
        }

    def prepare_inputs(self, prompt: str | Sequence[str]) -> np.ndarray:
        """Token ids, int32: [n, length], or with several tokenizers [n, tokenizers, length]."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [
            self.parts.tokenize(name, prompts, 1)[:, 0].astype(np.int32)
            for name in self.record.tokenizers
        ]
        return ids[0] if len(ids) == 1 else np.stack(ids, axis=1)

    def __call__(
        self,
        prompt_ids: Any,
        params: dict[str, Any],
        prng_seed: Any,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 7.5,
        latents: Any = None,
        neg_prompt_ids: Any = None,
        return_dict: bool = True,
        jit: bool = False,
    ) -> Any:
        """Pictures of prompts.

        Args:
            prompt_ids: of ``prepare_inputs``, or with ``jit`` of ``shard``.
            params: the weights, with ``jit`` those of ``replicate``.
            prng_seed: a key of ``jax.random``; with ``jit`` one for each device.
            latents: the starting noise in place of the key's, standard normal, first axes as those
                of ``prompt_ids``.
            jit: whether prompts are divided over all devices.
        """
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        from limner.engines.jax.attention import choose_kernel
        from limner.engines.jax.pipeline import latent_side

        lead = np.asarray(prompt_ids).shape[: 2 if jit else 1]
        rows = int(np.prod(lead))
        shape = (
            self.base.configs["unet"].get("in_channels", 4),
            latent_side(self.base, height),
            latent_side(self.base, width),
        )
        found = make_table(self.base.configs["scheduler"], num_inference_steps)
        noise: Any
        if latents is None:
            keys = prng_seed if jit else prng_seed[None]
            noise = jax.vmap(lambda key: jax.random.normal(key, (rows // len(keys), *shape)))(
                keys
            ).reshape(rows, *shape)
        else:
            noise = np.asarray(latents, np.float32).reshape(rows, *shape)
        ids = np.asarray(prompt_ids).reshape(rows, *np.asarray(prompt_ids).shape[len(lead) :])
        against = (
            self.prepare_inputs([""] * rows)
            if neg_prompt_ids is None
            else np.asarray(neg_prompt_ids).reshape(ids.shape)
        )
        if jit:
            noise, ids, against = jax.device_put(
                (noise, ids, against), NamedSharding(make_mesh(), PartitionSpec("data"))
            )
        how = {"guided": guidance_scale > 1, "silent": neg_prompt_ids is None}
        key = (num_inference_steps, noise.shape, jit, *how.values())
        if key not in self.compiled:
            self.compiled[key] = jax.jit(
                partial(
                    self.drawn,
                    **how,
                    kernel=choose_kernel(make_mesh().devices.flat[0], make_mesh()) if jit else None,
                )
            )
        with jax.default_matmul_precision("highest" if self.dtype == np.float32 else None):
            images = self.compiled[key](
                params,
                ids,
                against,
                noise,
                found.timesteps,
                found.coefficients,
                np.float32(guidance_scale),
            )
        images = images.reshape(*lead, *images.shape[1:])
        return FlaxOutput(images) if return_dict else (images,)

    def drawn(
        self,
        params: Any,
        ids: Any,
        against: Any,
        noise: Any,
        timesteps: Any,
        weights: Any,
        guidance: Any,
        *,
        guided: bool,
        silent: bool,
        kernel: Any,
    ) -> Any:
        """All of it as one pure function: pictures [n, height, width, 3] in [0, 1]."""
        import jax.numpy as jnp

        from limner.engines.jax import vae
        from limner.engines.jax.nn import Params
        from limner.engines.jax.pipeline import sample

        features = self.told(params, ids)
        if guided:
            other = self.told(params, against)
            if silent and self.record.zeros_for_empty_prompt(self.base.configs):
                other = {name: jnp.zeros_like(array) for name, array in other.items()}
            features = {
                name: jnp.concatenate([other[name], array]) for name, array in features.items()
            }
        factor = 2 ** (len(self.base.configs["vae"]["block_out_channels"]) - 1)
        high, wide = (side * factor for side in noise.shape[2:])
        count = len(noise) * (1 + guided)
        features |= {
            "size_and_crop": jnp.tile(
                jnp.array([high, wide, 0, 0, high, wide], jnp.float32), (count, 1)
            )
        }
        how = {
            "config": self.base.configs["unet"],
            "scale": 1.0,
            "family": self.record,
            "kind": self.dtype,
            "guided": guided,
            "kernel": kernel,
        }
        clean = sample(params["unet"], timesteps, weights, noise, features, guidance, **how)
        known = self.base.configs["vae"]
        pixels = vae.decode(
            Params(params["vae"]), known, clean / known.get("scaling_factor", 0.18215)
        )
        return jnp.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)

    def told(self, params: Any, ids: Any) -> dict[str, Any]:
        """What the network is told of token ids."""
        import jax.numpy as jnp

        from limner.engines.jax import clip
        from limner.engines.jax.encoders import has_projection
        from limner.engines.jax.nn import Params

        outer = self

        class Encoders:
            def encode_text(self, name: str, ids: Any, skip: int = 0) -> tuple[Any, Any]:
                return clip.encode_text(
                    Params(params[name]),
                    outer.base.configs[name],
                    ids,
                    skip,
                    has_projection(outer.base, name),
                    outer.dtype,
                )

            def concat_features(self, arrays: list[Any]) -> Any:
                return jnp.concatenate(arrays, axis=-1)

        several = ids if ids.ndim == 3 else ids[:, None]
        return self.record.encode_text(
            Encoders(),
            {name: several[:, i : i + 1] for i, name in enumerate(self.record.tokenizers)},
        )

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Image.Image]:
        """Pictures [n, height, width, 3] in [0, 1] as PIL has them."""
        return [
            Image.fromarray((picture * 255).round().astype(np.uint8))
            for picture in np.asarray(images, np.float32)
        ]


class FlaxStableDiffusionXLPipeline(FlaxStableDiffusionPipeline):
    """The same for Stable Diffusion XL."""

    family = "sdxl"
