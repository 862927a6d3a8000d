"""The networks of a run as functions of their arrays, and the loss of an example."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from limner.base_model.base import BaseModel
from limner.config.schema import Config
from limner.engines.adapters import get_alpha
from limner.engines.jax import clip
from limner.engines.jax.attention import Array, Kernel
from limner.engines.jax.dropout import AdapterDropout, list_layers
from limner.engines.jax.encoders import JaxFeatures, has_projection
from limner.engines.jax.nn import Params
from limner.engines.jax.unet import unet
from limner.families.family import Family
from limner.families.text import encode_captions, zero_dropped

Named = dict[str, Array]


@dataclass(frozen=True)
class TrainedModel:
    """The trained networks of a run; nothing in it is an array.

    Args:
        half: the dtype to compute in; None: float32.
        kernel: of the UNet's attention; None: plain products.
    """

    config: Config
    base: BaseModel
    family: Family
    half: Any
    kernel: Kernel | None

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the trained networks."""
        return self.family.trained_components(self.config.adapter.text_encoders)

    def select_arrays(
        self,
        params: Named,
        frozen: dict[str, Named],
        component: str,
        dropout_keys: Array | None = None,
    ) -> Params:
        """Return a component's arrays, the trained ones beside the frozen ones.

        Args:
            params: all trained arrays by their names in files.
            frozen: those of each component, where adapters are trained.
            dropout_keys: see ``engines.dropout.make_keys``; None: nothing is dropped.
        """
        adapter = self.config.adapter
        if adapter.kind == "full":
            return Params(params)
        dropout = None
        if dropout_keys is not None:
            layers = list_layers(params, adapter.dropout)
            dropout = AdapterDropout(component, adapter.dropout, dropout_keys, layers)
        prefix = f"{component}."
        trained = {
            name.removeprefix(prefix): array
            for name, array in params.items()
            if name.startswith(prefix)
        }
        return Params(
            frozen[component] | trained,
            scale=get_alpha(adapter) / adapter.rank,
            dropout=dropout,
        )

    def example_losses(
        self,
        params: Named,
        frozen: dict[str, Named],
        rows: Named,
        training: bool = False,
    ) -> Array:
        """Return the weighted loss of each example, float32 [rows].

        Args:
            params, frozen: see ``select_arrays``.
            rows: a micro-batch; where text encoders are trained, it has token ids in place of text
                features; with ``dropout_keys``, elements are dropped.
            training: with DREAM and gradient checkpointing, where the recipe has them.
        """
        x0, noise = rows["x0"], rows["noise"]

        def column(name: str) -> Array:
            return rows[name].reshape(-1, *[1] * (x0.ndim - 1))

        x = column("signal_in") * x0 + column("noise_in") * rows.get("input_noise", noise)
        target = column("signal_target") * x0 + column("noise_target") * noise
        dropout_keys = rows.get("dropout_keys")
        if len(self.components) > 1:
            encoders = TrainableTextEncoders(self, params, frozen, dropout_keys)
            features = encode_captions(self.family.text, encoders, rows)
            rows = rows | (zero_dropped(features, rows["keep"]) if "keep" in rows else features)
        name = self.family.network.component
        net = self.select_arrays(params, frozen, name, dropout_keys)
        called = self.family.network

        def predict(x: Array) -> Array:
            output = unet(
                net,
                self.base.configs[name],
                called.enter(x.astype(self.half or jnp.float32), rows["timestep"], rows),
                remat=training and self.config.engine.gradient_checkpointing,
                kernel=self.kernel,
            )
            return called.leave(output, x).astype(jnp.float32)

        # Algorithm 1 of arXiv:2312.00210; the validation loss is without it.
        if self.config.objective.dream is not None and training:
            delta = jax.lax.stop_gradient((target - predict(x)) * column("dream"))
            x = x + column("noise_in") * delta
            target = target + delta
        return rows["weight"] * jnp.square(predict(x) - target).reshape(len(x), -1).mean(1)


class TrainableTextEncoders(JaxFeatures):
    """Text encoders that are trained, as ``protocols.TextEncoders``."""

    def __init__(
        self,
        model: TrainedModel,
        params: Named,
        frozen: dict[str, Named],
        dropout_keys: Array | None,
    ):
        self.model = model
        self.params = params
        self.frozen = frozen
        self.dropout_keys = dropout_keys

    def encode_text(self, name: str, ids: Array, skip: int = 0) -> tuple[Array, Array]:
        """See ``protocols.TextEncoders``."""
        base = self.model.base
        return clip.encode_text(
            self.model.select_arrays(self.params, self.frozen, name, self.dropout_keys),
            base.configs[name],
            ids,
            skip,
            has_projection(base, name),
            self.model.half or jnp.float32,
        )
