"""What a machine does in a second and holds at once, through JAX: clocks, memory, and arithmetic
counted in the traced program, where nothing is computed."""

import copy
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
from limner.engines.jax.layout import make_adapters
from limner.engines.jax.processes import local_device
from limner.engines.machine import PUBLISHED_PEAKS, peak_resident, processor_name
from limner.protocols import Batch


class JaxProfiler:
    """Measures one engine from outside; see ``engines.torch.profiler.TorchProfiler``."""

    def __init__(self, engine: JaxEngine):
        self.engine, self.device = engine, local_device()

    def mark(self, metrics: Any = None) -> float:
        """This moment, or that at which a step's metrics are there: the step is waited for."""
        jax.block_until_ready(metrics)
        return time.perf_counter()

    def seconds(self, marks: list[float]) -> list[float]:
        """The time between neighbouring stamps."""
        return [after - before for before, after in itertools.pairwise(marks)]

    def peak_memory(self) -> dict[str, int]:
        """Highest use so far, in bytes: of the device as JAX counts it, or of the whole process."""
        known = self.device.memory_stats()
        return {"allocated": known["peak_bytes_in_use"]} if known else {"process": peak_resident()}

    def describe_machine(self) -> dict[str, Any]:
        """Device, precision and versions."""
        name = (
            f"cpu ({processor_name()})"
            if self.device.platform == "cpu"
            else self.device.device_kind
        )
        name = f"{self.engine.mesh.size} x {name}" if self.engine.mesh.size > 1 else name
        precision = {
            None: "TF32" if self.engine.precise is None else "float32",
            jnp.float16: "fp16",
            jnp.bfloat16: "bf16",
        }[self.engine.half]
        return {
            "device": name,
            "precision": precision,
            "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        }

    def count_flops(self, batch: Batch, micro: int) -> float:
        """Floating-point operations of the network in one step's forward and backward passes, with
        nothing recomputed."""
        engine, name, plain = (
            self.engine,
            self.engine.family.trained_component,
            copy.copy(self.engine),
        )
        plain.kernel, plain.half = None, None
        plain.config = replace(
            engine.config,
            engine=replace(engine.config.engine, gradient_checkpointing=False),
            adapter=replace(engine.config.adapter, dropout=0.0),
        )
        known = {
            part: weights.expected_shapes(
                engine.base.component_class(part)[1], engine.base.configs[part]
            )
            for part in engine.learns
        }
        arrays = {
            part: {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
            for part, shapes in known.items()
        }
        lora = engine.config.adapter.kind == "lora"
        learn: Any = (
            make_adapters(known, engine.config.adapter, engine.family, 0) if lora else arrays[name]
        )
        rows = {
            key: jax.ShapeDtypeStruct(
                (micro, *a.shape[1:]), np.int32 if a.dtype == np.int64 else a.dtype
            )
            for key, a in batch.items()
        }
        loss = jax.grad(
            lambda params, frozen, rows: plain.example_losses(
                params, frozen, rows, None, True
            ).sum()
        )
        program = jax.make_jaxpr(loss)(learn, arrays if lora else {}, rows).jaxpr
        return (
            count_multiplications(partial_eval.dce_jaxpr(program, [True] * len(program.outvars))[0])
            * len(batch["timestep"])
            / micro
        )

    def measure_matmul(self) -> float:
        """Operations per second of a large matrix product in the run's precision: the median of
        some."""
        n = 2048 if self.device.platform == "cpu" else 8192
        a, b = (
            jax.device_put(jnp.ones((n, n), self.engine.half or jnp.float32), self.device)
            for _ in range(2)
        )
        with jax.default_matmul_precision(self.engine.precise):
            multiply = jax.jit(jnp.matmul)
            marks = [self.mark(multiply(a, b)) for _ in range(9)]
        return 2 * n**3 / statistics.median(self.seconds(marks)[2:])

    def published_peak(self) -> float | None:
        """The dense peak that the maker states for this device and precision, where it is known."""
        peaks = PUBLISHED_PEAKS.get(self.device.device_kind)
        found = (
            peaks[0 if self.engine.half else 1 if self.engine.precise is None else 2]
            if peaks
            else 0.0
        )
        return found * 1e12 or None


def count_multiplications(program: Any) -> float:
    """Two for each multiplication of the matrix products and convolutions of a program, and of the
    programs inside it."""
    total = 0.0
    for step in program.eqns:
        inner = [
            getattr(value, "jaxpr", value)
            for value in jax.tree.leaves(list(step.params.values()), is_leaf=is_program)
            if is_program(value)
        ]
        counts = [count_multiplications(one) for one in inner]
        total += (
            max(counts, default=0) if step.primitive.name == "cond" else sum(counts)
        )  # of alternatives one is chosen
        if step.primitive.name == "dot_general":
            (contracted, _), _ = step.params["dimension_numbers"]
            total += (
                2.0
                * math.prod(step.outvars[0].aval.shape)
                * math.prod(step.invars[0].aval.shape[i] for i in contracted)
            )
        if step.primitive.name == "conv_general_dilated":
            kernel, places = step.invars[1].aval.shape, step.params["dimension_numbers"].rhs_spec
            spread = math.prod(
                step.params["lhs_dilation"]
            )  # all but one of so many places are zeros that stand between numbers
            total += (
                2.0
                * math.prod(step.outvars[0].aval.shape)
                * math.prod(kernel[i] for i in places[1:])
                / spread
            )
    return total


def is_program(value: Any) -> bool:
    """Whether a parameter of an operation is a program."""
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def open_profiler(engine: JaxEngine) -> JaxProfiler:
    """What measures an engine from outside."""
    return JaxProfiler(engine)


def parameter_shapes(known: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of the network that a config describes.

    Raises:
        InputError: for a network that there is no code for.
    """
    return weights.expected_shapes(known["_class_name"], known)
