"""A recipe's step at full size, compiled for a slice of TPUs that need not be there: memory and
arithmetic of each chip.

    pip install "limner[jax]" libtpu          # the libtpu that the installed jax asks for: see pip
    install "jax[tpu]"
    python benchmarks/tpu.py recipes/sd15-full.toml --slice v5e:2x2 train.batch_size=32
    train.micro_batch_size=8
    engine.fsdp=4 optim.ema=none

Nothing is computed and no weight is made: the arrays are descriptions. Stable Diffusion 1.5 takes
an hour of one core; docs/log.md.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from limner.base_model.base import BaseModel
from limner.commands import bench
from limner.config import toml
from limner.engines.dropout import add_keys
from limner.engines.jax import weights
from limner.engines.jax.dropout import list_layers
from limner.engines.jax.engine import JaxEngine
from limner.engines.jax.layout import Layout
from limner.engines.jax.lora import list_linear_adapters
from limner.engines.jax.step import make_state, to_scalars
from limner.families import get_family
from limner.families.published import load_published
from limner.training import batch_plan

GIB = 2**30


@dataclass
class Slice:
    """A TPU slice in the place of ``engines.jax.processes.JaxProcessGroup``: one process that has
    all chips of it."""

    mesh: Mesh
    precision: str
    device_count: int
    rank: int = 0
    world_size: int = 1
    kind: str = "tpu"


def described(engine: JaxEngine, batch: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
    """State, rows and scalars of a step as shapes that lie on the mesh; those of frozen weights are
    left with the engine."""

    def like(path: Any, array: Any, kind: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            array.shape, kind or array.dtype, sharding=engine.sharding(path[-1].key, array.shape)
        )

    name, cfg = engine.family.network.component, engine.config
    shapes = weights.expected_shapes(
        engine.base.component_class(name)[1], engine.base.configs[name]
    )
    arrays = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    if cfg.adapter.kind == "lora":
        engine.frozen = {
            name: jax.tree_util.tree_map_with_path(partial(like, kind=engine.half), arrays)
        }  # type: ignore[dict-item]
        listed = list_linear_adapters({name: shapes}, cfg.adapter, engine.family)
        arrays = {key: jax.ShapeDtypeStruct(a.shape, np.float32) for key, a in listed.items()}
    engine.layout = Layout({key: a.shape for key, a in arrays.items()})
    state = jax.tree_util.tree_map_with_path(
        like,
        jax.eval_shape(
            lambda named: make_state(cfg.optim, engine.half, engine.layout.pack(named)), arrays
        ),
    )
    rows = NamedSharding(engine.mesh, PartitionSpec(None, ("data", "fsdp")))
    pieces = len(batch["timestep"]) // engine.micro_batch_size
    given = {
        key: jax.ShapeDtypeStruct(
            (pieces, len(a) // pieces, *a.shape[1:]),
            np.int32 if a.dtype == np.int64 else a.dtype,
            sharding=rows,
        )
        for key, a in add_keys(batch, 0, list_layers(arrays, cfg.adapter.dropout)).items()
        if key != "position"
    }
    return state, given, to_scalars(0, cfg.optim.learning_rate, cfg.optim.ema)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--slice", default="v5e:2x2", help="kind and shape of the TPUs (v5e:2x2)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_intermixed_args()
    cfg = toml.load_recipe(given.recipe, ['engine.kind="jax"', *given.overrides])
    family = get_family(cfg)
    chips = topologies.get_topology_desc(given.slice, platform="tpu").devices
    mesh = Mesh(
        np.array(chips).reshape(-1, cfg.engine.fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
    )
    known = load_published(family.name)
    base = BaseModel(
        Path(), {}, family.network.component, known.model_index["_name"], None, None, known
    )
    world = Slice(mesh, cfg.engine.precision or "no", len(chips))
    division = batch_plan.make_plan(cfg, 1, 1, None, 0, devices=len(chips))
    engine = JaxEngine(cfg, base, family, world, division.micro_batch_size, print)  # type: ignore[arg-type]
    state, rows, scalars = described(
        engine, bench.make_batch(cfg, known, family, division.batch_size)
    )
    began = time.monotonic()
    made = engine.compile(state, rows, scalars)
    took, memory, cost = time.monotonic() - began, made.memory_analysis(), made.cost_analysis()
    figures = {
        "slice": given.slice,
        "chips": len(chips),
        "images_per_chip": division.micro_batch_size // len(chips),
        "compile_seconds": took,
        "jax": jax.__version__,
        "peak_gib": getattr(memory, "peak_memory_in_bytes", 0) / GIB,
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "aliased_gib": memory.alias_size_in_bytes / GIB,
        "tflop_per_chip": cost["flops"] / 1e12,
    }
    print(json.dumps(figures, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
