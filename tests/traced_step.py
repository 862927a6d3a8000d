"""A small training step on eight devices, compiled through the cache in the folder that is given.

Prints how often the step was traced, a digest of what three steps come to, and the bytes of the
old state that the new one takes over. With "plain" for a folder it does without the cache.
"""

import hashlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from limner.engines.jax import compile_cache

MESH = Mesh(
    np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
)
WEIGHTS = NamedSharding(MESH, PartitionSpec(None, "fsdp"))
ROWS = NamedSharding(MESH, PartitionSpec(None, ("data", "fsdp")))
EVERYWHERE = NamedSharding(MESH, PartitionSpec())
TRACED = []


def step(state: dict[str, Any], rows: Any, seed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Descend once, with dropout, recomputed activations and a loop over micro-batches."""
    TRACED.append(step)
    key = jax.random.key(seed)

    def compute_loss(weights: Any, row: Any) -> Any:
        keep = jax.random.bernoulli(key, 0.9, row.shape)
        hidden = jax.checkpoint(lambda x: jnp.tanh(x @ weights))(jnp.where(keep, row, 0))
        return jnp.square(hidden).mean()

    def add(total: Any, row: Any) -> tuple[Any, None]:
        return total + jax.grad(compute_loss)(state["weights"], row), None

    gradient, _ = jax.lax.scan(add, jnp.zeros_like(state["weights"]), rows)
    new = {"weights": state["weights"] - 0.1 * gradient, "count": state["count"] + 1}
    return new, {"norm": jnp.linalg.norm(gradient)}


def make_inputs() -> tuple[dict[str, Any], Any, Any]:
    draws = np.random.default_rng(0)
    weights = draws.standard_normal((16, 64), np.float32)
    rows = draws.standard_normal((2, 8, 16), np.float32)
    state = {
        "weights": jax.device_put(weights, WEIGHTS),
        "count": jax.device_put(np.int32(0), EVERYWHERE),
    }
    return state, jax.device_put(rows, ROWS), np.uint32(3)


def main(folder: str) -> None:
    shardings = {"weights": WEIGHTS, "count": EVERYWHERE}, None
    if folder == "plain":
        jitted = jax.jit(step, out_shardings=shardings, donate_argnums=0)
        program = jitted.lower(*make_inputs()).compile()
    else:
        compile_cache.enable(folder)
        program = compile_cache.load_or_compile(
            step,
            make_inputs(),
            jax.devices(),
            {},
            print,
            out_shardings=shardings,
            donate_argnums=0,
        )
    state, rows, seed = make_inputs()
    for _ in range(3):
        state, metrics = program(state, rows, seed)
    digest = hashlib.sha256(np.asarray(state["weights"]).tobytes())
    digest.update(np.asarray(metrics["norm"]).tobytes())
    memory: Any = program.memory_analysis()
    print(len(TRACED), digest.hexdigest(), memory.alias_size_in_bytes)


if __name__ == "__main__":
    main(sys.argv[1])
