"""The flags that the diffusers scripts share: all of them, or several."""

from limner.compat.flag import (
    Flag,
    choose_ema_decay,
    choose_hub_repository,
    choose_preview_count,
    choose_preview_epochs,
    choose_resume_point,
    choose_trackers,
    collect_adam_betas,
    collect_preview_prompts,
    scale_learning_rate,
)

PROJECT = "text2image-fine-tune"
RESAMPLING = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")
PRECISIONS = ("no", "fp16", "bf16")

MODEL_FLAGS = {
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
}
DATA_FLAGS = {
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
        value=lambda a: {"data.hub_files" if a.dataset_name else "data.folder": a.train_data_dir},
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
        value=lambda a: "center" if a.center_crop else "random",
    ),
    "random_flip": Flag(bool, False, "data.flip", "mirror left to right, half of the time"),
    "image_interpolation_mode": Flag(
        str, "lanczos", "data.resample", "how pictures are resized", choices=RESAMPLING
    ),
    "dataloader_num_workers": Flag(
        int,
        0,
        "data.threads",
        "threads that load pictures (0 means one); their number never changes a result",
        value=lambda a: a.dataloader_num_workers or 1,
    ),
}
OBJECTIVE_FLAGS = {
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
}
TRAIN_FLAGS = {
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
        value=lambda a: a.num_train_epochs if a.max_train_steps is None else None,
    ),
    "max_train_steps": Flag(int, None, "train.steps", "optimizer steps, however long an epoch is"),
    "seed": Flag(
        int,
        None,
        "train.seed",
        "makes the run repeatable; without it one is drawn and stored with the run",
    ),
}
OPTIMIZER_FLAGS = {
    "learning_rate": Flag(
        float,
        1e-4,
        "optim.learning_rate",
        "learning rate after the warm-up",
        value=scale_learning_rate,
    ),
    "scale_lr": Flag(
        bool,
        False,
        "optim.learning_rate",
        "multiply it by accumulation, batch size and number of processes",
        value=scale_learning_rate,
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
        value=lambda a: "adamw8bit" if a.use_8bit_adam else "adamw",
    ),
    "adam_beta1": Flag(
        float, 0.9, "optim.betas", "decay of AdamW's first moment", value=collect_adam_betas
    ),
    "adam_beta2": Flag(
        float, 0.999, "optim.betas", "decay of AdamW's second moment", value=collect_adam_betas
    ),
    "adam_weight_decay": Flag(float, 1e-2, "optim.weight_decay", "decoupled weight decay"),
    "adam_epsilon": Flag(float, 1e-8, "optim.eps", "keeps AdamW's division finite"),
    "max_grad_norm": Flag(
        float, 1.0, "optim.max_grad_norm", "gradients with a larger norm are scaled down to it"
    ),
}
ENGINE_FLAGS = {
    "mixed_precision": Flag(
        str,
        None,
        "engine.precision",
        "number format of training; without it, what the launcher says, else float32",
        choices=PRECISIONS,
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
        value=lambda a: "xformers" if a.enable_xformers_memory_efficient_attention else "sdpa",
    ),
}
OUTPUT_FLAGS = {
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
        value=choose_resume_point,
    ),
    "report_to": Flag(
        str,
        "tensorboard",
        "log.to",
        "tensorboard, wandb, comet_ml, all (those installed) or none; metrics.jsonl is always "
        "written",
        value=choose_trackers,
    ),
    "logging_dir": Flag(
        str, "logs", "log.folder", "folder of the trackers' files, below the output folder"
    ),
    "push_to_hub": Flag(
        bool,
        False,
        "export.hub",
        "push the result, without checkpoints and logs",
        value=choose_hub_repository,
    ),
    "hub_model_id": Flag(
        str,
        None,
        "export.hub",
        "repository to push to; without it, the name of the output folder",
        value=choose_hub_repository,
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
COMMON_FLAGS = (
    MODEL_FLAGS
    | DATA_FLAGS
    | OBJECTIVE_FLAGS
    | TRAIN_FLAGS
    | OPTIMIZER_FLAGS
    | ENGINE_FLAGS
    | OUTPUT_FLAGS
)

# Flags of several scripts.
RANK = Flag(int, 4, "adapter.rank", "rank of the added matrices; alpha is equal to it")
USE_EMA = Flag(
    bool,
    False,
    "optim.ema",
    "keep a moving average of the weights, and export it",
    value=choose_ema_decay,
)
TRACKER_PROJECT = Flag(str, PROJECT, "log.project", "project under which the trackers file the run")
# Previews are one picture of each of several prompts, or several pictures of one prompt.
MANY_PROMPTS = {
    "validation_prompts": Flag(
        list,
        None,
        "preview.prompts",
        "one picture of each is made during training and at the end",
        value=collect_preview_prompts,
    ),
    "validation_epochs": Flag(
        int,
        5,
        "preview.every_epochs",
        "epochs from one preview to the next",
        value=choose_preview_epochs,
        needs="validation_prompts",
    ),
}
ONE_PROMPT = {
    "validation_prompt": Flag(
        str,
        None,
        "preview.prompts",
        "pictures of it are made during training and at the end",
        value=collect_preview_prompts,
    ),
    "validation_epochs": Flag(
        int,
        1,
        "preview.every_epochs",
        "epochs from one preview to the next",
        value=choose_preview_epochs,
        needs="validation_prompt",
    ),
    "num_validation_images": Flag(
        int,
        4,
        "preview.count",
        "pictures of the prompt; 0 for none",
        value=choose_preview_count,
        needs="validation_prompt",
    ),
}


def make_output_flag(default: str) -> Flag:
    """Return ``--output_dir`` with a script's default."""
    purpose = "folder that receives checkpoints, metrics, previews and the result"
    return Flag(str, default, "run", purpose)
