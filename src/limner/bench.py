"""What a step of a recipe costs: time, memory and useful arithmetic, measured on stand-in features
so that only the trained network is loaded."""

import contextlib
import datetime
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner import base, checkpoint, config, durable, engines, plan, rng, schedule
from limner.base import INDEX, Base
from limner.engine import Batch, Engine, FirstFault, World
from limner.families import family_of
from limner.family import Configs, Family, Features, tokenize, told
from limner.faults import Fault, InputFault, NonFinite
from limner.objective import Objective
from limner.snapshot import WEIGHTS

WARM_UP = 2  # steps before the first that counts
BLOCKS = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
NOISE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
EYE: dict[str, Any] = {
    "image_encoder": {"image_size": 224, "projection_dim": 1280},
    "image_processor": {},
}
# Published configs, cut to what shapes depend on; the trained networks have 859,520,964,
# 2,567,463,684, 1,026,225,920 and 1,253,057,288 parameters.
STAND_INS: dict[str, dict[str, Any]] = {
    "sd": {
        "model_index": {
            "_class_name": "StableDiffusionPipeline",
            "_name": "Stable Diffusion 1.5",
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": BLOCKS,
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        },
        "vae": {
            "latent_channels": 4,
            "block_out_channels": [128, 256, 512, 512],
            "scaling_factor": 0.18215,
        },
        "text_encoder": {"hidden_size": 768, "max_position_embeddings": 77},
        "tokenizer": {"model_max_length": 77},
        "scheduler": NOISE,
    },
    "sdxl": {
        "model_index": {
            "_class_name": "StableDiffusionXLPipeline",
            "_name": "Stable Diffusion XL 1.0",
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        },
        "vae": {
            "latent_channels": 4,
            "block_out_channels": [128, 256, 512, 512],
            "scaling_factor": 0.13025,
        },
        "text_encoder": {"hidden_size": 768, "max_position_embeddings": 77},
        "tokenizer": {"model_max_length": 77},
        "text_encoder_2": {
            "hidden_size": 1280,
            "projection_dim": 1280,
            "max_position_embeddings": 77,
        },
        "tokenizer_2": {"model_max_length": 77},
        "scheduler": NOISE,
    },
    "kandinsky22-prior": {
        "model_index": {
            "_class_name": "KandinskyV22PriorPipeline",
            "_name": "Kandinsky 2.2 prior",
            "prior": ["diffusers", "PriorTransformer"],
        },
        "prior": {
            "_class_name": "PriorTransformer",
            "num_attention_heads": 32,
            "attention_head_dim": 64,
            "num_layers": 20,
            "embedding_dim": 1280,
            "num_embeddings": 77,
            "additional_embeddings": 4,
        },
        "text_encoder": {
            "hidden_size": 1280,
            "projection_dim": 1280,
            "max_position_embeddings": 77,
        },
        "tokenizer": {"model_max_length": 77},
        "scheduler": {"_class_name": "UnCLIPScheduler", "prediction_type": "sample"},
        "fixed": {"clip_mean": [[0.0] * 1280], "clip_std": [[1.0] * 1280]},
    }
    | EYE,
    "kandinsky22-decoder": {
        "model_index": {
            "_class_name": "KandinskyV22Pipeline",
            "_name": "Kandinsky 2.2 decoder",
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 8,
            "block_out_channels": [384, 768, 1152, 1536],
            "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
            "layers_per_block": 3,
            "attention_head_dim": 64,
            "cross_attention_dim": 768,
            "encoder_hid_dim": 1280,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image",
            "resnet_time_scale_shift": "scale_shift",
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "act_fn": "silu",
        },
        "movq": {"latent_channels": 4, "block_out_channels": [128, 256, 256, 512]},
        "scheduler": {
            "_class_name": "DDPMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
        },
    }
    | EYE,
}


def run(
    cfg: config.Config,
    *,
    steps: int = 10,
    json_file: Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure ``steps`` steps of a recipe after the warm-up; prints a table, and returns the
    figures that the JSON file has.

    Raises:
        InputFault: for a recipe that ``train`` would refuse too, or fewer than one step.
    """
    if steps < 1:
        raise InputFault(f"--steps: {steps} is not above 0")
    cfg.check(own_records=True)
    family = family_of(cfg)
    with (
        contextlib.closing(engines.join(cfg.engine)) as process,
        open_weights(cfg, family, process) as (opened, weights),
    ):
        figures = measure(cfg, opened, family, process, steps, tell) | {
            "weights": weights,
            "base": opened.name,
        }
        if process.rank == 0:
            tell(table(figures))
            if json_file is not None:
                durable.write_text(json_file, json.dumps(figures, indent=1) + "\n")
    return figures


def measure(
    cfg: config.Config,
    opened: Base,
    family: Family,
    process: World,
    steps: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The figures of one process; every process sees its share of the global batch."""
    numbers = plan.make(cfg, process.world, 1, None, cfg.train.seed or 0, devices=process.devices)
    engine = engines.open_engine(cfg, opened, family, process, numbers.micro, tell)
    gauge = engines.open_gauge(cfg.engine.kind, engine)
    batch = stand_in(cfg, opened.configs, family, numbers.batch // process.world)
    useful = gauge.flops(batch, numbers.micro)
    state = engine.init(numbers.seed)
    stamps: list[Any] = []
    metrics: list[Any] = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            fetch(engine, state, metrics)
            process.barrier()
            stamps.append(gauge.stamp())
        decay = None if cfg.optim.ema is None else schedule.ema_decay(step, cfg.optim.ema)
        state, seen = engine.step(
            state,
            batch,
            step=step,
            learning_rate=cfg.optim.learning_rate,
            ema=decay,
            seed=numbers.seed,
        )
        metrics.append(seen)
        if step >= WARM_UP:
            stamps.append(gauge.stamp(seen))
    fetch(engine, state, metrics)
    seconds = gauge.seconds(stamps)
    memory = gauge.memory()
    del state
    reached, peak, published = (
        useful / float(np.median(seconds)) / process.devices,
        gauge.matmul(),
        gauge.published(),
    )
    return {
        **gauge.machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processes": process.world,
        "batch": numbers.batch,
        "micro": numbers.micro,
        "accumulate": numbers.accumulate,
        "size": cfg.data.size,
        "kind": cfg.adapt.kind,
        "ema": cfg.optim.ema is not None,
        "gradient_checkpointing": cfg.engine.gradient_checkpointing,
        "attention": cfg.engine.attention,
        "measured_steps": steps,
        "warm_up_steps": WARM_UP,
        "step_seconds": {
            "median": float(np.median(seconds)),
            "p10": float(np.percentile(seconds, 10)),
            "p90": float(np.percentile(seconds, 90)),
        },
        "images_per_second": numbers.batch / float(np.median(seconds)),
        "peak_memory": memory,
        "tflop_per_step": useful * process.world / 1e12,
        "tflops_per_device": reached / 1e12,
        "matmul_tflops": peak / 1e12,
        "mfu_of_matmul": reached / peak,
        "published_tflops": published and published / 1e12,
        "mfu_of_published": published and reached / published,
    }


def fetch(engine: Engine, state: Any, metrics: list[Any]) -> None:
    """Wait for the steps so far; their losses must be numbers, for arithmetic on infinities is not
    what training costs."""
    try:
        engine.fetch(state, metrics)
    except FirstFault as fault:
        raise NonFinite(
            f"step {fault.step + 1} of the measurement has no finite loss, with random latents. "
            "Measure in engine.precision=bf16 or no."
        ) from None


class Shapes:
    """The frozen encoders' place, taken by random numbers of the shapes that their configs
    promise."""

    def __init__(self, configs: Configs):
        self.configs, self.draws = configs, rng.at(0, "bench", 0)

    def vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``family.Parts``."""
        mean = self.movq(name, pixels) / np.float32(
            self.configs[name].get("scaling_factor", 0.18215)
        )
        return mean, np.zeros_like(mean)

    def text(self, name: str, ids: np.ndarray, skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """See ``family.Encoders``."""
        known = self.configs[name]
        width = known.get("projection_dim") or known["hidden_size"]
        return self.draws.standard_normal(
            (*ids.shape, known["hidden_size"]), np.float32
        ), self.draws.standard_normal((len(ids), width), np.float32)

    def beside(self, arrays: list[np.ndarray]) -> np.ndarray:
        """See ``family.Encoders``."""
        return np.concatenate(arrays, axis=-1)

    def movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """See ``family.Parts``."""
        known = self.configs[name]
        sides = (side >> (len(known["block_out_channels"]) - 1) for side in pixels.shape[2:])
        return self.draws.standard_normal(
            (len(pixels), known["latent_channels"], *sides), np.float32
        )

    def see(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """See ``family.Parts``."""
        return self.draws.standard_normal(
            (len(pixels), self.configs[name]["projection_dim"]), np.float32
        )

    def tokens(self, tokenizer: str, captions: list[str], chunks: int) -> np.ndarray:
        """See ``family.Parts``."""
        return np.ones((len(captions), chunks, self.limit(tokenizer)), np.int64)

    def lengths(self, tokenizer: str, captions: list[str]) -> list[int]:
        """See ``family.Parts``."""
        return [self.limit(tokenizer)] * len(captions)

    def limit(self, tokenizer: str) -> int:
        """See ``family.Parts``."""
        return min(self.configs[tokenizer].get("model_max_length") or 77, 77)


def stand_in(cfg: config.Config, configs: Configs, family: Family, rows: int) -> Batch:
    """A batch of random features, of the shapes that the recipe's pictures and captions would
    have."""
    parts, draws = Shapes(configs), rng.at(0, "bench", 1)
    features = picture_features(family, parts, rows, (cfg.data.size, cfg.data.size))
    x0 = family.clean(features, configs, np.zeros_like(features[family.latent[0]]))
    noising = vars(Objective.of(configs["scheduler"], cfg.objective).at(draws.random(rows)))
    kept = {name: array for name, array in features.items() if name not in family.latent}
    tokens = tokenize(family, parts, [""] * rows, cfg.data.chunks) if family.captions else {}
    texts = tokens if cfg.adapt.text_encoders else told(family, parts, tokens)
    return {
        "x0": x0,
        "noise": draws.standard_normal(x0.shape, np.float32),
        **noising,
        "cut": np.full((rows, 6), cfg.data.size, np.float32),
        **kept,
        **texts,
    }


def picture_features(family: Family, parts: Shapes, rows: int, shape: tuple[int, int]) -> Features:
    """Random image features of pictures that are cut to ``shape`` (height, width)."""
    side = family.eye(parts.configs)
    shapes = {"cut": shape, "whole": (side, side)}
    return family.image(
        parts, *(np.zeros((rows, 3, *shapes[view]), np.float32) for view in family.views)
    )


@contextlib.contextmanager
def open_weights(cfg: config.Config, family: Family, process: World) -> Iterator[tuple[Base, str]]:
    """The recipe's base where it is a folder or in the Hub's cache; else random weights of full
    size, on disk while the block lasts. And what to call it."""
    model = cfg.model
    if (folder := process.first(lambda: at_hand(model, family))) is not None:
        yield open_local(model, family, folder), "the base's own"
        return
    if family.name not in STAND_INS:
        unknown = f"and bench knows no published config of family {family.name!r}"
        raise InputFault(
            f"model.base: {model.base} is not at hand, {unknown}. Give a folder in the diffusers "
            "layout."
        )
    if cfg.adapt.text_encoders:
        why = "and its text encoders, which learn, have no stand-in"
        raise InputFault(
            f"model.base: {model.base} is not at hand, {why}. Give a folder in the diffusers "
            "layout."
        )
    configs = STAND_INS[family.name]
    path = Path(process.first(lambda: tempfile.mkdtemp(prefix="limner-bench-")))
    try:
        process.first(
            lambda: write_random(path / family.trains, configs[family.trains], cfg.engine.kind)
        )
        yield (
            Base(path, {}, family.trains, configs["model_index"]["_name"], None, None, configs),
            "random",
        )
    finally:
        if process.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def at_hand(model: config.Model, family: Family) -> str | None:
    """The base's folder: the one that is named, or a whole one in the Hub's cache; None where
    neither is there."""
    if family.stage is not None and not all(
        Path(place).exists() for place in (model.base, *([model.partner] if model.partner else []))
    ):
        return None
    if Path(model.base).exists():
        return model.base
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(
            model.base, INDEX, cache_dir=model.cache_dir, revision=model.revision
        )
        if not isinstance(found, str) or model.trained_revision is not None:
            return None
        folder = str(Path(found).parent)
        open_local(model, family, folder)
    except (Fault, ValueError):  # a part of it, or no name of the Hub's
        return None
    return folder


def open_local(model: config.Model, family: Family, folder: str) -> Base:
    """The recipe's base where it lies."""
    return base.open_base(
        config.Model(
            base=folder, family=model.family, variant=model.variant, partner=model.partner
        ),
        family,
        draws=False,
    )


def write_random(part: Path, known: dict[str, Any], kind: str = "torch") -> None:
    """A component's folder: its config, and weights drawn as PyTorch draws them for new layers, one
    array at a time in memory."""
    shapes = engines.shapes(kind, known)
    with durable.disk_errors(part):
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(known))
        drawn: dict[str, Any] = {n: Drawn(n, s, i) for i, (n, s) in enumerate(shapes.items())}
        checkpoint.write_arrays(part / WEIGHTS, drawn)


@dataclass(frozen=True)
class Drawn:
    """An array that is drawn when it is written: uniform within 1 / sqrt(inputs), as PyTorch starts
    its layers; norms start as the identity."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype = np.dtype(np.float32)
    itemsize = 4

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if len(self.shape) == 1:
            return np.full(self.shape, float(self.name.endswith(".weight")), np.float32)
        numbers = np.random.Generator(np.random.SFC64(self.seed)).random(self.shape, np.float32)
        numbers -= np.float32(0.5)
        numbers *= np.float32(2 / math.sqrt(math.prod(self.shape[1:])))
        return numbers


def table(f: dict[str, Any]) -> str:
    """The figures for a reader."""
    where = (
        f"{f['device']}, {f['processes']} process{'es' * (f['processes'] > 1)}, "
        f"{f['precision']}, {f['versions']}, {f['date']}"
    )
    on = [
        name
        for name, there in (
            ("EMA", f["ema"]),
            ("gradient checkpointing", f["gradient_checkpointing"]),
            (f"{f['attention']} attention", True),
        )
        if there
    ]
    t = f["step_seconds"]
    rows = [
        (
            "recipe",
            f"{f['kind']}, {f['size']} pixels, batch {f['batch']} = {f['processes']} x "
            f"{f['accumulate']} x {f['micro']}, {', '.join(on)}",
        ),
        (
            "weights",
            f"random, made for this measurement: {f['base']} (the recipe's base is not at hand)"
            if f["weights"] == "random"
            else f["base"],
        ),
        ("where", where),
        (
            "step time",
            f"median {t['median']:.4g} s, p10 {t['p10']:.4g} s, p90 {t['p90']:.4g} s "
            f"({f['measured_steps']} steps after {f['warm_up_steps']})",
        ),
        ("images/s", f"{f['images_per_second']:.4g}"),
        (
            "peak memory",
            ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in f["peak_memory"].items()),
        ),
        (
            "arithmetic",
            f"{f['tflop_per_step']:.4g} TFLOP a step, {f['tflops_per_device']:.4g} TFLOP/s a "
            "device (nothing recomputed is counted)",
        ),
        (
            "MFU",
            f"{f['mfu_of_matmul']:.1%} of {f['matmul_tflops']:.4g} TFLOP/s, a large matrix "
            "product measured in this run",
        ),
    ]
    if f["published_tflops"]:
        rows.append(
            (
                "",
                f"{f['mfu_of_published']:.1%} of {f['published_tflops']:.4g} TFLOP/s, the "
                "published dense peak",
            )
        )
    return "\n".join(f"{name:<12}{text}" for name, text in rows)
