"""Training in JAX: the pure step compiled for each shape of batch, arrays placed on the mesh."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from limner.base_model.base import BaseModel
from limner.config import toml
from limner.config.schema import Config
from limner.diffusion import make_objective
from limner.engines.dropout import add_keys, refuse_attention_dropout
from limner.engines.jax import compile_cache, weights
from limner.engines.jax.attention import Array, Kernel, choose_kernel
from limner.engines.jax.dropout import list_layers
from limner.engines.jax.encoders import JaxEncoders
from limner.engines.jax.layout import LARGE, SMALL, Layout
from limner.engines.jax.lora import list_linear_adapters, make_adapters
from limner.engines.jax.model import Named, TrainedModel
from limner.engines.jax.processes import JaxProcessGroup, local_device, to_local_device
from limner.engines.jax.sampler import check_previews
from limner.engines.jax.step import SCALER, State, TrainingStep, make_state, to_scalars
from limner.engines.machine import keep_heap
from limner.engines.state import check_arrays, find_half_dtype, join_moments, split_moments
from limner.errors import InputError, IntegrityError
from limner.families.family import Family
from limner.protocols import Arrays, Batch, DrawCall, Metrics, NonFiniteStep, Report

# Bytes of a step's temporary arrays up to which a process on the CPU keeps their memory, which
# saves some 20 % of a step's time.
KEPT_BYTES = 1 << 30
# A moment's name in checkpoints, which is PyTorch's -> its group in a state.
MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}


class JaxEngine:
    """The engine of one process; see ``protocols.Engine``."""

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        family: Family,
        process: JaxProcessGroup,
        micro_batch_size: int,
        report: Report = print,
    ):
        self.config = config
        self.base = base
        self.family = family
        self.process = process
        self.micro_batch_size = micro_batch_size
        self.report = report
        self.rank = process.rank
        self.world_size = process.world_size
        self.mesh = process.mesh
        self.half = find_half_dtype(jnp, process.precision)
        refuse_settings(config, base, family)
        self.refuse_batch()
        if config.engine.attention == "xformers":
            report("xFormers is PyTorch's; JAX uses a fused kernel of its own where there is one")
        # An autoencoder that the recipe names is safe in half precision; the base's may not be.
        runs_in_half = config.model.vae is not None and self.half is not None
        self.encoders = JaxEncoders(base, {"vae": self.half} if runs_in_half else {})
        objective = make_objective(base.configs["scheduler"], config.objective)
        self.prediction_type = objective.prediction_type
        kernel: Kernel | None = None
        if config.engine.attention != "math":
            kernel = choose_kernel(self.mesh.devices.flat[0], self.mesh)
        self.model = TrainedModel(config, base, family, self.half, kernel)
        exact = self.half is None and not config.engine.tf32
        self.matmul_precision = "highest" if exact else None
        self.compiled: dict[Any, Any] = {}
        self.frozen: dict[str, Named] = {}
        self.pipeline: Any = None  # draws previews, once one is asked for
        self.layout = Layout({})

    def refuse_batch(self) -> None:
        """Refuse a micro-batch that the devices cannot share."""
        rows = self.micro_batch_size * self.world_size
        if rows % self.mesh.size:
            raise InputError(
                f"train.micro_batch_size: a micro-batch of {rows} rows ({self.micro_batch_size} "
                f"for each of {self.world_size} processes) cannot be divided among "
                f"{self.mesh.size} devices; use a multiple of {self.mesh.size}"
            )

    def get_encoders(self) -> JaxEncoders:
        """See ``protocols.Engine``."""
        return self.encoders

    def release_encoders(self, names: Iterable[str] | None = None) -> None:
        """See ``protocols.Engine``."""
        self.encoders.release(names)

    def place(self, arrays: dict[str, np.ndarray]) -> Named:
        """Return arrays on the mesh, each large one divided over ``fsdp``."""
        return {
            name: jax.make_array_from_callback(a.shape, self.sharding(name, a.shape), a.__getitem__)
            for name, a in arrays.items()
        }

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Return how an array lies on the mesh.

        The longest axis of a large one that ``fsdp`` divides is divided.
        """
        size = self.mesh.shape["fsdp"]
        axes: list[str | None] = [None] * len(shape)
        divisible = [i for i, side in enumerate(shape) if side % size == 0]
        # Divided, each of the small arrays would be sent from device to device by itself.
        is_large = name != SMALL and int(np.prod(shape)) >= LARGE
        if size > 1 and is_large and divisible:
            axes[max(divisible, key=lambda i: shape[i])] = "fsdp"
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def init_state(self, seed: int) -> State:
        """See ``protocols.Engine``."""
        arrays = {name: weights.read_component(self.base, name) for name in self.model.components}
        if self.config.adapter.kind == "full":
            params = arrays[self.family.network.component]
        else:
            dtype = np.float32 if self.half is None else self.half
            for component, named in arrays.items():
                self.frozen[component] = self.place(
                    {name: array.astype(dtype) for name, array in named.items()}
                )
            params = make_adapters(arrays, self.config.adapter, self.family, seed)
        self.layout = Layout({name: array.shape for name, array in params.items()})
        return jax.tree.map(
            lambda value: value if isinstance(value, jax.Array) else self.replicate(value),
            make_state(self.config.optim, self.half, self.place(self.layout.pack(params))),
        )

    def count_trained(self, state: State) -> int:
        """See ``protocols.Engine``."""
        return self.layout.count

    def replicate(self, value: Any) -> Array:
        """Return a number on every device."""
        array = np.asarray(value)
        return jax.make_array_from_callback(
            array.shape, NamedSharding(self.mesh, PartitionSpec()), lambda index: array
        )

    def step(
        self,
        state: State,
        batch: Batch,
        *,
        step: int,
        learning_rate: float,
        ema: float | None,
        seed: int,
    ) -> tuple[State, Metrics]:
        """See ``protocols.Engine``."""
        layers = list_layers(self.layout.shapes, self.config.adapter.dropout)
        rows = self.on_mesh(add_keys(batch, seed, layers))
        scalars = to_scalars(step, learning_rate, ema)
        key = tuple((name, array.shape, str(array.dtype)) for name, array in rows.items())
        if key not in self.compiled:
            self.compiled[key] = self.compile(state, rows, scalars)
        state, metrics = self.compiled[key](state, self.frozen, rows, scalars)
        return state, metrics

    def on_mesh(self, batch: Batch) -> Named:
        """Return the global batch, [pieces, rows, ...], of which this process gives its rows.

        The rows of a piece, a micro-batch, are divided over all devices.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(None, ("data", "fsdp")))
        pieces = len(batch["timestep"]) // self.micro_batch_size
        rows: Named = {}
        for name, array in batch.items():
            if name == "position":  # which the host alone needs
                continue
            # Without jax_enable_x64 a device has no int64.
            narrow = array.astype(np.int32) if array.dtype == np.int64 else array
            cut = np.ascontiguousarray(narrow).reshape(pieces, -1, *array.shape[1:])
            rows[name] = jax.make_array_from_process_local_data(sharding, cut)
        return rows

    def compile(self, state: State, rows: Named, scalars: dict[str, Any]) -> Any:
        """Return the step compiled for this shape of batch."""
        began = time.monotonic()
        shardings = jax.tree.map(lambda array: array.sharding, state), None
        program = self.load_program(
            TrainingStep(self.model, self.layout).pure_step,
            (state, self.frozen, rows, scalars),
            out_shardings=shardings,
            donated=0,  # the old state's memory becomes the new one's
        )
        memory: Any = program.memory_analysis()
        if self.process.kind == "cpu" and memory.temp_size_in_bytes < KEPT_BYTES:
            keep_heap()
        seconds = time.monotonic() - began
        if seconds > 1:
            shape = "x".join(str(side) for side in rows["x0"].shape[3:])
            self.report(f"compiled the step for latents of {shape} in {seconds:.1f} s")
        return program

    def load_program(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        out_shardings: Any,
        donated: int | tuple[int, ...] = (),
    ) -> Any:
        """Return a function compiled for these arguments, or the same program from the disk."""
        config, configs = toml.to_plain(self.config), self.base.configs
        config["engine"].pop("compile_cache", None)
        meaning = {name: config[name] for name in ("adapter", "engine", "objective", "optim")}
        meaning |= {
            "configs": configs.components | {"model_index": configs.model_index},
            "family": self.family.name,
            "precision": self.process.precision,
        }
        with jax.default_matmul_precision(self.matmul_precision):
            return compile_cache.load_or_compile(
                function,
                arguments,
                list(self.mesh.devices.flat),
                meaning,
                self.report,
                out_shardings=out_shardings,
                donate_argnums=donated,
            )

    def fetch_metrics(self, state: State, metrics: Sequence[Metrics]) -> list[dict[str, float]]:
        """See ``protocols.Engine``."""
        fault, rows = jax.device_get((state["fault"], list(metrics)))
        if fault >= 0:
            raise NonFiniteStep(int(fault))
        return [{name: float(value) for name, value in row.items()} for row in rows]

    def losses(self, state: State, batch: Batch, *, average: bool) -> np.ndarray:
        """See ``protocols.Engine``."""
        rows = self.on_mesh(batch)
        params = state["ema"] if average and "ema" in state else state["params"]
        key = ("losses", *((name, array.shape) for name, array in rows.items()))
        if key not in self.compiled:
            self.compiled[key] = self.load_program(
                TrainingStep(self.model, self.layout).pure_losses,
                (params, self.frozen, rows),
                out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            )
        # [pieces, rows of all processes], of which this process's are returned.
        losses = np.asarray(self.compiled[key](params, self.frozen, rows))
        return losses.reshape(len(losses), self.world_size, -1)[:, self.rank].reshape(-1)

    def draw_previews(
        self,
        state: State,
        prompts: Sequence[str],
        seeds: Sequence[int],
        check_stop: Callable[[], None] = lambda: None,
        **call: Unpack[DrawCall],
    ) -> list[np.ndarray]:
        """See ``protocols.Engine``."""
        keep = bool(self.encoders.loaded)
        # Every process gives its parts of the arrays, before all but the first leave.
        packed = self.on_host(state["ema"] if "ema" in state else state["params"])
        frozen_on_host = {name: self.on_host(arrays) for name, arrays in self.frozen.items()}
        if self.rank > 0:
            return []
        params = to_local_device(self.layout.unpack(packed))
        frozen = {name: to_local_device(arrays) for name, arrays in frozen_on_host.items()}
        drawing = self.open_pipeline()
        drawing.nets = {
            name: self.model.select_arrays(params, frozen, name) for name in self.model.components
        }
        pictures: list[np.ndarray] = drawing.draw(
            prompts, seeds, report=self.report, check_stop=check_stop, **call
        )
        drawing.nets = {}
        if not keep:
            self.release_encoders()
        return pictures

    def open_pipeline(self) -> Any:
        """Return what draws previews, always the same, so that it is compiled once."""
        from limner.engines.jax.pipeline import Pipeline, report_unchecked

        if self.pipeline is None:
            if self.config.preview.safety_checker:
                report_unchecked(self.base, self.report)
            # Previews lie on one device, not on the mesh.
            kernel = None if self.model.kernel is None else choose_kernel(local_device())
            self.pipeline = Pipeline(
                self.base,
                self.family,
                self.encoders,
                {},
                self.prediction_type,
                self.half,
                kernel=kernel,
            )
        return self.pipeline

    def on_host(self, arrays: Named) -> dict[str, np.ndarray]:
        """Return arrays as numpy; all processes must call it, for each may hold parts of them."""
        if self.world_size == 1:
            return {name: np.array(array) for name, array in arrays.items()}
        return {
            name: np.asarray(multihost_utils.process_allgather(array, tiled=True))
            for name, array in arrays.items()
        }

    def snapshot(self, state: State) -> Iterator[tuple[str, Arrays]]:
        """See ``protocols.Engine``; names are those of the PyTorch engine's checkpoints."""

        def read(group: str) -> Arrays:
            return self.layout.unpack(self.on_host(state[group]))

        moments = {name: read(group) for name, group in MOMENTS.items()}
        groups: list[tuple[str, Arrays]] = [("model", read("params"))]
        if "ema" in state:
            groups.append(("ema", read("ema")))
        step = {"step": np.asarray(state["count"], np.float32)}
        groups.append(("optimizer", step | join_moments(moments)))
        if "scaler" in state:
            values = SCALER | jax.device_get(state["scaler"])
            groups.append(("scaler", {name: np.asarray(value) for name, value in values.items()}))
        # Not one at a time: only the first process writes them, and all must make them.
        return iter(groups)

    def restore(self, state: State, groups: Callable[[str], Arrays]) -> State:
        """See ``protocols.Engine``."""
        optimizer = groups("optimizer")
        if "step" not in optimizer:
            raise IntegrityError("the checkpoint's optimizer: it has no step")
        new = {**state, "params": self.place_checked(groups("model"), "the checkpoint's weights")}
        moments = split_moments(optimizer)
        for name, group in MOMENTS.items():
            new[group] = self.place_checked(moments.get(name, {}), "the checkpoint's optimizer")
        new["count"] = self.replicate(np.int32(optimizer["step"]))
        if "ema" in state:
            new["ema"] = self.place_checked(groups("ema"), "the checkpoint's average")
        if "scaler" in state:
            values = groups("scaler")
            new["scaler"] = {
                name: self.replicate(values[name].astype(array.dtype))
                for name, array in state["scaler"].items()
            }
        return new

    def place_checked(self, arrays: Arrays, source: str) -> Named:
        """Return a checkpoint's arrays as a state has them; see ``engines.state.check_arrays``."""
        check_arrays(arrays, self.layout.shapes, np.dtype(np.float32), source)
        ordered = {name: np.array(arrays[name]) for name in self.layout.shapes}
        return self.place(self.layout.pack(ordered))


def refuse_settings(config: Config, base: BaseModel, family: Family) -> None:
    """Refuse what this engine does not do, before a weight is loaded.

    Raises:
        InputError: naming the setting.
    """
    kind = base.component_class(family.network.component)[1]
    if not weights.serves(family):
        raise InputError(
            f'engine.kind="jax" does not train a {kind} of family {family.name!r} yet; use '
            'engine.kind="torch".'
        )
    if config.optim.kind == "adamw8bit":
        raise InputError(
            "optim.kind: adamw8bit is bitsandbytes', for PyTorch on CUDA; with "
            'engine.kind="jax" use optim.kind="adamw"'
        )
    if config.optim.ema_offload:
        raise InputError(
            "optim.ema_offload: the JAX engine divides the average over devices (engine.fsdp) "
            "and does not offload it; leave optim.ema_offload out"
        )
    refuse_attention_dropout(base, family.trained_components(config.adapter.text_encoders))
    check_previews(config, base, family)
    if config.adapter.kind != "full":
        shapes = weights.expected_shapes(kind, base.configs[family.network.component])
        list_linear_adapters({family.network.component: shapes}, config.adapter, family)


def open_engine(
    config: Config,
    base: BaseModel,
    family: Family,
    process: JaxProcessGroup,
    micro_batch_size: int,
    report: Report,
) -> JaxEngine:
    """Open the engine of this process; weights are loaded when they are first needed."""
    return JaxEngine(config, base, family, process, micro_batch_size, report)
