"""The guide's way to draw, its imports and names aside: ``flax_inference.py MODEL PICTURE``."""

import sys

import jax
import numpy as np

from limner.compat.flax import FlaxStableDiffusionPipeline, replicate, shard

pipe, params = FlaxStableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=jax.numpy.bfloat16)

prompt = "yoda naruto"
prng_seed = jax.random.PRNGKey(0)
num_inference_steps = 3

num_samples = jax.device_count()
prompt = num_samples * [prompt]
prompt_ids = pipe.prepare_inputs(prompt)

# shard inputs and rng
params = replicate(params)
prng_seed = jax.random.split(prng_seed, jax.device_count())
prompt_ids = shard(prompt_ids)

images = pipe(prompt_ids, params, prng_seed, num_inference_steps, jit=True).images
images = pipe.numpy_to_pil(np.asarray(images.reshape((num_samples,) + images.shape[-3:])))  # noqa: RUF005
images[0].save(sys.argv[2])
assert len(images) == jax.device_count() and all(image.size == (32, 32) for image in images)
assert len({image.tobytes() for image in images}) == len(images)
