"""The steps of a sampler: a UNet, guidance, and the coefficients of a table."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from limner.engines.jax.attention import Array, Kernel
from limner.engines.jax.nn import Params
from limner.engines.jax.unet import unet
from limner.families.family import Family


@dataclass(frozen=True)
class Denoiser:
    """A UNet that clean latents are sampled with.

    Args:
        scale: alpha / rank of its LoRA.
        dtype: the type of its activations.
    """

    family: Family
    config: dict[str, Any]
    dtype: Any
    kernel: Kernel | None = None
    scale: float = 1.0

    def sample(
        self,
        arrays: dict[str, Array],
        table: tuple[Array, Array],
        noise: Array,
        features: dict[str, Array],
        guidance_scale: Array,
        guided: bool,
    ) -> Array:
        """Sample clean latents, float32 [n, channels, h, w], in one scan over a sampler's table.

        Args:
            table: timesteps and coefficients; see ``diffusion.samplers``.
            noise: standard normal, [n, channels, h, w].
            features: of the prompts; if guided, those of the negative prompts come first.
        """
        timesteps, coefficients = table

        def step(outputs: Array, row: tuple[Array, Array, Array]) -> tuple[Array, None]:
            return self.step(arrays, outputs, row, features, guidance_scale, guided), None

        rows = (jnp.arange(len(timesteps)), timesteps, coefficients[:-1])
        outputs, _ = jax.lax.scan(step, make_outputs(len(coefficients), noise), rows)
        return jnp.tensordot(coefficients[-1], outputs, 1)

    def step(
        self,
        arrays: dict[str, Array],
        outputs: Array,
        row: tuple[Array, Array, Array],
        features: dict[str, Array],
        guidance_scale: Array,
        guided: bool,
    ) -> Array:
        """Return the outputs with one more; see ``sample``.

        Args:
            outputs: the starting noise is row 0, the network's output of step i row i + 1.
            row: of the sampler's table: the step's number, timestep and coefficients.
        """
        net = Params(arrays, scale=self.scale)
        called = self.family.network
        i, t, weights = row
        x = jnp.tensordot(weights, outputs, 1)
        both = jnp.concatenate([x, x]) if guided else x
        inputs = called.enter(both.astype(self.dtype), jnp.full(len(both), t), features)
        prediction = unet(net, self.config, inputs, kernel=self.kernel)
        output = called.leave(prediction, x).astype(jnp.float32)
        if guided:
            # Equation 6 of arXiv:2207.12598.
            without, output = jnp.split(output, 2)
            output = without + guidance_scale * (output - without)
        return outputs.at[i + 1].set(output)


def make_outputs(rows: int, noise: Array) -> Array:
    """Return the outputs of a sampler that has made no step; see ``Denoiser.step``."""
    return jnp.zeros((rows, *noise.shape)).at[0].set(noise)
