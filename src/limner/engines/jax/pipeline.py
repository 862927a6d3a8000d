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

from limner import rng
from limner.base_model.base import BaseModel
from limner.base_model.open import open_base, read_pipeline_class
from limner.config.schema import ModelSettings
from limner.diffusion import samplers
from limner.diffusion.samplers import SAMPLERS
from limner.engines.jax.attention import Array, Kernel, choose_kernel
from limner.engines.jax.encoders import JaxEncoders
from limner.engines.jax.nn import Params
from limner.engines.jax.processes import choose_devices, local_device
from limner.engines.jax.unet import unet
from limner.engines.jax.weights import read_component
from limner.errors import InputError
from limner.families import FAMILIES, find_pipeline_family
from limner.families.family import Family
from limner.families.text import encode_captions, tokenize
from limner.protocols import ModelSource
from limner.storage.layout import LORA_FILE

GUIDANCE = {"sd": 7.5, "sdxl": 5.0}  # of the stock pipelines
HALF = {"fp16": jnp.float16, "bf16": jnp.bfloat16}


@dataclass
class Pipeline:
    """What draws: a base, and the networks that are not as in it.

    Args:
        nets: components whose arrays are others than the base's, among them the trained network.
        half: the type that the UNet computes in; None: float32.
    """

    base: BaseModel
    family: Family
    encoders: JaxEncoders
    nets: dict[str, Params]
    prediction_type: str
    half: Any = None
    scheduler: str | None = None  # None: the base's own
    kernel: Kernel | None = None  # of attention
    compiled: dict[Any, Any] = field(default_factory=dict)

    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``protocols.TextEncoders``: with the text encoders that have learned, where some
        have."""
        return self.encoders.encode_text(name, ids, skip, self.nets.get(name))

    def concat_features(self, arrays: list[np.ndarray]) -> np.ndarray:
        """See ``protocols.TextEncoders``."""
        return self.encoders.concat_features(arrays)

    def text_features(self, prompts: Sequence[str], given: bool) -> dict[str, np.ndarray]:
        """What the network is told of prompts; zeros for a negative prompt that is not given, where
        the base says so."""
        found = encode_captions(
            self.family, self, tokenize(self.family, self.encoders, list(prompts), 1)
        )
        return (
            found
            if given or not self.family.zeros_for_empty_prompt(self.base.configs)
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
            features = self.text_features(part, True)
            if scale > 1:
                against = self.text_features([negative or ""] * len(part), negative is not None)
                features = {
                    name: np.concatenate([against[name], array]) for name, array in features.items()
                }
            made = self.denoise(noise, features, steps, scale, side * factor)
            pixels = self.encoders.decode(
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
        table = samplers.make_table(
            self.base.configs["scheduler"], steps, self.scheduler, self.prediction_type
        )
        net, known, kind = (
            self.nets[self.family.trained_component],
            self.base.configs[self.family.trained_component],
            self.half or jnp.float32,
        )
        told_of = features | {
            "size_and_crop": np.tile(
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
            self.compiled[net.scale] = jax.jit(partial(sample, **how), static_argnames=("guided",))
        with jax.default_matmul_precision("highest" if self.half is None else None):
            made = self.compiled[net.scale](
                net.arrays,
                table.timesteps,
                table.coefficients,
                noise,
                told_of,
                np.float32(guidance),
                guided=guidance > 1,
            )
        return np.asarray(made, np.float32)


def sample(
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
    inputs = family.network_inputs(features)

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


def latent_side(base: BaseModel, size: int | None) -> int:
    """Latents a side of pictures of ``size`` pixels; None: the model's own.

    Raises:
        InputError: when latents cannot have that side.
    """
    factor, own = (
        2 ** (len(base.configs["vae"]["block_out_channels"]) - 1),
        base.configs["unet"].get("sample_size"),
    )
    if size is None and not isinstance(own, int):
        raise InputError(
            f"size: the model's own is not said (sample_size is {own}); give one, a multiple of "
            f"{factor} pixels"
        )
    pixels = size if size is not None else int(own or 0) * factor
    if pixels < factor or pixels % factor:
        raise InputError(
            f"size: {pixels} pixels are no multiple of {factor}; choose "
            f"{max(1, round(pixels / factor)) * factor}"
        )
    return pixels // factor


def open_pipeline(
    found: ModelSource,
    other_stage: ModelSource | None,
    *,
    scheduler: str | None,
    precision: str,
    device: str | None,
) -> Pipeline:
    """A pipeline ready to draw, from a diffusers folder or a Hub repository, with a LoRA on it
    where there is one.

    Raises:
        InputError: for a scheduler or a model that there is no code for.
    """
    if scheduler is not None and scheduler not in SAMPLERS:
        raise InputError(
            f"scheduler: {scheduler!r} has no table in JAX; it has {', '.join(SAMPLERS)}"
        )
    choose_devices(device)
    family = read_family(found)
    model = ModelSettings(
        found.model,
        family.name,
        revision=found.revision,
        variant=found.variant,
        cache_dir=found.cache_dir,
    )
    base, half = open_base(model, family), HALF.get(precision)
    parts = JaxEncoders(base)
    nets = {
        family.trained_component: Params(
            to_device(read_component(base, family.trained_component), half)
        )
    }
    if found.lora is not None:
        nets = apply_lora(base, family, nets, found, half)
    return Pipeline(
        base,
        family,
        parts,
        nets,
        base.configs["scheduler"].get("prediction_type", "epsilon"),
        half,
        scheduler,
        choose_kernel(local_device()),
    )


def read_family(found: ModelSource) -> Family:
    """The family of a model's index.

    Raises:
        InputError: when the JAX engine does not draw with it.
    """
    kind = read_pipeline_class(found).removeprefix(
        "Flax"
    )  # old bases are turned into plain ones when they are opened
    family = find_pipeline_family(kind)
    if family is None:
        raise InputError(
            f"{found.model} is of a {kind}; the JAX engine draws with "
            f"{', '.join(f.pipeline for f in FAMILIES.values() if f.stage is None)}"
        )
    return family


def to_device(arrays: dict[str, np.ndarray], half: Any) -> dict[str, Array]:
    """Arrays on the first device, in the type that is computed in."""
    return {
        name: jax.device_put(array.astype(half or np.float32), local_device())
        for name, array in arrays.items()
    }


def apply_lora(
    base: BaseModel, family: Family, nets: dict[str, Params], found: ModelSource, half: Any
) -> dict[str, Params]:
    """The networks with the low-rank additions of a file, whose header says their rank and alpha.

    Raises:
        InputError: for a file that is damaged, of another model, or of a kind of adapter that there
            is no code for.
    """
    from safetensors import SafetensorError, safe_open

    assert found.lora is not None
    where = found.lora / LORA_FILE
    try:
        with safe_open(where, "np") as file:
            said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            arrays = {to_lora_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"{where}: not a whole safetensors file ({error}). Fetch or copy it again."
        ) from error
    if more := [
        name
        for name, value in said.items()
        if value
        and name.rpartition(".")[2] in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    ]:
        raise InputError(
            f"{where}: it has {more[0]}, which the JAX engine has no code for. Use --engine torch."
        )
    components = dict.fromkeys(name.partition(".")[0] for name in arrays)
    if strange := [name for name in components if name not in family.lora_targets]:
        raise InputError(
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
            else to_device(read_component(base, component), half)
        )
        if lost := [
            name for name, array in own.items() if not is_adapter_of(name, array, own, before)
        ]:
            expected = (
                "low-rank additions to linear layers of it are expected. Was it trained on another "
                "model, or is it of another kind?"
            )
            raise InputError(
                f"{where}: {len(lost)} arrays have no place in the {component} "
                f"({', '.join(lost[:3])}); {expected}"
            )
        rank = said.get(f"{component}.r") or next(
            array.shape[0] for name, array in own.items() if name.endswith("lora_A.weight")
        )
        scale = said.get(f"{component}.lora_alpha", rank) / rank
        nets[component] = Params({**before, **to_device(own, half)}, scale=scale)
    return nets


def to_lora_name(name: str) -> str:
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


def is_adapter_of(
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
