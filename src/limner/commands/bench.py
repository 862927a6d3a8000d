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

from limner import engines
from limner.base_model.base import INDEX, BaseModel
from limner.base_model.open import open_base
from limner.config import rules
from limner.config.schema import Config, ModelSettings
from limner.diffusion import schedules
from limner.errors import InputError, LimnerError, NonFiniteError
from limner.families import get_family
from limner.families.family import Family
from limner.features.stand_in import make_batch
from limner.protocols import Engine, NonFiniteStep, ProcessGroup
from limner.storage import atomic, safetensors
from limner.storage.layout import WEIGHTS_FILE
from limner.training import batch_plan

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
IMAGE_ENCODER: dict[str, Any] = {
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
    | IMAGE_ENCODER,
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
    | IMAGE_ENCODER,
}


def run_bench(
    config: Config,
    *,
    steps: int = 10,
    json_file: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure ``steps`` steps of a recipe after the warm-up; prints a table, and returns the
    figures that the JSON file has.

    Raises:
        InputError: for a recipe that ``train`` would refuse too, or fewer than one step.
    """
    if steps < 1:
        raise InputError(f"--steps: {steps} is not above 0")
    rules.check_config(config, own_records=True)
    family = get_family(config)
    with (
        contextlib.closing(engines.join_processes(config.engine)) as process,
        open_weights_or_stand_in(config, family, process) as (opened, weights),
    ):
        figures = measure_steps(config, opened, family, process, steps, report) | {
            "weights": weights,
            "base": opened.name,
        }
        if process.rank == 0:
            report(format_table(figures))
            if json_file is not None:
                atomic.write_text(json_file, json.dumps(figures, indent=1) + "\n")
    return figures


def measure_steps(
    config: Config,
    opened: BaseModel,
    family: Family,
    process: ProcessGroup,
    steps: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """The figures of one process; every process sees its share of the global batch."""
    numbers = batch_plan.make_plan(
        config, process.world_size, 1, None, config.train.seed or 0, devices=process.device_count
    )
    engine = engines.open_engine(config, opened, family, process, numbers.micro_batch_size, report)
    profiler = engines.open_profiler(config.engine.kind, engine)
    batch = make_batch(config, opened.configs, family, numbers.batch_size // process.world_size)
    useful = profiler.count_flops(batch, numbers.micro_batch_size)
    state = engine.init_state(numbers.seed)
    marks: list[Any] = []
    metrics: list[Any] = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            wait_for_steps(engine, state, metrics)
            process.barrier()
            marks.append(profiler.mark())
        decay = None if config.optim.ema is None else schedules.ema_decay(step, config.optim.ema)
        state, seen = engine.step(
            state,
            batch,
            step=step,
            learning_rate=config.optim.learning_rate,
            ema=decay,
            seed=numbers.seed,
        )
        metrics.append(seen)
        if step >= WARM_UP:
            marks.append(profiler.mark(seen))
    wait_for_steps(engine, state, metrics)
    seconds = profiler.seconds(marks)
    memory = profiler.peak_memory()
    del state
    reached, peak, published = (
        useful / float(np.median(seconds)) / process.device_count,
        profiler.measure_matmul(),
        profiler.published_peak(),
    )
    return {
        **profiler.describe_machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processes": process.world_size,
        "batch": numbers.batch_size,
        "micro": numbers.micro_batch_size,
        "accumulate": numbers.accumulation_steps,
        "size": config.data.size,
        "kind": config.adapter.kind,
        "ema": config.optim.ema is not None,
        "gradient_checkpointing": config.engine.gradient_checkpointing,
        "attention": config.engine.attention,
        "measured_steps": steps,
        "warm_up_steps": WARM_UP,
        "step_seconds": {
            "median": float(np.median(seconds)),
            "p10": float(np.percentile(seconds, 10)),
            "p90": float(np.percentile(seconds, 90)),
        },
        "images_per_second": numbers.batch_size / float(np.median(seconds)),
        "peak_memory": memory,
        "tflop_per_step": useful * process.world_size / 1e12,
        "tflops_per_device": reached / 1e12,
        "matmul_tflops": peak / 1e12,
        "mfu_of_matmul": reached / peak,
        "published_tflops": published and published / 1e12,
        "mfu_of_published": published and reached / published,
    }


def wait_for_steps(engine: Engine, state: Any, metrics: list[Any]) -> None:
    """Wait for the steps so far; their losses must be numbers, for arithmetic on infinities is not
    what training costs."""
    try:
        engine.fetch_metrics(state, metrics)
    except NonFiniteStep as fault:
        raise NonFiniteError(
            f"step {fault.step + 1} of the measurement has no finite loss, with random latents. "
            "Measure in engine.precision=bf16 or no."
        ) from None


@contextlib.contextmanager
def open_weights_or_stand_in(
    config: Config, family: Family, process: ProcessGroup
) -> Iterator[tuple[BaseModel, str]]:
    """The recipe's base where it is a folder or in the Hub's cache; else random weights of full
    size, on disk while the block lasts. And what to call it."""
    model = config.model
    if (folder := process.first(lambda: find_local_base(model, family))) is not None:
        yield open_local_base(model, family, folder), "the base's own"
        return
    if family.name not in STAND_INS:
        unknown = f"and bench knows no published config of family {family.name!r}"
        raise InputError(
            f"model.base: {model.base} is not at hand, {unknown}. Give a folder in the diffusers "
            "layout."
        )
    if config.adapter.text_encoders:
        why = "and its text encoders, which learn, have no stand-in"
        raise InputError(
            f"model.base: {model.base} is not at hand, {why}. Give a folder in the diffusers "
            "layout."
        )
    configs = STAND_INS[family.name]
    path = Path(process.first(lambda: tempfile.mkdtemp(prefix="limner-bench-")))
    try:
        process.first(
            lambda: write_random_component(
                path / family.trained_component,
                configs[family.trained_component],
                config.engine.kind,
            )
        )
        yield (
            BaseModel(
                path,
                {},
                family.trained_component,
                configs["model_index"]["_name"],
                None,
                None,
                configs,
            ),
            "random",
        )
    finally:
        if process.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def find_local_base(model: ModelSettings, family: Family) -> str | None:
    """The base's folder: the one that is named, or a whole one in the Hub's cache; None where
    neither is there."""
    if family.stage is not None and not all(
        Path(place).exists()
        for place in (model.base, *([model.other_stage] if model.other_stage else []))
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
        open_local_base(model, family, folder)
    except (LimnerError, ValueError):  # a part of it, or no name of the Hub's
        return None
    return folder


def open_local_base(model: ModelSettings, family: Family, folder: str) -> BaseModel:
    """The recipe's base where it lies."""
    return open_base(
        ModelSettings(
            base=folder, family=model.family, variant=model.variant, other_stage=model.other_stage
        ),
        family,
        draws=False,
    )


def write_random_component(part: Path, known: dict[str, Any], kind: str = "torch") -> None:
    """A component's folder: its config, and weights drawn as PyTorch draws them for new layers, one
    array at a time in memory."""
    shapes = engines.parameter_shapes(kind, known)
    with atomic.disk_errors(part):
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(known))
        drawn: dict[str, Any] = {n: RandomArray(n, s, i) for i, (n, s) in enumerate(shapes.items())}
        safetensors.write_arrays(part / WEIGHTS_FILE, drawn)


@dataclass(frozen=True)
class RandomArray:
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


def format_table(f: dict[str, Any]) -> str:
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
