"""Training in JAX: one jitted pure function from state and batch to state and metrics, compiled
ahead of time for each shape of batch."""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from limner.base_model.base import BaseModel
from limner.config import toml
from limner.config.schema import Config
from limner.diffusion import samplers
from limner.diffusion.objective import Objective
from limner.engines.jax import clip, compile_cache, weights
from limner.engines.jax.attention import Array, choose_kernel
from limner.engines.jax.encoders import JaxEncoders, has_projection
from limner.engines.jax.layout import LARGE, SMALL, Layout, choose_targets, make_adapters
from limner.engines.jax.nn import Params
from limner.engines.jax.processes import JaxProcessGroup, local_device
from limner.engines.jax.unet import unet
from limner.engines.machine import keep_heap
from limner.errors import InputError, IntegrityError
from limner.families.family import Family
from limner.families.text import encode_captions, zero_dropped
from limner.protocols import Arrays, Batch, Metrics, NonFiniteStep, Report

HALF = {"fp16": jnp.float16, "bf16": jnp.bfloat16}
SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}  # PyTorch's own numbers
# bytes of a step's own memory, up to which a process on the CPU keeps it: some 20 % of a step's
# time
KEPT_ARRAYS = 1 << 30
Named = dict[str, Array]
State = dict[str, Any]  # params, mu, nu, count, fault, and where they are wished for ema and scaler


class JaxEngine:
    """The engine of one process; see ``protocols.Engine``."""

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        family: Family,
        world: JaxProcessGroup,
        micro: int,
        report: Callable[[str], None] = print,
    ):
        self.config, self.base, self.family, self.process, self.micro_batch_size, self.report = (
            config,
            base,
            family,
            world,
            micro,
            report,
        )
        self.rank, self.world_size, self.mesh = world.rank, world.world_size, world.mesh
        self.half = HALF.get(world.precision)
        if (
            kind := base.component_class(family.trained_component)[1]
        ) != "UNet2DConditionModel" or family.stage is not None:
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
        if config.engine.attention == "xformers":
            report(
                "xFormers is PyTorch's; the JAX engine uses a fused kernel of its own where there "
                "is one"
            )
        if config.preview.prompts:
            samplers.make_table(
                base.configs["scheduler"], config.preview.steps
            )  # what cannot be drawn is refused now
        if micro * world.world_size % self.mesh.size:
            rows = (
                f"a micro-batch of {micro * world.world_size} rows ({micro} for each of "
                f"{world.world_size} "
                "processes)"
            )
            raise InputError(
                f"train.micro_batch_size: {rows} cannot be divided among {self.mesh.size} "
                "devices; use a "
                f"multiple of {self.mesh.size}"
            )
        self.encoders = JaxEncoders(
            base,
            {"vae": self.half} if config.model.vae is not None and self.half is not None else {},
        )
        self.prediction_type = Objective.from_scheduler(
            base.configs["scheduler"], config.objective
        ).prediction_type
        self.learns = family.trained_components(config.adapter.text_encoders)
        self.scale = (
            config.adapter.rank if config.adapter.alpha is None else config.adapter.alpha
        ) / config.adapter.rank
        self.kernel = (
            choose_kernel(world.mesh.devices.flat[0], world.mesh)
            if config.engine.attention != "math"
            else None
        )
        self.precise = None if config.engine.tf32 or self.half is not None else "highest"
        self.adam = optax.chain(
            optax.scale_by_adam(*config.optim.betas, config.optim.eps),
            optax.add_decayed_weights(config.optim.weight_decay),
        )
        self.compiled: dict[Any, Any] = {}
        self.frozen: dict[str, Named] = {}
        self.pipeline: Any = None  # what draws previews, once one is asked for
        self.layout = Layout({})
        if config.adapter.kind == "lora":
            choose_targets(
                weights.expected_shapes(kind, base.configs[family.trained_component]),
                config.adapter,
                family,
            )

    def get_encoders(self) -> JaxEncoders:
        return self.encoders

    def release_encoders(self, names: Iterable[str] | None = None) -> None:
        self.encoders.release(names)

    def place(self, arrays: dict[str, np.ndarray]) -> Named:
        """Arrays on the mesh, each large one divided over ``fsdp``."""
        return {
            name: jax.make_array_from_callback(a.shape, self.sharding(name, a.shape), a.__getitem__)
            for name, a in arrays.items()
        }

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """How an array lies on the mesh: its longest axis that ``fsdp`` divides is divided, if it
        is large. What holds the small ones is whole everywhere:
        each of them would be sent from device to device by itself."""
        parts, size = [None] * len(shape), self.mesh.shape["fsdp"]
        if (
            size > 1
            and name != SMALL
            and int(np.prod(shape)) >= LARGE
            and (fits := [i for i, n in enumerate(shape) if n % size == 0])
        ):
            parts[max(fits, key=lambda i: shape[i])] = "fsdp"  # type: ignore[call-overload]
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    def init_state(self, seed: int) -> State:
        arrays = {name: weights.read_component(self.base, name) for name in self.learns}
        if self.config.adapter.kind == "full":
            params = arrays[self.family.trained_component]
        else:
            kind = np.float32 if self.half is None else self.half
            self.frozen = {
                name: self.place({key: a.astype(kind) for key, a in named.items()})
                for name, named in arrays.items()
            }
            params = make_adapters(
                {name: {k: a.shape for k, a in named.items()} for name, named in arrays.items()},
                self.config.adapter,
                self.family,
                seed,
            )
        self.layout = Layout({name: a.shape for name, a in params.items()})
        return jax.tree.map(
            lambda a: a if isinstance(a, jax.Array) else self.replicate(a),
            self.make_state(self.place(self.layout.pack(params))),
        )

    def make_state(self, params: Named) -> State:
        """The state that begins with these weights."""
        zeros = jax.tree.map(jnp.zeros_like, params)
        state: State = {
            "params": params,
            "mu": zeros,
            "nu": jax.tree.map(jnp.copy, zeros),
            "count": np.int32(0),
            "fault": np.int32(-1),
        }
        if self.config.optim.ema is not None:
            state["ema"] = jax.tree.map(jnp.copy, params)
        if self.half is jnp.float16:
            state["scaler"] = {
                name: np.asarray(SCALER[name], kind)
                for name, kind in (("scale", np.float32), ("_growth_tracker", np.int32))
            }
        return state

    def replicate(self, value: Any) -> Array:
        """A number on every device."""
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
        rows = self.on_mesh(batch, len(batch["timestep"]) // self.micro_batch_size)
        scalars = to_scalars(step, learning_rate, ema, seed)
        key = tuple((name, a.shape, str(a.dtype)) for name, a in rows.items())
        if key not in self.compiled:
            self.compiled[key] = self.compile(state, rows, scalars)
        state, metrics = self.compiled[key](state, self.frozen, rows, scalars)
        return state, metrics

    def on_mesh(self, batch: Batch, pieces: int) -> Named:
        """This process's rows as [pieces, rows, ...] of the global batch, rows divided over all
        devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, ("data", "fsdp")))
        narrow = {
            name: array.astype(np.int32) if array.dtype == np.int64 else array
            for name, array in batch.items()
        }
        return {
            name: jax.make_array_from_process_local_data(
                sharding, np.ascontiguousarray(array).reshape(pieces, -1, *array.shape[1:])
            )
            for name, array in narrow.items()
        }

    def compile(self, state: State, rows: Named, scalars: dict[str, Any]) -> Any:
        """The step for this shape of batch; the old state's memory is given to the new one."""
        began = time.monotonic()
        out = jax.tree.map(lambda a: a.sharding, state), None
        made = self.load_program(
            self.pure_step, (state, self.frozen, rows, scalars), donate_argnums=0, out_shardings=out
        )
        needs: Any = made.memory_analysis()
        if self.process.kind == "cpu" and needs.temp_size_in_bytes < KEPT_ARRAYS:
            keep_heap()
        if (took := time.monotonic() - began) > 1:
            shape = "x".join(str(side) for side in rows["x0"].shape[3:])
            self.report(f"compiled the step for latents of {shape} in {took:.1f} s")
        return made

    def load_program(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], **how: Any
    ) -> Any:
        """A function compiled for these arguments, or found on the disk."""

        def make() -> Any:
            with jax.default_matmul_precision(self.precise):
                return jax.jit(function, **how).lower(*arguments).compile()

        config = toml.to_plain(self.config)
        config["engine"].pop("compile_cache", None)
        meaning = {name: config.get(name) for name in ("adapt", "engine", "objective", "optim")} | {
            "configs": self.base.configs,
            "family": self.family.name,
        }
        meaning |= {
            "function": function.__name__,
            "precision": self.process.precision,
            "how": repr(how),
        }
        return compile_cache.load_or_compile(make, list(self.mesh.devices.flat), meaning, arguments)

    def pure_step(
        self, state: State, frozen: dict[str, Named], rows: Named, scalars: dict[str, Array]
    ) -> tuple[State, Metrics]:
        """One optimizer step, a function of its arguments alone."""
        scale = state["scaler"]["scale"] if "scaler" in state else jnp.float32(1)
        count = rows["timestep"].shape[0] * rows["timestep"].shape[1]
        base_key = (
            jax.random.fold_in(jax.random.key(scalars["seed"]), scalars["step"])
            if self.config.adapter.dropout
            else None
        )

        def loss(params: Named, part: Named, i: Array) -> Array:
            key = None if base_key is None else jax.random.fold_in(base_key, i)
            return self.example_losses(params, frozen, part, key, True).sum() / count * scale

        def add(
            sums: tuple[Array, Named], given: tuple[Named, Array]
        ) -> tuple[tuple[Array, Named], None]:
            value, gradient = jax.value_and_grad(loss)(state["params"], *given)
            return (sums[0] + value, jax.tree.map(jnp.add, sums[1], gradient)), None

        pieces = rows["timestep"].shape[0]
        if pieces == 1:
            total, gradient = jax.value_and_grad(loss)(
                state["params"], jax.tree.map(lambda a: a[0], rows), jnp.int32(0)
            )
        else:
            zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state["params"])
            (total, gradient), _ = jax.lax.scan(add, zero, (rows, jnp.arange(pieces)))
        return self.updated(state, gradient, total / scale, scale, scalars)

    def updated(
        self, state: State, gradient: Named, loss: Array, scale: Array, scalars: dict[str, Array]
    ) -> tuple[State, Metrics]:
        """Clip, step and average, unless something is not finite; ``gradient`` is ``scale`` times
        that of the loss."""
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in gradient.values())) / scale
        good = jnp.isfinite(norm) & jnp.isfinite(loss)
        overflow = (
            jnp.isfinite(loss) & (scale > 1) if "scaler" in state else jnp.bool_(False)
        )  # the scale is lowered, and the run goes on
        fault = jnp.where((state["fault"] < 0) & ~good & ~overflow, scalars["step"], state["fault"])
        shrink = 1 / (jnp.maximum((norm + 1e-6) / self.config.optim.max_grad_norm, 1) * scale)
        good, shrink, rate = jax.lax.optimization_barrier(
            (good, shrink, scalars["rate"])
        )  # else each of them is computed again for every array
        before = (
            optax.ScaleByAdamState(state["count"], state["mu"], state["nu"]),
            optax.EmptyState(),
        )
        updates, (adam, *_) = self.adam.update(
            jax.tree.map(lambda g: g * shrink, gradient), before, state["params"]
        )  # type: ignore[misc]
        moved = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
        new = {"params": moved, "mu": adam.mu, "nu": adam.nu, "count": adam.count}
        out = {
            name: jax.tree.map(partial(jnp.where, good), value, state[name])
            for name, value in new.items()
        } | {"fault": fault}
        if "ema" in state:
            weight = jax.lax.optimization_barrier(jnp.where(good, 1 - scalars["ema"], 0))
            out["ema"] = jax.tree.map(
                lambda e, p: e + weight * (p - e), state["ema"], out["params"]
            )
        if "scaler" in state:
            grown = state["scaler"]["_growth_tracker"] + 1
            higher = good & (grown == SCALER["growth_interval"])
            factor = jnp.where(
                good, jnp.where(higher, SCALER["growth_factor"], 1.0), SCALER["backoff_factor"]
            )
            out["scaler"] = {
                "scale": scale * factor,
                "_growth_tracker": jnp.where(good & ~higher, grown, 0),
            }
        return out, {"loss": loss, "grad_norm": norm}

    def network(
        self, params: Named, frozen: dict[str, Named], component: str, key: Array | None = None
    ) -> Params:
        """A component's arrays: those that learn, beside those that do not."""
        if self.config.adapter.kind == "full":
            return Params(params)
        own = {
            name.removeprefix(f"{component}."): a
            for name, a in params.items()
            if name.startswith(f"{component}.")
        }
        return Params(
            frozen[component] | own, scale=self.scale, dropout=self.config.adapter.dropout, key=key
        )

    def example_losses(
        self, params: Named, frozen: dict[str, Named], b: Named, key: Array | None, training: bool
    ) -> Array:
        """The weighted loss of each example, float32, shape [rows]; see
        ``TorchEngine.example_losses``."""
        params = self.layout.unpack(params)

        def column(name: str) -> Array:
            return b[name].reshape(-1, *[1] * (b["x0"].ndim - 1))

        kind = self.half or jnp.float32
        x = column("signal_in") * b["x0"] + column("noise_in") * b.get("input_noise", b["noise"])
        target = column("signal_target") * b["x0"] + column("noise_target") * b["noise"]
        if len(self.learns) > 1:
            features = encode_captions(
                self.family, TrainableTextEncoders(self, params, frozen, key), b
            )
            b = b | (zero_dropped(features, b["keep"]) if "keep" in b else features)
        net, config, inputs = (
            self.network(params, frozen, self.family.trained_component, key),
            self.base.configs[self.family.trained_component],
            self.family.network_inputs(b),
        )

        def predict(x: Array) -> Array:
            made = unet(
                net,
                config,
                x.astype(kind),
                b["timestep"],
                **inputs,
                remat=training and self.config.engine.gradient_checkpointing,
                kernel=self.kernel,
            )
            return made[:, : x.shape[1]].astype(jnp.float32)

        if self.config.objective.dream is not None and training:  # algorithm 1 of arXiv:2312.00210
            delta = jax.lax.stop_gradient((target - predict(x)) * column("dream"))
            x, target = x + column("noise_in") * delta, target + delta
        return b["weight"] * jnp.square(predict(x) - target).reshape(len(x), -1).mean(1)

    def fetch_metrics(self, state: State, metrics: Sequence[Metrics]) -> list[dict[str, float]]:
        fault, rows = jax.device_get((state["fault"], list(metrics)))
        if fault >= 0:
            raise NonFiniteStep(int(fault))
        return [{name: float(value) for name, value in row.items()} for row in rows]

    def losses(self, state: State, batch: Batch, *, average: bool) -> np.ndarray:
        rows = self.on_mesh(batch, len(batch["timestep"]) // self.micro_batch_size)
        params = state["ema"] if average and "ema" in state else state["params"]
        key = ("losses", *((name, a.shape) for name, a in rows.items()))
        if key not in self.compiled:

            def pure_losses(params: Named, frozen: dict[str, Named], rows: Named) -> Array:
                def each(part: Named) -> Array:
                    return self.example_losses(params, frozen, part, None, False)

                one = (
                    len(rows["timestep"]) == 1
                )  # a loop of one is slower, and takes longer to compile
                return (
                    each(jax.tree.map(lambda a: a[0], rows))[None]
                    if one
                    else jax.lax.map(each, rows)
                )

            self.compiled[key] = self.load_program(
                pure_losses,
                (params, self.frozen, rows),
                out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            )
        found = np.asarray(
            self.compiled[key](params, self.frozen, rows)
        )  # [pieces, rows of all processes]
        return found.reshape(len(found), self.world_size, -1)[:, self.rank].reshape(-1)

    def draw_previews(
        self,
        state: State,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        size: int,
    ) -> list[np.ndarray]:
        from limner.engines.jax.pipeline import Pipeline

        keep = bool(self.encoders.loaded)
        params = self.gather(
            self.layout.unpack(self.on_host(state["ema"] if "ema" in state else state["params"]))
        )
        frozen = {
            name: self.gather(self.on_host(arrays)) for name, arrays in self.frozen.items()
        }  # what hosts hold together, they put together together
        if self.rank > 0:
            return []
        if self.pipeline is None:
            kernel = (
                choose_kernel(local_device()) if self.kernel is not None else None
            )  # pictures lie on one device
            self.pipeline = Pipeline(
                self.base,
                self.family,
                self.encoders,
                {},
                self.prediction_type,
                self.half,
                kernel=kernel,
            )
        self.pipeline.nets = {name: self.network(params, frozen, name) for name in self.learns}
        made = self.pipeline.draw(
            prompts, seeds, steps=steps, guidance_scale=guidance_scale, size=size
        )
        self.pipeline.nets = {}
        if not keep:
            self.release_encoders()
        return made

    def gather(self, arrays: dict[str, np.ndarray]) -> Named:
        """Arrays on this process's first device."""
        return {name: jax.device_put(array, local_device()) for name, array in arrays.items()}

    def on_host(self, arrays: Named) -> dict[str, np.ndarray]:
        """Arrays as numpy; where other processes hold parts of them, all processes must call
        this."""
        if self.world_size == 1:
            return {name: np.array(a) for name, a in arrays.items()}
        found: dict[str, np.ndarray] = {
            name: np.asarray(multihost_utils.process_allgather(a, tiled=True))
            for name, a in arrays.items()
        }
        return found

    def snapshot(self, state: State) -> Iterator[tuple[str, Arrays]]:
        """See ``protocols.Engine``; names are those of the PyTorch engine's checkpoints. All
        are made at once: other processes hold parts of them."""

        def named(group: str) -> Arrays:
            return self.layout.unpack(self.on_host(state[group]))

        memory = {"step": np.asarray(state["count"], np.float32)}
        for name, group in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
            memory |= {f"{name}/{key}": a for key, a in named(group).items()}
        groups = [
            ("model", named("params")),
            *([("ema", named("ema"))] if "ema" in state else []),
            ("optimizer", memory),
        ]
        if "scaler" in state:
            groups.append(
                (
                    "scaler",
                    {
                        name: np.asarray(value)
                        for name, value in (SCALER | jax.device_get(state["scaler"])).items()
                    },
                )
            )
        return iter(groups)

    def restore(self, state: State, groups: Callable[[str], Arrays]) -> State:
        def like(arrays: Arrays, what: str) -> Named:
            known = self.layout.shapes
            if strange := sorted(arrays.keys() ^ known.keys()):
                raise IntegrityError(
                    f"{what}: {len(strange)} names differ from the model's, such as {strange[0]}"
                )
            for name, array in arrays.items():
                if array.shape != known[name] or array.dtype != np.float32:
                    raise IntegrityError(
                        f"{what}: {name} is {array.dtype} {list(array.shape)}, the model has "
                        f"float32 {list(known[name])}"
                    )
            return self.place(self.layout.pack({name: np.array(arrays[name]) for name in known}))

        saved = groups("optimizer")
        if "step" not in saved:
            raise IntegrityError("the checkpoint's optimizer: it has no step")
        new = {**state, "params": like(groups("model"), "the checkpoint's weights")}
        for name, group in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
            own = {
                key.partition("/")[2]: a for key, a in saved.items() if key.startswith(f"{name}/")
            }
            new[group] = like(own, "the checkpoint's optimizer")
        new["count"] = self.replicate(np.int32(saved["step"]))
        if "ema" in state:
            new["ema"] = like(groups("ema"), "the checkpoint's average")
        if "scaler" in state:
            known = groups("scaler")
            new["scaler"] = {
                name: self.replicate(known[name].astype(a.dtype))
                for name, a in state["scaler"].items()
            }
        return new


class TrainableTextEncoders:
    """Text encoders that are being trained: token ids in, states with gradients out; see
    ``protocols.TextEncoders``."""

    def __init__(
        self, engine: JaxEngine, params: Named, frozen: dict[str, Named], key: Array | None
    ):
        self.engine, self.params, self.frozen, self.key = engine, params, frozen, key

    def encode_text(self, name: str, ids: Array, skip: int = 0) -> tuple[Array, Array]:
        net = self.engine.network(
            self.params,
            self.frozen,
            name,
            None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(name.encode())),
        )
        base = self.engine.base
        return clip.encode_text(
            net,
            base.configs[name],
            ids,
            skip,
            has_projection(base, name),
            self.engine.half or jnp.float32,
        )

    def concat_features(self, arrays: list[Array]) -> Array:
        return jnp.concatenate(arrays, axis=-1)


def to_scalars(step: int, learning_rate: float, ema: float | None, seed: int) -> dict[str, Any]:
    """What a step is told besides its batch."""
    return {
        "step": np.int32(step),
        "seed": np.uint32(seed % 2**32),
        "rate": np.float32(learning_rate),
        "ema": np.float32(1.0 if ema is None else ema),
    }


def open_engine(
    config: Config,
    base: BaseModel,
    family: Family,
    world: JaxProcessGroup,
    micro: int,
    report: Report,
) -> JaxEngine:
    """The engine of this process; weights are loaded when they are first needed."""
    return JaxEngine(config, base, family, world, micro, report)
