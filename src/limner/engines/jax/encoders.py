"""The frozen encoders in JAX: numpy in, numpy out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limner.base_model.base import BaseModel
from limner.engines.jax import clip, vae, weights
from limner.engines.jax.nn import Params
from limner.engines.jax.processes import local_device
from limner.engines.jax.tokenizer import WordTokenizer
from limner.errors import InputError
from limner.features.arrays import NumpyFeatures
from limner.protocols import Array

# float32 products in float32: not in TF32 on a GPU, nor in passes of bfloat16 on a TPU.
HIGHEST = "highest"


class JaxFeatures:
    """The half of ``protocols.TextEncoders`` that needs no network, inside a compiled function."""

    def concat(self, arrays: list[Array], axis: int) -> Array:
        """See ``protocols.TextEncoders``."""
        return jnp.concatenate(arrays, axis=axis)

    def pad_width(self, array: Array, width: int) -> Array:
        """See ``protocols.TextEncoders``."""
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])


@dataclass(frozen=True)
class GivenTextEncoders(JaxFeatures):
    """Text encoders whose arrays are arguments of a compiled function; see ``TextEncoders``."""

    params: dict[str, dict[str, Array]]  # by component
    base: BaseModel
    dtype: Any

    def encode_text(self, name: str, ids: Array, skip: int = 0) -> tuple[Array, Array]:
        """See ``protocols.TextEncoders``."""
        net, config = Params(self.params[name]), self.base.configs[name]
        return clip.encode_text(net, config, ids, skip, has_projection(self.base, name), self.dtype)


class JaxEncoders(NumpyFeatures):
    """A base's components by name, on this process's first device, each loaded when first used.

    Args:
        half: the type of components that are safe in half precision; all others are float32.
    """

    def __init__(self, base: BaseModel, half: dict[str, Any] | None = None):
        self.base = base
        self.half = half or {}
        self.loaded: dict[str, Any] = {}
        self.compiled: dict[Any, Any] = {}

    def get_arrays(self, name: str) -> dict[str, jax.Array]:
        """Return a component's arrays on the device."""
        if name not in self.loaded:
            dtype = self.half.get(name, jnp.float32)
            self.loaded[name] = {
                key: jax.device_put(array.astype(dtype), local_device())
                for key, array in weights.read_component(self.base, name).items()
            }
        arrays: dict[str, jax.Array] = self.loaded[name]
        return arrays

    def run(
        self,
        key: tuple[Any, ...],
        function: Callable[[Params, Any], Any],
        argument: np.ndarray,
        net: Params,
    ) -> Any:
        """Run a function of a component's arrays and one numpy array, compiled once per key."""
        # What is compiled must not hold the arrays: they may change from call to call.
        scale = net.scale
        if (key, scale) not in self.compiled:
            self.compiled[key, scale] = jax.jit(
                lambda arrays, argument: function(Params(arrays, scale=scale), argument)
            )
        with jax.default_matmul_precision(HIGHEST), jax.default_device(local_device()):
            return jax.device_get(self.compiled[key, scale](net.arrays, argument))

    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.Encoders``."""
        config, dtype = self.base.configs[name], self.half.get(name, jnp.float32)
        mean, std = self.run(
            (name, "encode"),
            lambda p, x: vae.encode(p, config, x.astype(dtype)),
            pixels,
            Params(self.get_arrays(name)),
        )
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def decode(self, name: str, latents: np.ndarray) -> np.ndarray:
        """Decode unscaled latents [n, channels, h, w] to float32 [n, 3, H, W] in [-1, 1]."""
        config, dtype = self.base.configs[name], self.half.get(name, jnp.float32)
        pixels = self.run(
            (name, "decode"),
            lambda p, z: vae.decode(p, config, z.astype(dtype)),
            latents,
            Params(self.get_arrays(name)),
        )
        return np.asarray(pixels, np.float32)

    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0, net: Params | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.TextEncoders``; ``net`` replaces the base's arrays."""
        encode = partial(
            clip.encode_text,
            config=self.base.configs[name],
            skip=skip,
            projection=has_projection(self.base, name),
        )
        states, pooled = self.run(
            (name, skip),
            lambda p, ids: encode(p, ids=ids),
            ids.astype(np.int32),
            Params(self.get_arrays(name)) if net is None else net,
        )
        return np.asarray(states, np.float32), np.asarray(pooled, np.float32)

    def encode_movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        raise InputError('engine.kind="jax" has no MOVQ; use engine.kind="torch".')

    def encode_image(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        raise InputError('engine.kind="jax" has no image encoder; use engine.kind="torch".')

    def get_tokenizer(self, name: str) -> WordTokenizer:
        """Return a tokenizer."""
        if name not in self.loaded:
            self.loaded[name] = weights.open_tokenizer(self.base, name)
        tokenizer: WordTokenizer = self.loaded[name]
        return tokenizer

    def list_token_ids(self, tokenizer: str, texts: list[str]) -> list[list[int]]:
        """See ``protocols.Encoders``."""
        return self.get_tokenizer(tokenizer).encode(texts)

    def pad_token(self, tokenizer: str) -> int:
        """See ``protocols.Encoders``."""
        return self.get_tokenizer(tokenizer).pad

    def max_tokens(self, tokenizer: str) -> int:
        """See ``protocols.Encoders``."""
        return self.get_tokenizer(tokenizer).limit

    def release(self, names: Iterable[str] | None = None) -> None:
        """Free these components, or all; what is compiled stays for when one is loaded again."""
        for name in list(self.loaded) if names is None else names:
            self.loaded.pop(name, None)


def has_projection(base: BaseModel, name: str) -> bool:
    """Return whether a text encoder projects its pooled embedding."""
    return base.component_class(name)[1] == "CLIPTextModelWithProjection"
