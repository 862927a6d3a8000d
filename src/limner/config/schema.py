"""All settings of a run, as frozen dataclasses."""

from dataclasses import dataclass, field
from typing import Any, Literal

Allowable = Literal[
    "optim.learning_rate",
    "optim.schedule",
    "optim.warmup",
    "optim.cycles",
    "optim.betas",
    "optim.weight_decay",
    "optim.eps",
    "optim.max_grad_norm",
]


@dataclass(frozen=True)
class ModelSettings:
    """The base that is fine-tuned: a folder or a Hub repository in the diffusers layout."""

    base: str = ""
    family: str = "sd"
    revision: str | None = None  # of the Hub repository
    trained_revision: str | None = None  # of the trained component, where it differs
    variant: str | None = None  # e.g. fp16: which weight files of the base
    other_stage: str | None = (
        # the other one of a model in two stages: a decoder's prior, a prior's decoder; a folder, a
        # run or a Hub repository
        None
    )
    vae: str | None = (
        # another autoencoder, a folder or a Hub repository; one that is safe in half precision runs
        # in engine.precision
        None
    )
    cache_dir: str | None = None  # where downloads are kept; None: the Hub library's own place


@dataclass(frozen=True)
class DataSetSettings:
    """One data set of a mixture."""

    folder: str | None = None  # exactly one of folder and hub
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_files: str | None = None
    split: str = "train"
    image: str = "image"  # column names
    caption: str | None = "text"
    repeats: int = 1  # how often an epoch sees each record
    weight: float | None = (
        # share of the examples that come from here, beside the others' weights; in all sets or in
        # none
        None
    )


@dataclass(frozen=True)
class BucketSettings:
    """Sizes of about the same area and different proportions; a picture goes to the one that fits
    it best, and no batch mixes them."""

    step: int = 64  # sides are multiples of it, in pixels
    smallest: int | None = None  # shortest side; None: half of the resolution
    largest: int | None = None  # longest side; None: twice the resolution
    upscale: bool = True  # False: a picture that is smaller than its bucket cannot be used
    # several: a picture goes to the largest that it fills without being enlarged; none: data.size
    resolutions: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataSettings:
    """Where pictures and captions come from, and how a picture becomes a training example."""

    sets: tuple[DataSetSettings, ...] = ()  # several data sets in place of folder and hub
    folder: str | None = (
        None  # exactly one of folder and hub, unless records are passed to limner.train
    )
    hub: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_files: str | None = None  # a folder handed to datasets.load_dataset as data_dir
    cache_dir: str | None = None
    split: str = "train"
    image: str = "image"  # column names
    caption: str | None = "text"  # none: there are no captions
    max_records: int | None = None  # train on a random choice of this many records
    on_bad_record: Literal["refuse", "skip"] = (
        "refuse"  # what to do about pictures and captions that cannot be used
    )
    max_pixels: int = 178_956_970  # a larger picture is taken for a decompression bomb
    # pixels: the shorter side is resized to it, then cropped square; with buckets, the side of the
    # square of their area
    size: int = 512
    buckets: BucketSettings | None = None  # None: all pictures are cropped square
    crop: Literal["center", "random"] = "center"
    crop_variants: int | None = (
        None  # random crops per picture; None: a new one each time, which cannot be cached
    )
    flip: bool = False  # left to right, half of the time
    resample: Literal[
        "bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"
    ] = "lanczos"
    background: str = "white"  # what shows through transparent pixels: a colour name or #rrggbb
    drop_caption: float = 0.0  # probability of an empty caption, per example
    empty_caption: Literal["base", "zeros", "encoded"] = (
        # what stands for a dropped caption; base: zeros where the base says so of empty prompts
        "base"
    )
    # captions may have so many times 75 tokens, encoded apart and joined; what is longer is cut and
    # reported
    caption_chunks: int = 1
    cache: str = (
        "auto"  # encoded pictures and captions: auto (a user-wide folder), memory, off, or a folder
    )
    cache_dtype: Literal["float32", "float16"] = (
        "float32"  # features are rounded to it, cached or not
    )
    threads: int = 4


@dataclass(frozen=True)
class TimestepBiasSettings:
    """Draw some timesteps more often than others."""

    strategy: Literal["later", "earlier", "range"] = "later"
    multiplier: float = 1.0
    portion: float = 0.25  # of all timesteps, for later and earlier
    begin: int = 0  # for range
    end: int = 1000


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the network learns to predict, and how the loss is weighted."""

    predict: Literal["epsilon", "v_prediction", "sample"] | None = (
        None  # None: what the base's scheduler says
    )
    min_snr: float | None = None  # gamma of arXiv:2303.09556; 5 is recommended there
    noise_offset: float = 0.0
    input_perturbation: float = 0.0  # arXiv:2301.11706; 0.1 is recommended there
    dream: float | None = (
        None  # detail preservation of arXiv:2312.00210, 0 or more; 1 is recommended there
    )
    timestep_bias: TimestepBiasSettings | None = None


@dataclass(frozen=True)
class AdapterSettings:
    """Which weights learn: all of them, or low-rank additions (arXiv:2106.09685)."""

    kind: Literal["full", "lora"] = "full"
    rank: int = 4
    alpha: float | None = None  # None: equal to rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # module names; empty: the family's own
    # LoRA on the text encoders too; captions are then encoded in every step, and never cached
    text_encoders: bool = False


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    warmup: int = 0  # optimizer steps, whatever the accumulation and the number of processes
    cycles: int = 1  # of cosine_with_restarts
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    ema: float | None = (
        None  # highest decay of the moving average of the weights; None: no average is kept
    )
    ema_offload: bool = False  # keep the average in host memory


@dataclass(frozen=True)
class TrainSettings:
    """How long, and how much at once. The global batch is the unit: processes and accumulation
    divide it."""

    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    batch_size: int | None = (
        None  # global: what one optimizer step sees; None: micro * accumulate * processes
    )
    micro_batch_size: int | None = (
        None  # what one device holds at once; None: its whole share of the batch
    )
    accumulation_steps: int | None = None  # micro-batches per step; only where batch is not given
    seed: int | None = None  # None: one is drawn and stored with the run


@dataclass(frozen=True)
class EngineSettings:
    """How the numbers are computed; on the CPU in float32 nothing here changes a result."""

    kind: Literal["torch", "jax"] = "torch"
    precision: Literal["no", "fp16", "bf16"] | None = (
        None  # None: what the launcher says, else no (float32)
    )
    device: str | None = None  # None: the accelerator that torch finds, else the CPU
    gradient_checkpointing: bool = False
    tf32: bool = False
    attention: Literal["sdpa", "math", "xformers"] = (
        "sdpa"  # math: plain products, faster for small pictures on a CPU
    )
    devices: int | None = None  # of this process, for JAX; None: all that there are
    fsdp: int = (
        1  # for JAX: over how many devices weights, gradients, optimizer and average are divided
    )
    compile_cache: str = (
        "auto"  # for JAX, compiled steps: auto (a user-wide folder), off, or a folder
    )
    encode_batch: int | None = (
        # pictures that the frozen encoders see at once, always, padded; None: 8, fewer above 512
        # pixels, as memory goes
        None
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """When the whole state is saved, and where a run goes on from."""

    every: int = 500
    keep: int | None = None  # the newest so many; None: all
    # auto and latest: the newest good one; never: refuse a folder that has some; or checkpoint-N,
    # or a path
    resume: str = "auto"
    allow_changes: tuple[Allowable, ...] = ()  # settings that may differ from the checkpoint's


@dataclass(frozen=True)
class PreviewSettings:
    """Pictures made with the current weights (the average, where one is kept): at the end, and at
    the interval that is given."""

    prompts: tuple[str, ...] = ()
    count: int = 1  # pictures per prompt
    every: int | None = None  # optimizer steps; without it and every_epochs: at the end only
    every_epochs: float | None = None
    steps: int = 25  # of the sampler
    guidance_scale: float = 7.5


@dataclass(frozen=True)
class ValidationSettings:
    """Held-out loss: records that are never trained on, at fixed timesteps and noise."""

    hold_out: int = 0  # records
    every: int = 100  # optimizer steps
    timesteps: int = 4  # noise levels per record, evenly spread


@dataclass(frozen=True)
class LogSettings:
    """What is written down, and for whom; metrics.jsonl always is."""

    every: int = 10  # optimizer steps; between two of them nothing is copied from the device
    to: tuple[Literal["tensorboard", "wandb", "comet_ml"], ...] = ()
    folder: str = "logs"  # below the run's folder
    project: str = "limner"


@dataclass(frozen=True)
class ExportSettings:
    """Where the result goes besides the run's folder. A token is never a setting: log in, or set
    HF_TOKEN."""

    hub: str | None = None  # repository id to push to
    private: bool = False


@dataclass(frozen=True)
class Config:
    """One run."""

    run: str = "run"  # folder that receives checkpoints, metrics, previews and the result
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
