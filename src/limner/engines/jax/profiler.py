"""Measure an engine through JAX: time, memory, and the arithmetic of the traced step."""

import itertools
import math
import platform
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from limner.engines.jax import weights
from limner.engines.jax.engine import JaxEngine
from limner.engines.jax.lora import list_linear_adapters
from limner.engines.jax.model import TrainedModel
from limner.engines.jax.processes import local_device
from limner.engines.machine import PUBLISHED_PEAKS, peak_resident, processor_name
from limner.protocols import Batch

PRECISIONS = {jnp.float16: "fp16", jnp.bfloat16: "bf16"}


class JaxProfiler:
    """Measures one engine from outside; see ``engines.torch.profiler.TorchProfiler``."""

    def __init__(self, engine: JaxEngine):
        self.engine = engine
        self.device = local_device()

    def mark(self, metrics: Any = None) -> float:
        """Return the time in seconds, once a step's metrics have been computed."""
        jax.block_until_ready(metrics)
        return time.perf_counter()

    def seconds(self, marks: list[float]) -> list[float]:
        """Return the time between neighbouring marks."""
        return [after - before for before, after in itertools.pairwise(marks)]

    def peak_memory(self) -> dict[str, int]:
        """Return the highest use so far in bytes, of the device or else of the whole process."""
        stats = self.device.memory_stats()
        return {"allocated": stats["peak_bytes_in_use"]} if stats else {"process": peak_resident()}

    def describe_machine(self) -> dict[str, Any]:
        """Return device, precision and versions."""
        device = self.device.device_kind
        if self.device.platform == "cpu":
            device = f"cpu ({processor_name()})"
        if self.engine.mesh.size > 1:
            device = f"{self.engine.mesh.size} x {device}"
        full_precision = "TF32" if self.engine.matmul_precision is None else "float32"
        return {
            "device": device,
            "precision": PRECISIONS.get(self.engine.half, full_precision),
            "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        }

    def count_flops(self, batch: Batch, micro: int) -> float:
        """Count the network's floating-point operations in one step, forward and backward.

        Only matrix products and convolutions count, and recomputed activations do not. Nothing is
        computed: the step is traced with the shapes of ``micro`` rows.
        """
        engine = self.engine
        plain = copy_without_optimizations(engine)
        component_class, configs = engine.base.component_class, engine.base.configs
        shapes = {
            component: weights.expected_shapes(component_class(component)[1], configs[component])
            for component in plain.components
        }
        arrays = {
            component: {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in of.items()}
            for component, of in shapes.items()
        }
        params: Any = arrays[engine.family.network.component]
        frozen: Any = {}
        if engine.config.adapter.kind == "lora":
            adapters = list_linear_adapters(shapes, engine.config.adapter, engine.family)
            params = {
                name: jax.ShapeDtypeStruct(one.shape, np.float32) for name, one in adapters.items()
            }
            frozen = arrays
        rows = {name: describe_rows(array, micro) for name, array in batch.items()}

        def total_loss(params: Any, frozen: Any, rows: Any) -> jax.Array:
            return plain.example_losses(params, frozen, rows, training=True).sum()

        jaxpr = jax.make_jaxpr(jax.grad(total_loss))(params, frozen, rows).jaxpr
        needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        return count_matrix_flops(needed) * len(batch["timestep"]) / micro

    def measure_matmul(self) -> float:
        """Measure the operations per second of a large matrix product in the run's precision.

        The median of some products, after two for warming up.
        """
        n = 2048 if self.device.platform == "cpu" else 8192
        dtype = self.engine.half or jnp.float32
        a, b = (jax.device_put(jnp.ones((n, n), dtype), self.device) for _ in range(2))
        with jax.default_matmul_precision(self.engine.matmul_precision):
            multiply = jax.jit(jnp.matmul)
            marks = [self.mark(multiply(a, b)) for _ in range(9)]
        return 2 * n**3 / statistics.median(self.seconds(marks)[2:])

    def published_peak(self) -> float | None:
        """Return the maker's dense peak for this device and precision in FLOP/s, if published."""
        if self.device.device_kind not in PUBLISHED_PEAKS:
            return None
        in_16_bits, in_tf32, in_float32 = PUBLISHED_PEAKS[self.device.device_kind]
        if self.engine.half is not None:
            peak = in_16_bits
        else:
            peak = in_tf32 if self.engine.matmul_precision is None else in_float32
        return peak * 1e12 or None


def describe_rows(array: np.ndarray, count: int) -> jax.ShapeDtypeStruct:
    """Describe ``count`` rows of an array of a batch, as the engine takes them."""
    dtype = np.int32 if array.dtype == np.int64 else array.dtype
    return jax.ShapeDtypeStruct((count, *array.shape[1:]), dtype)


def copy_without_optimizations(engine: JaxEngine) -> TrainedModel:
    """Copy an engine's model to float32, with plain attention and without recomputing."""
    settings = replace(engine.config.engine, gradient_checkpointing=False)
    config = replace(engine.config, engine=settings)
    return replace(engine.model, config=config, kernel=None, half=None)


def count_matrix_flops(jaxpr: Any) -> float:
    """Count two operations per multiplication in a program's matrix products and convolutions."""
    return sum(count_equation_flops(equation) for equation in jaxpr.eqns)


def count_equation_flops(equation: Any) -> float:
    """Count the operations of one equation of a program, and of the programs inside it."""
    inner_programs = [
        getattr(value, "jaxpr", value)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        if is_jaxpr(value)
    ]
    counts = [count_matrix_flops(program) for program in inner_programs]
    if equation.primitive.name == "cond":
        # Only one of the branches is taken.
        return max(counts)
    return sum(counts) + count_own_flops(equation)


def count_own_flops(equation: Any) -> float:
    """Count the operations of a matrix product or a convolution; 0 for any other equation."""
    kind, parameters = equation.primitive.name, equation.params
    if kind not in ("dot_general", "conv_general_dilated"):
        return 0.0
    output_size = math.prod(equation.outvars[0].aval.shape)
    if kind == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * output_size * math.prod(shape[i] for i in contracted)
    shape = equation.invars[1].aval.shape
    in_channels_and_sides = parameters["dimension_numbers"].rhs_spec[1:]
    multiplications = output_size * math.prod(shape[i] for i in in_channels_and_sides)
    # Dilation puts zeros between the numbers: only one of so many multiplications counts.
    return 2.0 * multiplications / math.prod(parameters["lhs_dilation"])


def is_jaxpr(value: Any) -> bool:
    """Return whether a parameter of an equation is a program."""
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def open_profiler(engine: JaxEngine) -> JaxProfiler:
    """Open the profiler of an engine."""
    return JaxProfiler(engine)


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every array of the network that a config describes.

    Raises:
        InputError: for a network that there is no code for.
    """
    return weights.expected_shapes(config["_class_name"], config)
