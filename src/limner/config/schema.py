"""All settings of a run. Each is declared once, with all that is known of it."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from limner.config.declare import (
    ABOVE_0,
    AT_LEAST_0,
    AVERAGE,
    BELOW_1,
    BOTH_BELOW_1,
    BOUNDS,
    DECAY,
    DOWNLOADS,
    DROPPED,
    GUIDANCE,
    HELD_OUT,
    HUB,
    JAX,
    JAX_CACHE,
    LOGIT_NORMAL,
    LORA,
    MODE,
    ONE_SET,
    PART,
    PATIENCE,
    PIXELS,
    PREVIEWS,
    PROBABILITY,
    PUSH,
    RESTARTS,
    SEED,
    SOME_CAPTIONS,
    TRACKERS,
    WARM_UP,
    Declaration,
    setting,
    up_to,
)


@dataclass(frozen=True)
class ModelSettings:
    """The base that is fine-tuned: a folder or a Hub repository in the diffusers layout."""

    base: str = setting("", "folder, or name on the Hub", path=True, resume="free")
    family: str = setting("sd", "what kind of model it is", on_card=True)
    revision: str | None = setting(
        None, "branch, tag or commit of the Hub repository", resume="free", on_card=True
    )
    trained_revision: str | None = setting(
        None, "revision of the trained component, where it differs", resume="free"
    )
    variant: str | None = setting(
        None, "which weight files of the base, e.g. fp16", resume="free", on_card=True
    )
    other_stage: str | None = setting(
        None,
        "the other model of two stages (a decoder's prior, a prior's decoder): a folder, a run or "
        "a name on the Hub",
        path=True,
        resume="free",
    )
    vae: str | None = setting(
        None,
        "another autoencoder: a folder or a name on the Hub. It runs in engine.precision",
        path=True,
        resume="free",
    )
    cache_dir: str | None = setting(
        None,
        "where downloads are kept; none: the Hub library's own folder",
        path=True,
        resume="free",
    )


@dataclass(frozen=True)
class DataSetSettings:
    """One data set of a mixture."""

    folder: str | None = setting(None, "exactly one of folder and hub", path=True, resume="free")
    hub: str | None = setting(
        None, "name on the Hub, or a path for datasets", path=True, resume="free"
    )
    hub_config: str | None = setting(
        None, "configuration of the data set on the Hub", resume="free", beside=HUB
    )
    hub_revision: str | None = setting(
        None, "branch, tag or commit on the Hub", resume="free", beside=HUB
    )
    hub_files: str | None = setting(
        None, "data_dir of datasets.load_dataset", path=True, resume="free", beside=HUB
    )
    split: str = setting("train", "part of the data set", resume="free")
    image: str = setting("image", "column of the pictures", resume="free", beside=HUB)
    caption: str | None = setting("text", "column of the captions", resume="free")
    repeats: int = setting(1, "how often an epoch sees each record")
    weight: float | None = setting(
        None, "share of the examples, beside the other sets' weights; in all sets or in none"
    )


@dataclass(frozen=True)
class BucketSettings:
    """Sizes of about the same area and different proportions. A picture goes to the one that fits
    it best, and no batch mixes them."""

    step: int = setting(64, "sides are multiples of it", unit="pixels", on_card=True)
    smallest: int | None = setting(
        None, "shortest side; none: half of the resolution", unit="pixels", on_card=True
    )
    largest: int | None = setting(
        None, "longest side; none: twice the resolution", unit="pixels", on_card=True
    )
    upscale: bool = setting(
        True, "whether a picture smaller than its bucket is enlarged, or refused", on_card=True
    )
    resolutions: tuple[int, ...] = setting(
        (),
        "several: a picture goes to the largest that it fills without being enlarged; empty: "
        "data.size",
        unit="pixels",
        on_card=True,
    )


@dataclass(frozen=True)
class DataSettings:
    """Where pictures and captions come from, and how a picture becomes a training example."""

    # Sources are compared by the content of their records when a run is resumed, not by name.
    sets: tuple[DataSetSettings, ...] = setting(
        (), "several data sets in place of folder and hub", resume="free"
    )
    folder: str | None = setting(
        None,
        "exactly one of folder, hub and sets, unless records are passed to limner.train",
        path=True,
        resume="free",
    )
    hub: str | None = setting(
        None, "name on the Hub, or a path for datasets", path=True, resume="free"
    )
    hub_config: str | None = setting(
        None, "configuration of the data set on the Hub", resume="free", beside=HUB
    )
    hub_revision: str | None = setting(
        None, "branch, tag or commit on the Hub", resume="free", beside=HUB
    )
    hub_files: str | None = setting(
        None, "data_dir of datasets.load_dataset", path=True, resume="free", beside=HUB
    )
    cache_dir: str | None = setting(
        None, "where datasets keeps downloads", path=True, resume="free", beside=DOWNLOADS
    )
    split: str = setting("train", "part of the data set", resume="free", beside=ONE_SET)
    image: str = setting("image", "column of the pictures", resume="free", beside=HUB)
    caption: str | None = setting(
        "text",
        "column of the captions; none: there are no captions",
        resume="free",
        needs="captions",
    )
    max_records: int | None = setting(
        None, "train on a random choice of this many records", range=ABOVE_0, on_card=True
    )
    on_bad_record: Literal["refuse", "skip"] = setting(
        "refuse", "what to do about pictures and captions that cannot be used", resume="free"
    )
    max_pixels: int = setting(
        178_956_970,
        "a larger picture is taken for a decompression bomb",
        range=ABOVE_0,
        resume="free",
    )
    size: int = setting(
        512,
        "the shorter side is resized to it, then cropped square; with buckets, the side of the "
        "square of their area",
        unit="pixels",
        range=PIXELS,
        on_card=True,
    )
    buckets: BucketSettings | None = setting(
        None,
        "several proportions; none: all pictures are cropped square",
        needs="spatial latents",
        on_card=True,
    )
    crop: Literal["center", "random"] = setting(
        "center", "where a picture is cropped", needs="spatial latents", on_card=True
    )
    crop_variants: int | None = setting(
        None,
        "random crops per picture; none: a new one each time, which cannot be cached",
        range=up_to(10_000),
        needs="spatial latents",
        on_card=True,
    )
    flip: bool = setting(False, "mirror left to right, half of the time", on_card=True)
    resample: Literal[
        "bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"
    ] = setting("lanczos", "filter by which pictures are resized", on_card=True)
    background: str = setting(
        "white", "what shows through transparent pixels: a colour name or #rrggbb"
    )
    drop_caption: float = setting(
        0.0,
        "probability of an empty caption, per example",
        range=PROBABILITY,
        needs="captions",
        on_card=True,
        beside=SOME_CAPTIONS,
    )
    empty_caption: Literal["base", "zeros", "encoded"] = setting(
        "base",
        "what stands for a dropped caption; base: zeros where the base says so of empty prompts",
        needs="caption chunks",
        on_card=True,
        beside=DROPPED,
    )
    caption_chunks: int = setting(
        1,
        "captions may have so many times 75 tokens, encoded apart and joined; the rest is cut",
        range=up_to(100),
        needs="caption chunks",
        on_card=True,
    )
    cache: str = setting(
        "auto",
        "encoded pictures and captions: auto (a user-wide folder), memory, off, or a folder",
        path=True,
        resume="free",
    )
    cache_dtype: Literal["float32", "float16"] = setting(
        "float32", "features are rounded to it, cached or not"
    )
    threads: int = setting(4, "threads that decode and assemble", range=up_to(1_000), resume="free")


@dataclass(frozen=True)
class TimestepBiasSettings:
    """Draw some timesteps more often than others."""

    strategy: Literal["later", "earlier", "range"] = setting(
        "later", "which part of the timesteps", on_card=True
    )
    multiplier: float = setting(1.0, "how much more often", on_card=True)
    portion: float = setting(
        0.25, "of all timesteps, for later and earlier", on_card=True, beside=PART
    )
    begin: int = setting(0, "first timestep, for range", on_card=True, beside=BOUNDS)
    end: int = setting(1000, "end of the timesteps, for range", on_card=True, beside=BOUNDS)


@dataclass(frozen=True)
class FlowSettings:
    """Noise levels of flow matching, for bases that were trained with it."""

    density: Literal["logit_normal", "mode", "uniform"] = setting(
        "logit_normal", "of the noise levels (arXiv:2403.03206, section 3.1)", on_card=True
    )
    logit_mean: float = setting(
        0.0, "of logit_normal; below 0 means more noise", on_card=True, beside=LOGIT_NORMAL
    )
    logit_std: float = setting(
        1.0, "of logit_normal", range=ABOVE_0, on_card=True, beside=LOGIT_NORMAL
    )
    mode_scale: float = setting(
        1.29, "of mode, -1 to 1.75; above 0 means more of the middle", on_card=True, beside=MODE
    )
    shift: float | None = setting(
        None,
        "towards more noise; none: what the base's scheduler says",
        range=ABOVE_0,
        on_card=True,
    )
    sigmas: Literal["continuous", "table"] = setting(
        "continuous", "all noise levels, or those of diffusers' table", on_card=True
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the network learns to predict, and how the loss is weighted."""

    predict: Literal["epsilon", "v_prediction", "sample"] | None = setting(
        None,
        "prediction type; none: what the base's scheduler says",
        needs="prediction types",
        on_card=True,
    )
    min_snr: float | None = setting(
        None, "gamma of arXiv:2303.09556; 5 is recommended there", range=ABOVE_0, on_card=True
    )
    noise_offset: float = setting(
        0.0,
        "noise that is equal over a channel, added to the noise",
        range=AT_LEAST_0,
        needs="spatial latents",
        on_card=True,
    )
    input_perturbation: float = setting(
        0.0, "arXiv:2301.11706; 0.1 is recommended there", range=AT_LEAST_0, on_card=True
    )
    dream: float | None = setting(
        None,
        "detail preservation of arXiv:2312.00210; 1 is recommended there",
        range=AT_LEAST_0,
        on_card=True,
    )
    timestep_bias: TimestepBiasSettings | None = setting(
        None, "draw some timesteps more often than others", on_card=True
    )
    flow: FlowSettings | None = setting(
        None, "noise levels of flow matching; none: the defaults, of a base that has them"
    )


@dataclass(frozen=True)
class AdapterSettings:
    """Which weights learn: all of them, or low-rank additions (arXiv:2106.09685)."""

    kind: Literal["full", "lora"] = setting("full", "all weights, or a LoRA", on_card=True)
    rank: int = setting(
        4, "rank of the added matrices", range=up_to(16_384), on_card=True, beside=LORA
    )
    alpha: float | None = setting(
        None,
        "the addition is multiplied by alpha / rank; none: equal to rank",
        range=ABOVE_0,
        on_card=True,
        beside=LORA,
    )
    dropout: float = setting(
        0.0,
        "part of an adapter's input that is zeroed while training",
        range=BELOW_1,
        on_card=True,
        beside=LORA,
    )
    targets: tuple[str, ...] = setting(
        (), "module names; empty: the family's own", on_card=True, beside=LORA
    )
    text_encoders: bool = setting(
        False,
        "adapters on the text encoders too; captions are then encoded in every step, never cached",
        needs="trainable text encoders",
        on_card=True,
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate."""

    kind: Literal["adamw", "adamw8bit"] = setting(
        "adamw", "moments in float32, or in 8 bits (arXiv:2110.02861)", on_card=True
    )
    learning_rate: float = setting(
        1e-4, "peak of the schedule", range=ABOVE_0, resume="on request", on_card=True
    )
    schedule: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ] = setting("constant", "shape of the learning rate", resume="on request", on_card=True)
    warmup: int = setting(
        0,
        "linear rise from 0, whatever the accumulation and the number of processes",
        unit="optimizer steps",
        range=AT_LEAST_0,
        resume="on request",
        on_card=True,
        beside=WARM_UP,
    )
    cycles: int = setting(
        1,
        "of cosine_with_restarts",
        range=ABOVE_0,
        resume="on request",
        on_card=True,
        beside=RESTARTS,
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999),
        "decay of the two moments",
        range=BOTH_BELOW_1,
        resume="on request",
        on_card=True,
    )
    weight_decay: float = setting(
        1e-2,
        "decoupled from the gradient (arXiv:1711.05101)",
        range=AT_LEAST_0,
        resume="on request",
        on_card=True,
    )
    eps: float = setting(
        1e-8,
        "added to the root of the second moment",
        range=ABOVE_0,
        resume="on request",
        on_card=True,
    )
    max_grad_norm: float = setting(
        1.0,
        "a longer gradient is shortened to it",
        range=ABOVE_0,
        resume="on request",
        on_card=True,
    )
    ema: float | None = setting(
        None,
        "highest decay of the moving average of the weights; none: no average is kept",
        range=DECAY,
        on_card=True,
    )
    ema_offload: bool = setting(
        False, "keep the average in host memory", resume="free", on_card=True, beside=AVERAGE
    )


@dataclass(frozen=True)
class TrainSettings:
    """How long, and how much at once. The global batch is the unit: processes and accumulation
    divide it."""

    # What these come to, the global batch and the seed, is compared when a run is resumed.
    steps: int | None = setting(
        None,
        "exactly one of steps and epochs",
        unit="optimizer steps",
        range=ABOVE_0,
        resume="free",
        on_card=True,
    )
    epochs: float | None = setting(
        None, "passes over the records", range=up_to(1_000_000), resume="free", on_card=True
    )
    batch_size: int | None = setting(
        None,
        "global: what one optimizer step sees; none: micro_batch_size x accumulation_steps x "
        "processes",
        range=up_to(100_000),
        resume="free",
        on_card=True,
    )
    micro_batch_size: int | None = setting(
        None,
        "what one device holds at once; none: its whole share of the batch",
        range=up_to(100_000),
        resume="free",
        on_card=True,
    )
    accumulation_steps: int | None = setting(
        None,
        "micro-batches per optimizer step; only where batch_size is not given",
        range=up_to(100_000),
        resume="free",
        on_card=True,
    )
    seed: int | None = setting(
        None, "none: one is drawn and stored with the run", range=SEED, resume="free", on_card=True
    )


@dataclass(frozen=True)
class EngineSettings:
    """How the numbers are computed. On the CPU in float32 nothing here changes a result."""

    kind: Literal["torch", "jax"] = setting("torch", "PyTorch or JAX", shared=True)
    precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "none: what the launcher says, else no (float32)", shared=True, on_card=True
    )
    device: str | None = setting(
        None, "none: the accelerator that is found, else the CPU", resume="free", shared=True
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass (arXiv:1604.06174)", resume="free"
    )
    tf32: bool = setting(False, "let products and convolutions of float32 be computed in TF32")
    deterministic: bool = setting(
        False, "on a GPU: only kernels that repeat their bits", resume="free", shared=True
    )
    attention: Literal["sdpa", "math", "xformers"] = setting(
        "sdpa", "math: plain products, faster for small pictures on a CPU", resume="free"
    )
    devices: int | None = setting(
        None,
        "of this process, for JAX; none: all that there are",
        range=ABOVE_0,
        resume="free",
        shared=True,
        beside=JAX,
    )
    fsdp: int = setting(
        1,
        "for JAX: over how many devices weights, gradients, optimizer and average are divided",
        range=ABOVE_0,
        resume="free",
        shared=True,
        beside=JAX,
    )
    compile_cache: str = setting(
        "auto",
        "for JAX, compiled steps: auto (a user-wide folder), off, or a folder",
        path=True,
        resume="free",
        shared=True,
        beside=JAX_CACHE,
    )
    patience: float = setting(
        600.0,
        "that another process may be silent, as when it is suspended, before the run ends; what a "
        "process computes or waits for does not count",
        unit="seconds",
        range=PATIENCE,
        resume="free",
        shared=True,
    )
    encode_batch: int | None = setting(
        None,
        "pictures that the frozen encoders see at once, padded; none: 8, fewer above 512 pixels",
        range=up_to(10_000),
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """When the whole state is saved, and where a run goes on from."""

    every: int = setting(
        500, "between checkpoints", unit="optimizer steps", range=ABOVE_0, resume="free"
    )
    keep: int | None = setting(None, "the newest so many; none: all", range=ABOVE_0, resume="free")
    resume: str = setting(
        "auto",
        "auto and latest: the newest good one; never: refuse a folder that has some; or "
        "checkpoint-N, or a path",
        path=True,
        resume="free",
    )
    allow_changes: tuple[str, ...] = setting(
        (), "settings that may differ from the checkpoint's", resume="free"
    )


@dataclass(frozen=True)
class PreviewSettings:
    """Pictures made with the current weights (the average, where one is kept)."""

    prompts: tuple[str, ...] = setting((), "what is drawn", resume="free")
    captions: int = setting(
        0,
        "so many captions of the data are drawn too, of held-out records where there are any",
        range=up_to(1_000, AT_LEAST_0),
        resume="free",
    )
    count: int = setting(
        1, "pictures per prompt", range=up_to(1_000), resume="free", beside=PREVIEWS
    )
    every: int | None = setting(
        None,
        "without it and every_epochs: at the beginning and the end only",
        unit="optimizer steps",
        range=ABOVE_0,
        resume="free",
        beside=PREVIEWS,
    )
    every_epochs: float | None = setting(
        None,
        "in place of every",
        unit="epochs",
        range=up_to(1_000_000),
        resume="free",
        beside=PREVIEWS,
    )
    steps: int = setting(25, "of the sampler", range=up_to(10_000), resume="free", beside=PREVIEWS)
    guidance_scale: float = setting(
        7.5, "of classifier-free guidance", range=GUIDANCE, resume="free", beside=PREVIEWS
    )
    safety_checker: bool = setting(
        True,
        "blacken what the base's safety checker finds unsafe, where it has one",
        resume="free",
        beside=PREVIEWS,
    )


@dataclass(frozen=True)
class ValidationSettings:
    """Loss on records that are never trained on, at fixed timesteps and noise."""

    hold_out: int | float = setting(
        0, "records, or below 1 a share of them: 0.05", range=AT_LEAST_0
    )
    every: int = setting(
        100,
        "between validations",
        unit="optimizer steps",
        range=ABOVE_0,
        resume="free",
        beside=HELD_OUT,
    )
    timesteps: int = setting(
        4,
        "noise levels per record, evenly spread",
        range=up_to(10_000),
        resume="free",
        beside=HELD_OUT,
    )


@dataclass(frozen=True)
class LogSettings:
    """What is written down, and for whom. metrics.jsonl always is."""

    every: int = setting(
        10,
        "between two rows; nothing is copied from the device meanwhile",
        unit="optimizer steps",
        range=ABOVE_0,
        resume="free",
    )
    to: tuple[Literal["tensorboard", "wandb", "comet_ml"], ...] = setting(
        (), "further trackers", resume="free"
    )
    folder: str = setting("logs", "below the run's folder", resume="free", beside=TRACKERS)
    project: str = setting(
        "limner", "name of the project in trackers", resume="free", beside=TRACKERS
    )


@dataclass(frozen=True)
class ExportSettings:
    """Where the result goes besides the run's folder. A token is never a setting: log in, or set
    HF_TOKEN."""

    hub: str | None = setting(None, "name of the repository to push to", resume="free")
    private: bool = setting(False, "where the repository is made", resume="free", beside=PUSH)


@dataclass(frozen=True)
class Config:
    """One run."""

    run: str = setting(
        "run",
        "folder that receives checkpoints, metrics, previews and the result",
        path=True,
        resume="free",
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optim: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    preview: PreviewSettings = field(default_factory=PreviewSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    log: LogSettings = field(default_factory=LogSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    def __getitem__(self, name: str) -> Any:
        """The setting of a dotted name, e.g. ``optim.learning_rate``."""
        node: Any = self
        for part in name.split("."):
            node = getattr(node, part)
        return node


@dataclass(frozen=True)
class Setting:
    """A setting by its dotted name. Below a list, the name has no index: ``data.sets.folder``."""

    name: str
    type: Any
    default: object
    declaration: Declaration


def list_settings(section: type = Config, prefix: str = "") -> Iterator[Setting]:
    """All settings in the order of their declaration, sections inside a setting included."""
    types = typing.get_type_hints(section)
    for one in dataclasses.fields(section):
        name = prefix + one.name
        inner = [
            kind
            for kind in (types[one.name], *typing.get_args(types[one.name]))
            if dataclasses.is_dataclass(kind)
        ]
        if "declaration" in one.metadata:
            yield Setting(name, types[one.name], one.default, one.metadata["declaration"])
        for kind in inner:
            yield from list_settings(typing.cast(type, kind), f"{name}.")


SETTINGS: dict[str, Setting] = {one.name: one for one in list_settings()}
