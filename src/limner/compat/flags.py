"""The flags of the diffusers text-to-image scripts, each with its place in the config: another
script is more rows here, and nothing elsewhere."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag: how it is written, and the settings that depend on it."""

    kind: type  # bool: a switch; list: one or more texts
    default: Any
    # dotted settings, separated by spaces; "": no setting depends on it, and ``says`` is told when
    # it is given
    places: str
    says: str
    value: Callable[[Namespace], Any] | None = (
        None  # of the places, from all flags; a dict: of some of them; None: the flag's own value
    )
    choices: tuple[str, ...] | None = None
    required: bool = False
    needs: str = ""  # the flag without which this one does nothing


@dataclass(frozen=True)
class Script:
    """One of the diffusers scripts: its flags, and the settings that are not up to a flag."""

    flags: dict[str, Flag]
    settings: dict[str, Any] = field(default_factory=dict)


def learning_rate(a: Namespace) -> float:
    """The peak, multiplied under ``--scale_lr`` by all that makes up the global batch."""
    peak: float = a.learning_rate
    return peak * global_batch(a) if vars(a).get("scale_lr") else peak


def flax_learning_rate(a: Namespace) -> float:
    """The peak, multiplied under ``--scale_lr`` by what one step of this process sees."""
    peak: float = a.learning_rate
    if not a.scale_lr:
        return peak
    import jax

    return peak * a.train_batch_size * jax.local_device_count()


def global_batch(a: Namespace) -> int:
    """What one optimizer step sees; on resume the checkpoint's holds, on however many processes."""
    from limner.storage import checkpoint
    from limner.storage.checkpoint import STATE_FILE

    there = checkpoint.list_checkpoints(Path(a.output_dir)) if a.resume_from_checkpoint else []
    try:
        return int(json.loads((there[0] / STATE_FILE).read_text())["batch"])
    except (IndexError, OSError, ValueError, KeyError):
        return int(
            a.gradient_accumulation_steps
            * a.train_batch_size
            * int(os.environ.get("WORLD_SIZE", "1"))
        )


def choose_trackers(a: Namespace) -> tuple[str, ...]:
    """Where metrics go besides metrics.jsonl. TensorBoard is the default of the scripts, so its
    absence stops nobody; ``remarks`` tells of it."""
    from limner.training.sinks import installed_sinks

    if a.report_to == "none":
        return ()
    if a.report_to == "all":
        return tuple(installed_sinks())
    return (
        (a.report_to,) if a.report_to != "tensorboard" or "tensorboard" in installed_sinks() else ()
    )


def preview_prompts(a: Namespace) -> list[str] | None:
    """What previews show; None where there is nothing to show, so that the flags about previews are
    left alone."""
    given = vars(a).get("validation_prompts") or [
        p for p in [vars(a).get("validation_prompt")] if p is not None
    ]
    return given if given and vars(a).get("num_validation_images", 1) else None


def resume_point(a: Namespace) -> str:
    """Where to go on from. Without the flag a folder that holds checkpoints is refused; a path may
    lie outside the output folder."""
    which = a.resume_from_checkpoint
    if not which:
        return "never"
    inside = Path(a.output_dir, Path(which).name)  # diffusers looks at the last part of a path only
    return inside.name if not Path(which).is_dir() and inside.is_dir() else which


def hub_repository(a: Namespace) -> str | None:
    """The Hub repository to push to: the name of the output folder, unless another is given."""
    return (a.hub_model_id or Path(os.path.abspath(a.output_dir)).name) if a.push_to_hub else None


TRACKERS = ("tensorboard", "wandb", "comet_ml")
RESAMPLE = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")
COMMON = {
    "pretrained_model_name_or_path": Flag(
        str,
        None,
        "model.base",
        "the base: a folder or a Hub repository in the diffusers layout",
        required=True,
    ),
    "revision": Flag(
        str,
        None,
        "model.revision",
        "branch, tag or commit of the base on the Hub, for every part of it",
    ),
    "variant": Flag(
        str, None, "model.variant", "which weight files of the base to read, e.g. fp16"
    ),
    "cache_dir": Flag(
        str,
        None,
        "model.cache_dir data.cache_dir",
        "where downloaded models and data sets are kept",
    ),
    "dataset_name": Flag(
        str, None, "data.hub", "a data set on the Hub, or a local folder that datasets can load"
    ),
    "dataset_config_name": Flag(
        str, None, "data.hub_config", "which configuration of that data set", needs="dataset_name"
    ),
    "train_data_dir": Flag(
        str,
        None,
        "data.folder data.hub_files",
        "a folder of pictures with their captions; together with --dataset_name, the folder "
        "inside that data set",
        lambda a: {"data.hub_files" if a.dataset_name else "data.folder": a.train_data_dir},
    ),
    "image_column": Flag(str, "image", "data.image", "column that holds the picture"),
    "caption_column": Flag(
        str, "text", "data.caption", "column that holds the caption, or several"
    ),
    "max_train_samples": Flag(
        int,
        None,
        "data.max_records",
        "train on a random choice of this many records, the same on all processes",
    ),
    "resolution": Flag(
        int,
        512,
        "data.size",
        "the shorter side is resized to this many pixels, then cropped square",
    ),
    "center_crop": Flag(
        bool,
        False,
        "data.crop",
        "crop the centre; without it, a random part",
        lambda a: "center" if a.center_crop else "random",
    ),
    "random_flip": Flag(bool, False, "data.flip", "mirror left to right, half of the time"),
    "image_interpolation_mode": Flag(
        str, "lanczos", "data.resample", "how pictures are resized", choices=RESAMPLE
    ),
    "dataloader_num_workers": Flag(
        int,
        0,
        "data.threads",
        "threads that load pictures (0 means one); their number never changes a result",
        lambda a: a.dataloader_num_workers or 1,
    ),
    "prediction_type": Flag(
        str,
        None,
        "objective.predict",
        "epsilon or v_prediction; without it, what the base's scheduler says",
    ),
    "snr_gamma": Flag(
        float,
        None,
        "objective.min_snr",
        "gamma of Min-SNR weighting (arXiv:2303.09556), where 5.0 is recommended",
    ),
    "noise_offset": Flag(
        float, 0, "objective.noise_offset", "scale of a noise that is constant over each channel"
    ),
    "train_batch_size": Flag(
        int, 16, "train.micro_batch_size", "examples that one process holds at once"
    ),
    "gradient_accumulation_steps": Flag(
        int, 1, "train.accumulation_steps", "micro-batches per optimizer step"
    ),
    "num_train_epochs": Flag(
        int,
        100,
        "train.epochs",
        "passes over the data; --max_train_steps wins over it",
        lambda a: a.num_train_epochs if a.max_train_steps is None else None,
    ),
    "max_train_steps": Flag(int, None, "train.steps", "optimizer steps, however long an epoch is"),
    "seed": Flag(
        int,
        None,
        "train.seed",
        "makes the run repeatable; without it one is drawn and stored with the run",
    ),
    "learning_rate": Flag(
        float, 1e-4, "optim.learning_rate", "learning rate after the warm-up", learning_rate
    ),
    "scale_lr": Flag(
        bool,
        False,
        "optim.learning_rate",
        "multiply it by accumulation, batch size and number of processes",
        learning_rate,
    ),
    "lr_scheduler": Flag(
        str,
        "constant",
        "optim.schedule",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial",
    ),
    "lr_warmup_steps": Flag(
        int, 500, "optim.warmup", "optimizer steps of linear rise; constant has none"
    ),
    "use_8bit_adam": Flag(
        bool,
        False,
        "optim.kind",
        "8-bit AdamW of bitsandbytes",
        lambda a: "adamw8bit" if a.use_8bit_adam else "adamw",
    ),
    "adam_beta1": Flag(
        float,
        0.9,
        "optim.betas",
        "decay of AdamW's first moment",
        lambda a: [a.adam_beta1, a.adam_beta2],
    ),
    "adam_beta2": Flag(
        float,
        0.999,
        "optim.betas",
        "decay of AdamW's second moment",
        lambda a: [a.adam_beta1, a.adam_beta2],
    ),
    "adam_weight_decay": Flag(float, 1e-2, "optim.weight_decay", "decoupled weight decay"),
    "adam_epsilon": Flag(float, 1e-8, "optim.eps", "keeps AdamW's division finite"),
    "max_grad_norm": Flag(
        float, 1.0, "optim.max_grad_norm", "gradients with a larger norm are scaled down to it"
    ),
    "mixed_precision": Flag(
        str,
        None,
        "engine.precision",
        "number format of training; without it, what the launcher says, else float32",
        choices=("no", "fp16", "bf16"),
    ),
    "gradient_checkpointing": Flag(
        bool,
        False,
        "engine.gradient_checkpointing",
        "recompute activations in the backward pass: less memory, more time",
    ),
    "allow_tf32": Flag(bool, False, "engine.tf32", "TF32 matrix products on Ampere GPUs and later"),
    "enable_xformers_memory_efficient_attention": Flag(
        bool,
        False,
        "engine.attention",
        "xFormers' attention; PyTorch's own, the default, saves memory too and serves where "
        "xFormers cannot run",
        lambda a: "xformers" if a.enable_xformers_memory_efficient_attention else "sdpa",
    ),
    "checkpointing_steps": Flag(
        int, 500, "checkpoint.every", "optimizer steps from one checkpoint to the next"
    ),
    "checkpoints_total_limit": Flag(
        int,
        None,
        "checkpoint.keep",
        "keep the newest so many; older ones go once the new one is safe",
    ),
    "resume_from_checkpoint": Flag(
        str,
        None,
        "checkpoint.resume",
        "latest, checkpoint-N or a path; without it an output folder that holds checkpoints is "
        "refused",
        resume_point,
    ),
    "report_to": Flag(
        str,
        "tensorboard",
        "log.to",
        "tensorboard, wandb, comet_ml, all (those installed) or none; metrics.jsonl is always "
        "written",
        choose_trackers,
    ),
    "logging_dir": Flag(
        str, "logs", "log.folder", "folder of the trackers' files, below the output folder"
    ),
    "push_to_hub": Flag(
        bool, False, "export.hub", "push the result, without checkpoints and logs", hub_repository
    ),
    "hub_model_id": Flag(
        str,
        None,
        "export.hub",
        "repository to push to; without it, the name of the output folder",
        hub_repository,
        needs="push_to_hub",
    ),
    "hub_token": Flag(
        str,
        None,
        "",
        "it is used by this process and written to no file; "
        "a login (hf auth login) or the variable HF_TOKEN is safer, because a command line can be "
        "read by others",
    ),
    "local_rank": Flag(
        int, -1, "", "it is not needed: the launcher's variables say which process this is"
    ),
}
# Another value on resume is applied, and said, where the diffusers scripts take the checkpoint's
# and stay silent.
ALLOWED = ["learning_rate", "schedule", "warmup", "betas", "weight_decay", "eps", "max_grad_norm"]
SETTINGS = {
    "model.family": "sd",
    "preview.guidance_scale": 7.5,
    "checkpoint.allow_changes": [f"optim.{name}" for name in ALLOWED],
}
SETTINGS_XL = SETTINGS | {
    "model.family": "sdxl",
    "preview.guidance_scale": 5.0,
    "data.empty_caption": "encoded",
}
PROJECT = "text2image-fine-tune"


def preview_flags(count: int | None, epochs: int, prompt: Flag) -> dict[str, Flag]:
    """The flags about previews, which differ in whether there are many prompts or many pictures of
    one."""
    name = "validation_prompts" if prompt.kind is list else "validation_prompt"
    every = Flag(
        int,
        epochs,
        "preview.every_epochs",
        "epochs from one preview to the next",
        lambda a: a.validation_epochs if preview_prompts(a) else None,
        needs=name,
    )
    pictures = Flag(
        int,
        count,
        "preview.count",
        "pictures of the prompt; 0 for none",
        lambda a: a.num_validation_images if preview_prompts(a) else None,
        needs=name,
    )
    return {name: prompt, "validation_epochs": every} | (
        {"num_validation_images": pictures} if count is not None else {}
    )


def timestep_bias(a: Namespace) -> dict[str, Any] | None:
    """The table of the bias, or None where all timesteps are drawn alike."""
    if a.timestep_bias_strategy == "none":
        return None
    names = ("strategy", "multiplier", "begin", "end", "portion")
    return {
        "objective.timestep_bias": {name: getattr(a, f"timestep_bias_{name}") for name in names}
    }


def bias_flag(kind: type, default: Any, says: str, choices: tuple[str, ...] | None = None) -> Flag:
    """One of the flags that make up the bias."""
    return Flag(
        kind,
        default,
        "objective.timestep_bias",
        says,
        timestep_bias,
        choices,
        needs="" if choices else "timestep_bias_strategy",
    )


XL = {
    "pretrained_vae_model_name_or_path": Flag(
        str,
        None,
        "model.vae",
        "another autoencoder, a folder or a Hub repository, that is safe in half precision; "
        "without it the base's own runs in float32",
    ),
    "resolution": Flag(
        int,
        1024,
        "data.size",
        "the shorter side is resized to this many pixels, then cropped square",
    ),
    "enable_npu_flash_attention": Flag(
        bool,
        False,
        "",
        "NPUs are not supported; PyTorch's own memory-efficient attention is used, which is the "
        "default",
    ),
}
PRIOR, DECODER = "pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"
KANDINSKY = "kandinsky-community/kandinsky-2-2"
ABSENT = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "center_crop",
    "random_flip",
    "image_interpolation_mode",
    "prediction_type",
    "noise_offset",
)
SETTINGS_22 = SETTINGS | {"preview.guidance_scale": 4.0, "data.resample": "bicubic"}


def kandinsky_script(stage: str, rank: bool, *without: str) -> Script:
    """A script of Kandinsky 2.2: for the prior or the decoder, in full or, with ``rank``, by
    LoRA."""
    where = "a folder or a Hub repository in the diffusers layout"
    if stage == "prior":
        both = {
            PRIOR: Flag(
                str, f"{KANDINSKY}-prior", "model.base", f"the prior that is trained: {where}"
            )
        }
        says = "the decoder that previews are made with"
        both[DECODER] = Flag(
            str,
            f"{KANDINSKY}-decoder",
            "model.other_stage",
            says,
            lambda a: getattr(a, DECODER) if preview_prompts(a) else None,
        )
    else:
        both = {
            DECODER: Flag(
                str, f"{KANDINSKY}-decoder", "model.base", f"the decoder that is trained: {where}"
            )
        }
        both[PRIOR] = Flag(
            str,
            f"{KANDINSKY}-prior",
            "model.other_stage",
            "the prior, whose image encoder sees the pictures",
        )
    own = {
        "adam_weight_decay": Flag(float, 0.0, "optim.weight_decay", "decoupled weight decay"),
        "train_batch_size": Flag(
            int, 1, "train.micro_batch_size", "examples that one process holds at once"
        ),
        "output_dir": Flag(
            str,
            f"kandi_2_2-model-finetuned{'-lora' * rank}",
            "run",
            "folder that receives checkpoints, metrics, previews and the result",
        ),
    }
    if rank:
        own |= preview_flags(
            4,
            1,
            Flag(
                str,
                None,
                "preview.prompts",
                "pictures of it are made during training and at the end",
                preview_prompts,
            ),
        )
        own["rank"] = Flag(
            int, 4, "adapter.rank", "rank of the added matrices; alpha is equal to it"
        )
    else:
        own |= preview_flags(
            None,
            5,
            Flag(
                list,
                None,
                "preview.prompts",
                "one picture of each is made during training and at the end",
                preview_prompts,
            ),
        )
        own["use_ema"] = Flag(
            bool,
            False,
            "optim.ema",
            "keep a moving average of the weights, and export it",
            lambda a: 0.9999 if a.use_ema else None,
        )
        own["tracker_project_name"] = Flag(
            str, PROJECT, "log.project", "project under which the trackers file the run"
        )
    kept = {
        name: flag for name, flag in COMMON.items() if name not in (*ABSENT, "scale_lr", *without)
    }
    settings = {
        "model.family": f"kandinsky22-{stage}",
        "adapter.kind": "lora" if rank else "full",
        "preview.steps": 30 if rank else 20,
    }
    return Script(
        kept | both | own, SETTINGS_22 | settings | ({"log.project": PROJECT} if rank else {})
    )


MEMORY = ("gradient_checkpointing", "enable_xformers_memory_efficient_attention")
# The guide's command has it, though its script knows no such flag.
WORDLESS = {
    "caption_column": Flag(
        str, None, "", "a decoder is told of pictures only; captions are not read"
    )
}
SCRIPTS = {
    "train_text_to_image": Script(
        COMMON
        | preview_flags(
            None,
            5,
            Flag(
                list,
                None,
                "preview.prompts",
                "one picture of each is made during training and at the end",
                preview_prompts,
            ),
        )
        | {
            "output_dir": Flag(
                str,
                "sd-model-finetuned",
                "run",
                "folder that receives checkpoints, metrics, previews and the result",
            ),
            "non_ema_revision": Flag(
                str,
                None,
                "model.trained_revision",
                "revision of the trained network, where it differs from --revision",
            ),
            "input_perturbation": Flag(
                float,
                0,
                "objective.input_perturbation",
                "extra noise on the input only (arXiv:2301.11706), where 0.1 is recommended",
            ),
            "dream_training": Flag(
                bool,
                False,
                "objective.dream",
                "train with DREAM (arXiv:2312.00210), at the price of a second forward pass",
                lambda a: a.dream_detail_preservation if a.dream_training else None,
            ),
            "dream_detail_preservation": Flag(
                float,
                1.0,
                "objective.dream",
                "DREAM's exponent, 0 or more",
                lambda a: a.dream_detail_preservation if a.dream_training else None,
                needs="dream_training",
            ),
            "use_ema": Flag(
                bool,
                False,
                "optim.ema",
                "keep a moving average of the weights, and export it",
                lambda a: 0.9999 if a.use_ema else None,
            ),
            "offload_ema": Flag(
                bool, False, "optim.ema_offload", "keep the average in host memory", needs="use_ema"
            ),
            "foreach_ema": Flag(
                bool,
                False,
                "",
                "it is not needed: the average is always updated in grouped operations",
            ),
            "tracker_project_name": Flag(
                str, PROJECT, "log.project", "project under which the trackers file the run"
            ),
        },
        SETTINGS | {"adapter.kind": "full", "preview.steps": 20},
    ),
    "train_text_to_image_lora": Script(
        COMMON
        | preview_flags(
            4,
            1,
            Flag(
                str,
                None,
                "preview.prompts",
                "pictures of it are made during training and at the end",
                preview_prompts,
            ),
        )
        | {
            "output_dir": Flag(
                str,
                "sd-model-finetuned-lora",
                "run",
                "folder that receives checkpoints, metrics, previews and the result",
            ),
            "rank": Flag(
                int, 4, "adapter.rank", "rank of the added matrices; alpha is equal to it"
            ),
        },
        SETTINGS | {"adapter.kind": "lora", "preview.steps": 30, "log.project": PROJECT},
    ),
    "train_text_to_image_sdxl": Script(
        COMMON
        | XL
        | preview_flags(
            4,
            1,
            Flag(
                str,
                None,
                "preview.prompts",
                "pictures of it are made during training and at the end",
                preview_prompts,
            ),
        )
        | {
            "output_dir": Flag(
                str,
                "sdxl-model-finetuned",
                "run",
                "folder that receives checkpoints, metrics, previews and the result",
            ),
            "proportion_empty_prompts": Flag(
                float,
                0,
                "data.drop_caption",
                "probability of an empty caption, drawn anew for each example",
            ),
            "use_ema": Flag(
                bool,
                False,
                "optim.ema",
                "keep a moving average of the weights, and export it",
                lambda a: 0.9999 if a.use_ema else None,
            ),
            "timestep_bias_strategy": bias_flag(
                str,
                "none",
                "which timesteps are drawn more often than others",
                ("earlier", "later", "range", "none"),
            ),
            "timestep_bias_multiplier": bias_flag(float, 1.0, "how many times as often"),
            "timestep_bias_begin": bias_flag(int, 0, "where range begins"),
            "timestep_bias_end": bias_flag(int, 1000, "where range ends"),
            "timestep_bias_portion": bias_flag(
                float, 0.25, "part of all timesteps, for earlier and later"
            ),
        },
        SETTINGS_XL
        | {"adapter.kind": "full", "preview.steps": 25, "log.project": f"{PROJECT}-sdxl"},
    ),
    "train_text_to_image_lora_sdxl": Script(
        COMMON
        | XL
        | preview_flags(
            4,
            1,
            Flag(
                str,
                None,
                "preview.prompts",
                "pictures of it are made during training and at the end",
                preview_prompts,
            ),
        )
        | {
            "output_dir": Flag(
                str,
                "sd-model-finetuned-lora",
                "run",
                "folder that receives checkpoints, metrics, previews and the result",
            ),
            "rank": Flag(
                int, 4, "adapter.rank", "rank of the added matrices; alpha is equal to it"
            ),
            "train_text_encoder": Flag(
                bool, False, "adapter.text_encoders", "adapters on both text encoders too"
            ),
            "debug_loss": Flag(
                bool,
                False,
                "",
                "losses are not filed by picture; metrics.jsonl has the loss, and a loss that is "
                "not finite names its pictures",
            ),
        },
        SETTINGS_XL | {"adapter.kind": "lora", "preview.steps": 50, "log.project": PROJECT},
    ),
    "train_text_to_image_prior": kandinsky_script("prior", False, *MEMORY),
    "train_text_to_image_decoder": kandinsky_script("decoder", False, "caption_column"),
    "train_text_to_image_lora_prior": kandinsky_script("prior", True, *MEMORY),
    "train_text_to_image_lora_decoder": kandinsky_script(
        "decoder", True, "caption_column", MEMORY[1]
    ),
}
FLAX = """
    pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir
    image_column caption_column max_train_samples output_dir cache_dir resolution center_crop
    random_flip train_batch_size num_train_epochs max_train_steps learning_rate scale_lr
    lr_scheduler adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub
    hub_token hub_model_id logging_dir report_to local_rank
""".split()  # noqa: SIM905
SCRIPTS["train_text_to_image_flax"] = Script(
    {name: SCRIPTS["train_text_to_image"].flags[name] for name in FLAX}
    | {
        "train_batch_size": Flag(
            int, 16, "train.micro_batch_size", "examples that one device holds at once"
        ),
        "learning_rate": Flag(
            float, 1e-4, "optim.learning_rate", "learning rate", flax_learning_rate
        ),
        "scale_lr": Flag(
            bool,
            False,
            "optim.learning_rate",
            "multiply it by batch size and number of devices",
            flax_learning_rate,
        ),
        "seed": Flag(int, 0, "train.seed", "makes the run repeatable"),
        "mixed_precision": Flag(
            str,
            "no",
            "engine.precision",
            "number format of training",
            choices=("no", "fp16", "bf16"),
        ),
        "from_pt": Flag(
            bool,
            False,
            "",
            "weights are read from safetensors files as they are, whichever framework wrote them",
        ),
    },
    SETTINGS
    | {
        "adapter.kind": "full",
        "engine.kind": "jax",
        "data.resample": "bilinear",
        "checkpoint.resume": "auto",
        "train.accumulation_steps": 1,
    },
)


for name in ("train_text_to_image_decoder", "train_text_to_image_lora_decoder"):
    SCRIPTS[name].flags.update(WORDLESS)
