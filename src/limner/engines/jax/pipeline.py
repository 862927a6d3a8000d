"""Pictures in JAX: prompts encoded, one scan over the table of a sampler, and the autoencoder in
float32; the same seed gives the same picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limner import config, rng, sampler
from limner.base import Base, kind_of, open_base
from limner.engine import Weights
from limner.engines.jax import weights
from limner.engines.jax.attention import Kernel, fused
from limner.engines.jax.nn import Array, Params
from limner.engines.jax.parts import JaxParts
from limner.engines.jax.unet import unet
from limner.engines.jax.world import choose, here
from limner.families import FAMILIES, drawn_by
from limner.family import Family, tokenize, told
from limner.faults import InputFault
from limner.snapshot import LORA

GUIDANCE = {"sd": 7.5, "sdxl": 5.0}  # of the stock pipelines
HALF = {"fp16": jnp.float16, "bf16": jnp.bfloat16}


@dataclass
class Pipeline:
    """What draws: a base, and the networks that are not as in it.

    Args:
        nets: components whose arrays are others than the base's, among them the trained network.
        half: the type that the UNet computes in; None: float32.
    """

    base: Base
    family: Family
    parts: JaxParts
    nets: dict[str, Params]
    predict: str
    half: Any = None
    scheduler: str | None = None  # None: the base's own
    kernel: Kernel | None = None  # of attention
    compiled: dict[Any, Any] = field(default_factory=dict)

    def text(self, name: str, ids: np.ndarray, skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """See ``family.Encoders``: with the text encoders that have learned, where some have."""
        return self.parts.text(name, ids, skip, self.nets.get(name))

    def beside(self, arrays: list[np.ndarray]) -> np.ndarray:
        """See ``family.Encoders``."""
        return self.parts.beside(arrays)

    def features(self, prompts: Sequence[str], given: bool) -> dict[str, np.ndarray]:
        """What the network is told of prompts; zeros for a negative prompt that is not given, where
        the base says so."""
        found = told(self.family, self, tokenize(self.family, self.parts, list(prompts), 1))
        return (
            found
            if given or not self.family.empty_is_zeros(self.base.configs)
            else {name: np.zeros_like(array) for name, array in found.items()}
        )

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float | None,
        size: int | None,
        negative: str | None = None,
        batch: int = 4,
        latents: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """One picture per prompt and seed, uint8 [size, size, 3].

        Args:
            size: pixels a side; None: the model's own.
            latents: the starting noise, standard normal [n, channels, h, w]; None: addressed by
                each seed, the same for every device and batch size.
        """
        factor = 2 ** (len(self.base.configs["vae"]["block_out_channels"]) - 1)
        side = latent_side(self.base, size)
        scale = GUIDANCE[self.family.name] if guidance_scale is None else guidance_scale
        shape = (self.base.configs["unet"].get("in_channels", 4), side, side)
        pictures: list[np.ndarray] = []
        for first in range(0, len(prompts), batch):
            part, chosen = list(prompts[first : first + batch]), seeds[first : first + batch]
            noise = (
                latents[first : first + batch]
                if latents is not None
                else np.stack(
                    [rng.at(s, "picture", 0).standard_normal(shape, np.float32) for s in chosen]
                )
            )
            short = batch - len(part) if len(prompts) > batch else 0  # one shape is compiled once
            part, noise = (
                part + part[-1:] * short,
                np.concatenate([noise, noise[-1:].repeat(short, axis=0)]),
            )
            features = self.features(part, True)
            if scale > 1:
                against = self.features([negative or ""] * len(part), negative is not None)
                features = {
                    name: np.concatenate([against[name], array]) for name, array in features.items()
                }
            made = self.denoise(noise, features, steps, scale, side * factor)
            pixels = self.parts.decode(
                "vae", made / np.float32(self.base.configs["vae"].get("scaling_factor", 0.18215))
            )
            shown = np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
            pictures += [
                (picture * 255).round().astype(np.uint8) for picture in shown[: len(part) - short]
            ]
        return pictures

    def denoise(
        self,
        noise: np.ndarray,
        features: dict[str, np.ndarray],
        steps: int,
        guidance: float,
        size: int,
    ) -> np.ndarray:
        """Clean latents, float32 [n, channels, h, w], of standard normal noise; ``features`` of
        negative prompts come before those of prompts."""
        table = sampler.table(self.base.configs["scheduler"], steps, self.scheduler, self.predict)
        net, known, kind = (
            self.nets[self.family.trains],
            self.base.configs[self.family.trains],
            self.half or jnp.float32,
        )
        told_of = features | {
            "cut": np.tile(
                np.array([size, size, 0, 0, size, size], np.float32),
                (len(next(iter(features.values()))), 1),
            )
        }
        if net.scale not in self.compiled:
            how = {
                "config": known,
                "scale": net.scale,
                "family": self.family,
                "kind": kind,
                "kernel": self.kernel,
            }
            self.compiled[net.scale] = jax.jit(partial(sampled, **how), static_argnames=("guided",))
        with jax.default_matmul_precision("highest" if self.half is None else None):
            made = self.compiled[net.scale](
                net.arrays,
                table.timesteps,
                table.weights,
                noise,
                told_of,
                np.float32(guidance),
                guided=guidance > 1,
            )
        return np.asarray(made, np.float32)


def sampled(
    arrays: dict[str, Array],
    timesteps: Array,
    weights: Array,
    noise: Array,
    features: dict[str, Array],
    guidance: Array,
    *,
    config: dict[str, Any],
    scale: float,
    family: Family,
    kind: Any,
    guided: bool,
    kernel: Kernel | None,
) -> Array:
    """One scan over a table: each step mixes the noise and what was said so far, and asks the
    network; see ``sampler``."""
    inputs = family.inputs(features)

    def step(said: Array, given: tuple[Array, Array, Array]) -> tuple[Array, None]:
        i, t, row = given
        x = jnp.tensordot(row, said, 1)
        both = jnp.concatenate([x, x]) if guided else x
        out = unet(
            Params(arrays, scale=scale),
            config,
            both.astype(kind),
            jnp.full(len(both), t),
            **inputs,
            kernel=kernel,
        )[:, : x.shape[1]].astype(jnp.float32)
        if guided:  # equation 6 of arXiv:2207.12598
            without, out = jnp.split(out, 2)
            out = without + guidance * (out - without)
        return said.at[i + 1].set(out), None

    begin = jnp.zeros((len(weights), *noise.shape)).at[0].set(noise)
    said, _ = jax.lax.scan(step, begin, (jnp.arange(len(timesteps)), timesteps, weights[:-1]))
    return jnp.tensordot(weights[-1], said, 1)


def latent_side(base: Base, size: int | None) -> int:
    """Latents a side of pictures of ``size`` pixels; None: the model's own.

    Raises:
        InputFault: when latents cannot have that side.
    """
    factor, own = (
        2 ** (len(base.configs["vae"]["block_out_channels"]) - 1),
        base.configs["unet"].get("sample_size"),
    )
    if size is None and not isinstance(own, int):
        raise InputFault(
            f"size: the model's own is not said (sample_size is {own}); give one, a multiple of "
            f"{factor} pixels"
        )
    pixels = size if size is not None else int(own or 0) * factor
    if pixels < factor or pixels % factor:
        raise InputFault(
            f"size: {pixels} pixels are no multiple of {factor}; choose "
            f"{max(1, round(pixels / factor)) * factor}"
        )
    return pixels // factor


def open_pipeline(
    found: Weights,
    partner: Weights | None,
    *,
    scheduler: str | None,
    precision: str,
    device: str | None,
) -> Pipeline:
    """A pipeline ready to draw, from a diffusers folder or a Hub repository, with a LoRA on it
    where there is one.

    Raises:
        InputFault: for a scheduler or a model that there is no code for.
    """
    if scheduler is not None and scheduler not in sampler.SAMPLERS:
        raise InputFault(
            f"scheduler: {scheduler!r} has no table in JAX; it has {', '.join(sampler.SAMPLERS)}"
        )
    choose(device)
    family = family_of_folder(found)
    model = config.Model(
        found.model,
        family.name,
        revision=found.revision,
        variant=found.variant,
        cache_dir=found.cache_dir,
    )
    base, half = open_base(model, family), HALF.get(precision)
    parts = JaxParts(base)
    nets = {family.trains: Params(on_device(weights.read(base, family.trains), half))}
    if found.lora is not None:
        nets = with_lora(base, family, nets, found, half)
    return Pipeline(
        base,
        family,
        parts,
        nets,
        base.configs["scheduler"].get("prediction_type", "epsilon"),
        half,
        scheduler,
        fused(here()),
    )


def family_of_folder(found: Weights) -> Family:
    """The family of a model's index.

    Raises:
        InputFault: when the JAX engine does not draw with it.
    """
    kind = kind_of(found).removeprefix(
        "Flax"
    )  # old bases are turned into plain ones when they are opened
    family = drawn_by(kind)
    if family is None:
        raise InputFault(
            f"{found.model} is of a {kind}; the JAX engine draws with "
            f"{', '.join(f.pipeline for f in FAMILIES.values() if f.stage is None)}"
        )
    return family


def on_device(arrays: dict[str, np.ndarray], half: Any) -> dict[str, Array]:
    """Arrays on the first device, in the type that is computed in."""
    return {
        name: jax.device_put(array.astype(half or np.float32), here())
        for name, array in arrays.items()
    }


def with_lora(
    base: Base, family: Family, nets: dict[str, Params], found: Weights, half: Any
) -> dict[str, Params]:
    """The networks with the low-rank additions of a file, whose header says their rank and alpha.

    Raises:
        InputFault: for a file that is damaged, of another model, or of a kind of adapter that there
            is no code for.
    """
    from safetensors import SafetensorError, safe_open

    assert found.lora is not None
    where = found.lora / LORA
    try:
        with safe_open(where, "np") as file:
            said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            arrays = {plain_lora(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, ValueError) as error:
        raise InputFault(
            f"{where}: not a whole safetensors file ({error}). Fetch or copy it again."
        ) from error
    if more := [
        name
        for name, value in said.items()
        if value
        and name.rpartition(".")[2] in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    ]:
        raise InputFault(
            f"{where}: it has {more[0]}, which the JAX engine has no code for. Use --engine torch."
        )
    components = dict.fromkeys(name.partition(".")[0] for name in arrays)
    if strange := [name for name in components if name not in family.lora]:
        raise InputFault(
            f"{where}: it is for {strange[0]}, which this family has not; was it trained on "
            "another model?"
        )
    for component in components:
        own = {
            name.removeprefix(f"{component}."): array
            for name, array in arrays.items()
            if name.startswith(f"{component}.")
        }
        before = (
            nets[component].arrays
            if component in nets
            else on_device(weights.read(base, component), half)
        )
        if lost := [name for name, array in own.items() if not belongs(name, array, own, before)]:
            expected = (
                "low-rank additions to linear layers of it are expected. Was it trained on another "
                "model, or is it of another kind?"
            )
            raise InputFault(
                f"{where}: {len(lost)} arrays have no place in the {component} "
                f"({', '.join(lost[:3])}); {expected}"
            )
        rank = said.get(f"{component}.r") or next(
            array.shape[0] for name, array in own.items() if name.endswith("lora_A.weight")
        )
        scale = said.get(f"{component}.lora_alpha", rank) / rank
        nets[component] = Params({**before, **on_device(own, half)}, scale=scale)
    return nets


def plain_lora(name: str) -> str:
    """The name of an array of a LoRA as it is written today, of one as diffusers used to write
    it."""
    for old, new in (
        (".lora_linear_layer", ""),
        (".lora.down.", ".lora_A."),
        (".lora.up.", ".lora_B."),
        (".down.weight", ".lora_A.weight"),
        (".up.weight", ".lora_B.weight"),
    ):
        name = name.replace(old, new)
    return name


def belongs(
    name: str, array: np.ndarray, own: dict[str, np.ndarray], before: Mapping[str, Any]
) -> bool:
    """Whether an array is half of a low-rank addition to a linear layer."""
    stem, _, half = name.removesuffix(".weight").rpartition(".")
    weight, pair = (
        before.get(f"{stem}.weight"),
        own.get(f"{stem}.{'lora_B' if half == 'lora_A' else 'lora_A'}.weight"),
    )
    if (
        weight is None
        or weight.ndim != 2
        or half not in ("lora_A", "lora_B")
        or pair is None
        or array.ndim != 2
    ):
        return False
    return bool(
        array.shape[1] == weight.shape[1]
        if half == "lora_A"
        else array.shape == (weight.shape[0], pair.shape[0])
    )
