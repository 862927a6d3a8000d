"""Everything a run depends on, as one tree of frozen dataclasses: typed, complete, saved with the
run; strangers are refused with "did you mean"."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from limner.faults import InputFault
from limner.tree import build as build
from limner.tree import flat as flat
from limner.tree import override as override
from limner.tree import plain as plain

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
class Model:
    """The base that is fine-tuned: a folder or a Hub repository in the diffusers layout."""

    base: str = ""
    family: str = "sd"
    revision: str | None = None  # of the Hub repository
    trained_revision: str | None = None  # of the trained component, where it differs
    variant: str | None = None  # e.g. fp16: which weight files of the base
    partner: str | None = (
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
class Set:
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
class Buckets:
    """Sizes of about the same area and different proportions; a picture goes to the one that fits
    it best, and no batch mixes them."""

    step: int = 64  # sides are multiples of it, in pixels
    smallest: int | None = None  # shortest side; None: half of the resolution
    largest: int | None = None  # longest side; None: twice the resolution
    upscale: bool = True  # False: a picture that is smaller than its bucket cannot be used
    # several: a picture goes to the largest that it fills without being enlarged; none: data.size
    resolutions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Data:
    """Where pictures and captions come from, and how a picture becomes a training example."""

    sets: tuple[Set, ...] = ()  # several data sets in place of folder and hub
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
    limit: int | None = None  # train on a random choice of this many records
    bad: Literal["refuse", "skip"] = (
        "refuse"  # what to do about pictures and captions that cannot be used
    )
    max_pixels: int = 178_956_970  # a larger picture is taken for a decompression bomb
    # pixels: the shorter side is resized to it, then cropped square; with buckets, the side of the
    # square of their area
    size: int = 512
    buckets: Buckets | None = None  # None: all pictures are cropped square
    crop: Literal["center", "random"] = "center"
    crops: int | None = (
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
    chunks: int = 1
    cache: str = (
        "auto"  # encoded pictures and captions: auto (a user-wide folder), memory, off, or a folder
    )
    cache_dtype: Literal["float32", "float16"] = (
        "float32"  # features are rounded to it, cached or not
    )
    threads: int = 4


@dataclass(frozen=True)
class TimestepBias:
    """Draw some timesteps more often than others."""

    strategy: Literal["later", "earlier", "range"] = "later"
    multiplier: float = 1.0
    portion: float = 0.25  # of all timesteps, for later and earlier
    begin: int = 0  # for range
    end: int = 1000


@dataclass(frozen=True)
class Objective:
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
    timestep_bias: TimestepBias | None = None


@dataclass(frozen=True)
class Adapt:
    """Which weights learn: all of them, or low-rank additions (arXiv:2106.09685)."""

    kind: Literal["full", "lora"] = "full"
    rank: int = 4
    alpha: float | None = None  # None: equal to rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # module names; empty: the family's own
    # LoRA on the text encoders too; captions are then encoded in every step, and never cached
    text_encoders: bool = False


@dataclass(frozen=True)
class Optim:
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
class Train:
    """How long, and how much at once. The global batch is the unit: processes and accumulation
    divide it."""

    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    batch: int | None = (
        None  # global: what one optimizer step sees; None: micro * accumulate * processes
    )
    micro: int | None = None  # what one device holds at once; None: its whole share of the batch
    accumulate: int | None = None  # micro-batches per step; only where batch is not given
    seed: int | None = None  # None: one is drawn and stored with the run


@dataclass(frozen=True)
class Engine:
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
class Checkpoint:
    """When the whole state is saved, and where a run goes on from."""

    every: int = 500
    keep: int | None = None  # the newest so many; None: all
    # auto and latest: the newest good one; never: refuse a folder that has some; or checkpoint-N,
    # or a path
    resume: str = "auto"
    allow: tuple[Allowable, ...] = ()  # settings that may differ from the checkpoint's


@dataclass(frozen=True)
class Preview:
    """Pictures made with the current weights (the average, where one is kept): at the end, and at
    the interval that is given."""

    prompts: tuple[str, ...] = ()
    count: int = 1  # pictures per prompt
    every: int | None = None  # optimizer steps; without it and every_epochs: at the end only
    every_epochs: float | None = None
    steps: int = 25  # of the sampler
    guidance_scale: float = 7.5


@dataclass(frozen=True)
class Watch:
    """Held-out loss: records that are never trained on, at fixed timesteps and noise."""

    hold_out: int = 0  # records
    every: int = 100  # optimizer steps
    timesteps: int = 4  # noise levels per record, evenly spread


@dataclass(frozen=True)
class Log:
    """What is written down, and for whom; metrics.jsonl always is."""

    every: int = 10  # optimizer steps; between two of them nothing is copied from the device
    to: tuple[Literal["tensorboard", "wandb", "comet_ml"], ...] = ()
    folder: str = "logs"  # below the run's folder
    project: str = "limner"


@dataclass(frozen=True)
class Export:
    """Where the result goes besides the run's folder. A token is never a setting: log in, or set
    HF_TOKEN."""

    hub: str | None = None  # repository id to push to
    private: bool = False


@dataclass(frozen=True)
class Config:
    """One run."""

    run: str = "run"  # folder that receives checkpoints, metrics, previews and the result
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    adapt: Adapt = field(default_factory=Adapt)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    engine: Engine = field(default_factory=Engine)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    preview: Preview = field(default_factory=Preview)
    watch: Watch = field(default_factory=Watch)
    log: Log = field(default_factory=Log)
    export: Export = field(default_factory=Export)

    def check(self, *, own_records: bool = False) -> None:
        """Refuse what cannot be honoured, before anything is loaded.

        Raises:
            InputFault: naming the settings, what was given and what is expected.
        """
        t, d, o = self.train, self.data, self.optim
        refuse = [
            (
                not self.model.base,
                "model.base: give a folder or a Hub repository in the diffusers layout, e.g. "
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
            ),
            (
                not own_records
                and (d.folder is not None) + (d.hub is not None) + bool(d.sets) != 1,
                "data: give exactly one of data.folder, data.hub and data.sets; data.folder=none "
                "takes the recipe's away",
            ),
            (
                (t.steps is None) == (t.epochs is None),
                "train: give exactly one of train.steps and train.epochs",
            ),
            (
                t.batch is not None and t.accumulate is not None,
                "train: give train.batch (global) or train.accumulate, not both",
            ),
            (
                t.batch is None and t.micro is None,
                "train: give train.batch (global: what one optimizer step sees), or train.micro",
            ),
            (
                d.crops is not None and d.crop != "random",
                'data.crops: only a random crop comes in several; set data.crop="random" or leave '
                "data.crops out",
            ),
            (
                t.seed is not None and not 0 <= t.seed < 2**63,
                f"train.seed: {t.seed} is not within 0 to 2**63 - 1",
            ),
            (
                not 0 <= d.drop_caption <= 1,
                f"data.drop_caption: {d.drop_caption} is not a probability, 0 to 1",
            ),
            (
                o.ema is not None and not 0 <= o.ema < 1,
                f"optim.ema: {o.ema} is not a decay, 0 to below 1",
            ),
            (
                not all(0 <= b < 1 for b in o.betas),
                f"optim.betas: {o.betas} are not both within 0 to below 1",
            ),
            (
                self.objective.min_snr is not None and self.objective.min_snr <= 0,
                f"objective.min_snr: {self.objective.min_snr} is not above 0",
            ),
            (
                self.adapt.text_encoders and self.adapt.kind != "lora",
                'adapt.text_encoders: text encoders learn by adapters only; set adapt.kind="lora"',
            ),
            (
                not 0 <= self.adapt.dropout < 1,
                f"adapt.dropout: {self.adapt.dropout} is not within 0 to below 1",
            ),
            (
                self.preview.every is not None and self.preview.every_epochs is not None,
                "preview: give preview.every (steps) or preview.every_epochs, not both",
            ),
        ]
        positive = [
            "train.steps",
            "train.epochs",
            "train.batch",
            "train.micro",
            "train.accumulate",
            "data.size",
            "data.limit",
            "data.crops",
            "data.threads",
            "data.chunks",
        ]
        positive += [
            "data.max_pixels",
            "adapt.rank",
            "adapt.alpha",
            "optim.learning_rate",
            "optim.cycles",
            "optim.eps",
            "optim.max_grad_norm",
        ]
        positive += [
            "engine.devices",
            "engine.fsdp",
            "engine.encode_batch",
            "checkpoint.every",
            "checkpoint.keep",
            "preview.count",
            "preview.every",
            "preview.every_epochs",
            "preview.steps",
        ]
        positive += ["data.chunks", "watch.every", "watch.timesteps", "log.every"]
        not_negative = [
            "optim.warmup",
            "optim.weight_decay",
            "watch.hold_out",
            "objective.noise_offset",
            "objective.input_perturbation",
            "objective.dream",
        ]
        refuse += [
            ((v := self[k]) is not None and v <= 0, f"{k}: {self[k]} is not above 0")
            for k in positive
        ]
        refuse += [
            ((v := self[k]) is not None and v < 0, f"{k}: {self[k]} is below 0")
            for k in not_negative
        ]
        refuse += mixture_rules(d.sets) + (bucket_rules(d.buckets) if d.buckets is not None else [])
        if problems := [text for wrong, text in refuse if wrong]:
            raise InputFault("\n".join(problems))

    def __getitem__(self, name: str) -> Any:
        """The setting of a dotted name, e.g. ``optim.learning_rate``."""
        node: Any = self
        for part in name.split("."):
            node = getattr(node, part)
        return node


def mixture_rules(sets: tuple[Set, ...]) -> list[tuple[bool, str]]:
    """What is wrong with several data sets: (whether it is, message)."""
    weighted = [one.weight is not None for one in sets]
    rules = [
        (
            any(weighted) and not all(weighted),
            "data.sets: give a weight to every data set, or to none",
        )
    ]
    for i, one in enumerate(sets):
        name = f"data.sets[{i}]"
        rules += [
            (
                (one.folder is None) == (one.hub is None),
                f"{name}: give exactly one of folder and hub",
            ),
            (
                one.repeats < 1,
                f"{name}.repeats: {one.repeats} is below 1; leave a data set out to have none of "
                "it",
            ),
            (
                one.weight is not None and one.weight <= 0,
                f"{name}.weight: {one.weight} is not above 0; leave a data set out to have none "
                "of it",
            ),
            (
                one.weight is not None and one.repeats != 1,
                f"{name}: a weight says already how often its records come; give weight or repeats",
            ),
        ]
    return rules


def bucket_rules(b: Buckets) -> list[tuple[bool, str]]:
    """What is wrong with buckets: (whether it is, message)."""
    smallest, largest = b.smallest, b.largest
    return [
        (
            b.step <= 0 or b.step % 8 != 0,
            f"data.buckets.step: {b.step} is not a multiple of 8 above 0; latents have an eighth "
            "of a picture's sides",
        ),
        (
            smallest is not None and smallest <= 0,
            f"data.buckets.smallest: {smallest} is not above 0",
        ),
        (
            largest is not None and largest < (smallest or 1),
            f"data.buckets.largest: {largest} is below the smallest side, {smallest or 1}",
        ),
        (
            any(r <= 0 for r in b.resolutions),
            f"data.buckets.resolutions: {list(b.resolutions)} are not all above 0",
        ),
        (
            len(set(b.resolutions)) < len(b.resolutions),
            f"data.buckets.resolutions: {list(b.resolutions)} has one of them twice",
        ),
    ]


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """A recipe (TOML), then ``section.key=value`` overrides whose values are TOML, or plain words.

    ``recipes/<name>`` is one of Limner's own where there is no such file here.

    Raises:
        InputFault: when the file is missing, is not TOML, or holds what ``build`` refuses.
    """
    try:
        raw = tomllib.loads(find(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFault(
            f"{path}: {error.strerror}. Give the path of a recipe, a TOML file such as "
            "recipes/sd15-lora.toml."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputFault(f"{path}: not a TOML file: {error}") from error
    return build(Config, override(raw, overrides))


def find(path: Path) -> Path:
    """The recipe at a path; else Limner's own of that name, which lies in the installed package, or
    beside its sources."""
    path, package = path.expanduser(), Path(__file__).parent
    own = (
        [folder / path for folder in (package, package.parents[1])]
        if path.parent == Path("recipes")
        else []
    )
    return next((file for file in (path, *own) if file.is_file()), path)
