"""The training step as one pure function of state, batch and a few numbers."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from limner.config.schema import OptimizerSettings
from limner.engines.jax.attention import Array
from limner.engines.jax.layout import Layout
from limner.engines.jax.model import Named, TrainedModel
from limner.protocols import Metrics

State = dict[str, Any]  # params, mu, nu, count, fault; where they are wished for, ema and scaler
# PyTorch's own numbers.
SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


def make_state(settings: OptimizerSettings, half: Any, params: Named) -> State:
    """Return the state that training starts from, with these weights."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    state: State = {
        "params": params,
        "mu": zeros,
        "nu": jax.tree.map(jnp.copy, zeros),
        "count": np.int32(0),
        # The first step that was not finite, -1 where there was none.
        "fault": np.int32(-1),
    }
    if settings.ema is not None:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if half is jnp.float16:
        state["scaler"] = {
            "scale": np.float32(SCALER["scale"]),
            "_growth_tracker": np.int32(SCALER["_growth_tracker"]),
        }
    return state


def to_scalars(step: int, learning_rate: float, ema: float | None) -> dict[str, Any]:
    """Return the numbers of a step, of fixed types, so that no value is compiled anew."""
    return {
        "step": np.int32(step),
        "rate": np.float32(learning_rate),
        "ema": np.float32(1.0 if ema is None else ema),
    }


@dataclass(frozen=True)
class TrainingStep:
    """The pure functions that an engine compiles; arrays are ``layout.pack``'s."""

    model: TrainedModel
    layout: Layout

    def pure_losses(self, params: Named, frozen: dict[str, Named], rows: Named) -> Array:
        """Return the loss of each example without training, [pieces, rows]."""

        def compute_losses(part: Named) -> Array:
            return self.model.example_losses(self.layout.unpack(params), frozen, part)

        # A loop of one piece is slower, and takes longer to compile.
        if len(rows["timestep"]) == 1:
            return compute_losses(jax.tree.map(lambda a: a[0], rows))[None]
        return jax.lax.map(compute_losses, rows)

    def pure_step(
        self, state: State, frozen: dict[str, Named], rows: Named, scalars: dict[str, Array]
    ) -> tuple[State, Metrics]:
        """Make one optimizer step.

        Args:
            frozen: the arrays of each component, where adapters are trained.
            rows: the global batch, [pieces, rows, ...].
            scalars: see ``to_scalars``.
        """
        scale = state["scaler"]["scale"] if "scaler" in state else jnp.float32(1)
        loss, gradient = self.accumulate(state["params"], frozen, rows, scale)
        return self.update(state, gradient, loss / scale, scale, scalars)

    def accumulate(
        self, params: Named, frozen: dict[str, Named], rows: Named, scale: Array
    ) -> tuple[Array, Named]:
        """Return ``scale`` times the loss of the global batch, and its gradient."""
        pieces, size = rows["timestep"].shape

        def compute_loss(params: Named, part: Named) -> Array:
            named = self.layout.unpack(params)
            losses = self.model.example_losses(named, frozen, part, training=True)
            return losses.sum() / (pieces * size) * scale

        def add_piece(sums: tuple[Array, Named], part: Named) -> tuple[tuple[Array, Named], None]:
            loss, gradient = jax.value_and_grad(compute_loss)(params, part)
            return (sums[0] + loss, jax.tree.map(jnp.add, sums[1], gradient)), None

        if pieces == 1:
            return jax.value_and_grad(compute_loss)(params, jax.tree.map(lambda a: a[0], rows))
        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(add_piece, zero, rows)
        return sums

    def update(
        self, state: State, gradient: Named, loss: Array, scale: Array, scalars: dict[str, Array]
    ) -> tuple[State, Metrics]:
        """Clip, step and average, unless something is not finite.

        Args:
            gradient: ``scale`` times that of the loss.
        """
        settings = self.model.config.optim
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in gradient.values())) / scale
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        # A gradient that overflows for its scale is no fault: the scale is lowered, down to 1, and
        # the run goes on.
        overflow = jnp.isfinite(loss) & (scale > 1) if "scaler" in state else jnp.bool_(False)
        is_first_fault = (state["fault"] < 0) & ~finite & ~overflow
        fault = jnp.where(is_first_fault, scalars["step"], state["fault"])
        shrink = 1 / (jnp.maximum((norm + 1e-6) / settings.max_grad_norm, 1) * scale)
        # Without the barrier XLA computes each of them again for every array.
        finite, shrink, rate = jax.lax.optimization_barrier((finite, shrink, scalars["rate"]))
        before = (
            optax.ScaleByAdamState(state["count"], state["mu"], state["nu"]),
            optax.EmptyState(),
        )
        updates, (adam, *_) = make_adam(settings).update(
            jax.tree.map(lambda g: g * shrink, gradient), before, state["params"]
        )
        moved = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
        after = {"params": moved, "mu": adam.mu, "nu": adam.nu, "count": adam.count}
        new: State = {"fault": fault}
        for name, value in after.items():
            # What is not finite leaves every number as it was.
            new[name] = jax.tree.map(partial(jnp.where, finite), value, state[name])
        if "ema" in state:
            weight = jax.lax.optimization_barrier(jnp.where(finite, 1 - scalars["ema"], 0))
            new["ema"] = jax.tree.map(
                lambda e, p: e + weight * (p - e), state["ema"], new["params"]
            )
        if "scaler" in state:
            new["scaler"] = update_scaler(state["scaler"], finite)
        return new, {"loss": loss, "grad_norm": norm}


def make_adam(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Return AdamW without its learning rate, which is a number of the step."""
    return optax.chain(
        optax.scale_by_adam(*settings.betas, settings.eps),
        optax.add_decayed_weights(settings.weight_decay),
    )


def update_scaler(scaler: Named, finite: Array) -> Named:
    """Raise the scale after many finite steps, lower it after one that is not."""
    steps = scaler["_growth_tracker"] + 1
    grows = finite & (steps == SCALER["growth_interval"])
    growth = jnp.where(grows, SCALER["growth_factor"], 1.0)
    factor = jnp.where(finite, growth, SCALER["backoff_factor"])
    return {
        "scale": scaler["scale"] * factor,
        "_growth_tracker": jnp.where(finite & ~grows, steps, 0),
    }
