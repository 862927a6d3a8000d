"""The frozen encoders in JAX: numpy in, numpy out, always float32 unless they are safe in half,
loaded when first called and let go of when told."""

from collections.abc import Iterable
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
from limner.families.text import split_into_chunks

# float32 products in float32: not in TF32 on a GPU, nor in passes of bfloat16 on a TPU
HIGHEST = "highest"


class JaxEncoders:
    """Components of a base by name, on this process's first device.

    Args:
        half: the type of components that are safe in half precision; all others are float32.
    """

    def __init__(self, base: BaseModel, half: dict[str, Any] | None = None):
        self.base, self.half = base, half or {}
        self.loaded: dict[str, Any] = {}
        self.compiled: dict[Any, Any] = {}

    def arrays(self, name: str) -> dict[str, jax.Array]:
        """A component's arrays on the device."""
        if name not in self.loaded:
            kind = self.half.get(name, jnp.float32)
            self.loaded[name] = {
                key: jax.device_put(array.astype(kind), local_device())
                for key, array in weights.read_component(self.base, name).items()
            }
        found: dict[str, jax.Array] = self.loaded[name]
        return found

    def run(
        self, key: Any, function: Any, name: str, *arguments: np.ndarray, net: Params | None = None
    ) -> Any:
        """A jitted function of a component's arrays, or of those of ``net``, and some of numpy's;
        compiled once, however often it is run."""
        scale = 1.0 if net is None else net.scale  # what is kept must not hold the arrays
        if (key, scale) not in self.compiled:
            self.compiled[key, scale] = jax.jit(
                lambda arrays, *given: function(Params(arrays, scale=scale), *given)
            )
        with jax.default_matmul_precision(HIGHEST), jax.default_device(local_device()):
            return jax.device_get(
                self.compiled[key, scale](
                    self.arrays(name) if net is None else net.arrays, *arguments
                )
            )

    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.Encoders``."""
        config, kind = self.base.configs[name], self.half.get(name, jnp.float32)
        mean, std = self.run(
            (name, "encode"), lambda p, x: vae.encode(p, config, x.astype(kind)), name, pixels
        )
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def decode(self, name: str, latents: np.ndarray) -> np.ndarray:
        """Pixels in [-1, 1], float32 [n, 3, H, W], of unscaled latents [n, channels, h, w]."""
        config, kind = self.base.configs[name], self.half.get(name, jnp.float32)
        return np.asarray(
            self.run(
                (name, "decode"), lambda p, z: vae.decode(p, config, z.astype(kind)), name, latents
            ),
            np.float32,
        )

    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0, net: Params | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.TextEncoders``; with the arrays of ``net`` in place of the base's, where
        it is given."""
        hear = partial(
            clip.encode_text,
            config=self.base.configs[name],
            skip=skip,
            projection=has_projection(self.base, name),
        )
        states, pooled = self.run(
            (name, skip), lambda p, ids: hear(p, ids=ids), name, ids.astype(np.int32), net=net
        )
        return np.asarray(states, np.float32), np.asarray(pooled, np.float32)

    def concat_features(self, arrays: list[np.ndarray]) -> np.ndarray:
        """See ``protocols.TextEncoders``."""
        return np.concatenate(arrays, axis=-1)

    def encode_movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        raise InputError('engine.kind="jax" has no MOVQ; use engine.kind="torch".')

    def encode_image(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """See ``protocols.Encoders``."""
        raise InputError('engine.kind="jax" has no image encoder; use engine.kind="torch".')

    def tokenizer(self, tokenizer: str) -> WordTokenizer:
        """A tokenizer."""
        if tokenizer not in self.loaded:
            self.loaded[tokenizer] = WordTokenizer(
                self.base.component_folder(tokenizer), self.base.configs[tokenizer]
            )
        found: WordTokenizer = self.loaded[tokenizer]
        return found

    def tokenize(self, tokenizer: str, captions: list[str], chunks: int) -> np.ndarray:
        """See ``protocols.Encoders``; what does not fit is cut (which the index has counted and
        told)."""
        words = self.tokenizer(tokenizer)
        return split_into_chunks(
            words.encode(captions), chunks, words.limit, words.start, words.end, words.pad
        )

    def count_tokens(self, tokenizer: str, captions: list[str]) -> list[int]:
        """See ``protocols.Encoders``."""
        return [len(ids) for ids in self.tokenizer(tokenizer).encode(captions)]

    def max_tokens(self, tokenizer: str) -> int:
        """See ``protocols.Encoders``."""
        return self.tokenizer(tokenizer).limit

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of these components, of all where none are named; one that is asked for again is
        loaded again, and not compiled again."""
        for name in list(self.loaded) if names is None else names:
            self.loaded.pop(name, None)


def has_projection(base: BaseModel, name: str) -> bool:
    """Whether a text encoder projects its pooled embedding."""
    return base.component_class(name)[1] == "CLIPTextModelWithProjection"
