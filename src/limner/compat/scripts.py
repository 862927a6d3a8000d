"""The diffusers text-to-image scripts: the flags of each, and the settings that no flag decides.

Another script is one more entry of ``SCRIPTS``, and a file in ``scripts/``.
"""

from limner.compat.common_flags import (
    COMMON_FLAGS,
    MANY_PROMPTS,
    ONE_PROMPT,
    PRECISIONS,
    PROJECT,
    RANK,
    TRACKER_PROJECT,
    USE_EMA,
    make_output_flag,
)
from limner.compat.flag import (
    Flag,
    Script,
    choose_dream_exponent,
    choose_preview_decoder,
    choose_timestep_bias,
    scale_flax_learning_rate,
)

KANDINSKY = "kandinsky-community/kandinsky-2-2"
SD_SETTINGS = {
    "model.family": "sd",
    "preview.guidance_scale": 7.5,
    # On resume another value of these is applied and reported; the diffusers scripts silently take
    # the checkpoint's.
    "checkpoint.allow_changes": [
        "optim.learning_rate",
        "optim.schedule",
        "optim.warmup",
        "optim.betas",
        "optim.weight_decay",
        "optim.eps",
        "optim.max_grad_norm",
    ],
}
SDXL_SETTINGS = SD_SETTINGS | {
    "model.family": "sdxl",
    "preview.guidance_scale": 5.0,
    "data.empty_caption": "encoded",
}

# Stable Diffusion.
SD_FULL = Script(
    COMMON_FLAGS
    | MANY_PROMPTS
    | {
        "output_dir": make_output_flag("sd-model-finetuned"),
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
            value=choose_dream_exponent,
        ),
        "dream_detail_preservation": Flag(
            float,
            1.0,
            "objective.dream",
            "DREAM's exponent, 0 or more",
            value=choose_dream_exponent,
            needs="dream_training",
        ),
        "use_ema": USE_EMA,
        "offload_ema": Flag(
            bool, False, "optim.ema_offload", "keep the average in host memory", needs="use_ema"
        ),
        "foreach_ema": Flag(
            bool,
            False,
            "",
            "it is not needed: the average is always updated in grouped operations",
        ),
        "tracker_project_name": TRACKER_PROJECT,
    },
    SD_SETTINGS | {"adapter.kind": "full", "preview.steps": 20},
)
SD_LORA = Script(
    COMMON_FLAGS
    | ONE_PROMPT
    | {"output_dir": make_output_flag("sd-model-finetuned-lora"), "rank": RANK},
    SD_SETTINGS | {"adapter.kind": "lora", "preview.steps": 30, "log.project": PROJECT},
)


# Stable Diffusion XL.
SDXL_FLAGS = {
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


def make_bias_flag(kind: type, default: float, purpose: str) -> Flag:
    """Return one of the numbers that shape the timestep bias."""
    return Flag(
        kind,
        default,
        "objective.timestep_bias",
        purpose,
        value=choose_timestep_bias,
        needs="timestep_bias_strategy",
    )


SDXL_FULL = Script(
    COMMON_FLAGS
    | SDXL_FLAGS
    | ONE_PROMPT
    | {
        "output_dir": make_output_flag("sdxl-model-finetuned"),
        "proportion_empty_prompts": Flag(
            float,
            0,
            "data.drop_caption",
            "probability of an empty caption, drawn anew for each example",
        ),
        "use_ema": USE_EMA,
        "timestep_bias_strategy": Flag(
            str,
            "none",
            "objective.timestep_bias",
            "which timesteps are drawn more often than others",
            value=choose_timestep_bias,
            choices=("earlier", "later", "range", "none"),
        ),
        "timestep_bias_multiplier": make_bias_flag(float, 1.0, "how many times as often"),
        "timestep_bias_begin": make_bias_flag(int, 0, "where range begins"),
        "timestep_bias_end": make_bias_flag(int, 1000, "where range ends"),
        "timestep_bias_portion": make_bias_flag(
            float, 0.25, "part of all timesteps, for earlier and later"
        ),
    },
    SDXL_SETTINGS | {"adapter.kind": "full", "preview.steps": 25, "log.project": f"{PROJECT}-sdxl"},
)
SDXL_LORA = Script(
    COMMON_FLAGS
    | SDXL_FLAGS
    | ONE_PROMPT
    | {
        "output_dir": make_output_flag("sd-model-finetuned-lora"),
        "rank": RANK,
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
    SDXL_SETTINGS | {"adapter.kind": "lora", "preview.steps": 50, "log.project": PROJECT},
)


# Kandinsky 2.2.
NOT_OF_KANDINSKY = {
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "center_crop",
    "random_flip",
    "image_interpolation_mode",
    "prediction_type",
    "noise_offset",
    "scale_lr",
}
XFORMERS = "enable_xformers_memory_efficient_attention"
LAYOUT = "a folder or a Hub repository in the diffusers layout"
PRIOR_MODELS = {
    "pretrained_prior_model_name_or_path": Flag(
        str, f"{KANDINSKY}-prior", "model.base", f"the prior that is trained: {LAYOUT}"
    ),
    "pretrained_decoder_model_name_or_path": Flag(
        str,
        f"{KANDINSKY}-decoder",
        "model.other_stage",
        "the decoder that previews are made with",
        value=choose_preview_decoder,
    ),
}
DECODER_MODELS = {
    "pretrained_decoder_model_name_or_path": Flag(
        str, f"{KANDINSKY}-decoder", "model.base", f"the decoder that is trained: {LAYOUT}"
    ),
    "pretrained_prior_model_name_or_path": Flag(
        str,
        f"{KANDINSKY}-prior",
        "model.other_stage",
        "the prior, whose image encoder sees the pictures",
    ),
}
KANDINSKY_FLAGS = {
    "adam_weight_decay": Flag(float, 0.0, "optim.weight_decay", "decoupled weight decay"),
    "train_batch_size": Flag(
        int, 1, "train.micro_batch_size", "examples that one process holds at once"
    ),
}
KANDINSKY_FULL_FLAGS = (
    KANDINSKY_FLAGS
    | {"output_dir": make_output_flag("kandi_2_2-model-finetuned")}
    | MANY_PROMPTS
    | {"use_ema": USE_EMA, "tracker_project_name": TRACKER_PROJECT}
)
KANDINSKY_LORA_FLAGS = (
    KANDINSKY_FLAGS
    | {"output_dir": make_output_flag("kandi_2_2-model-finetuned-lora")}
    | ONE_PROMPT
    | {"rank": RANK}
)
# The guide's command has it, though the decoders' scripts know no such flag.
DECODER_CAPTIONS = {
    "caption_column": Flag(
        str, None, "", "a decoder is told of pictures only; captions are not read"
    )
}
KANDINSKY_SETTINGS = SD_SETTINGS | {"preview.guidance_scale": 4.0, "data.resample": "bicubic"}
KANDINSKY_FULL_SETTINGS = KANDINSKY_SETTINGS | {"adapter.kind": "full", "preview.steps": 20}
KANDINSKY_LORA_SETTINGS = KANDINSKY_SETTINGS | {
    "adapter.kind": "lora",
    "preview.steps": 30,
    "log.project": PROJECT,
}


def select_kandinsky_flags(*without: str) -> dict[str, Flag]:
    """Return the common flags that a script of Kandinsky has, in their order."""
    missing = NOT_OF_KANDINSKY.union(without)
    return {name: flag for name, flag in COMMON_FLAGS.items() if name not in missing}


PRIOR_COMMON_FLAGS = select_kandinsky_flags("gradient_checkpointing", XFORMERS)
PRIOR_FULL = Script(
    PRIOR_COMMON_FLAGS | PRIOR_MODELS | KANDINSKY_FULL_FLAGS,
    KANDINSKY_FULL_SETTINGS | {"model.family": "kandinsky22-prior"},
)
PRIOR_LORA = Script(
    PRIOR_COMMON_FLAGS | PRIOR_MODELS | KANDINSKY_LORA_FLAGS,
    KANDINSKY_LORA_SETTINGS | {"model.family": "kandinsky22-prior"},
)
DECODER_FULL = Script(
    select_kandinsky_flags("caption_column")
    | DECODER_MODELS
    | KANDINSKY_FULL_FLAGS
    | DECODER_CAPTIONS,
    KANDINSKY_FULL_SETTINGS | {"model.family": "kandinsky22-decoder"},
)
DECODER_LORA = Script(
    select_kandinsky_flags("caption_column", XFORMERS)
    | DECODER_MODELS
    | KANDINSKY_LORA_FLAGS
    | DECODER_CAPTIONS,
    KANDINSKY_LORA_SETTINGS | {"model.family": "kandinsky22-decoder"},
)


# Stable Diffusion in JAX.
FLAX_SHARED = """
    pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir
    image_column caption_column max_train_samples output_dir cache_dir resolution center_crop
    random_flip train_batch_size num_train_epochs max_train_steps learning_rate scale_lr
    lr_scheduler adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub
    hub_token hub_model_id logging_dir report_to local_rank
""".split()  # noqa: SIM905
SD_FLAX = Script(
    {name: SD_FULL.flags[name] for name in FLAX_SHARED}
    | {
        "train_batch_size": Flag(
            int, 16, "train.micro_batch_size", "examples that one device holds at once"
        ),
        "learning_rate": Flag(
            float,
            1e-4,
            "optim.learning_rate",
            "learning rate",
            value=scale_flax_learning_rate,
        ),
        "scale_lr": Flag(
            bool,
            False,
            "optim.learning_rate",
            "multiply it by batch size and number of devices",
            value=scale_flax_learning_rate,
        ),
        "seed": Flag(int, 0, "train.seed", "makes the run repeatable"),
        "mixed_precision": Flag(
            str, "no", "engine.precision", "number format of training", choices=PRECISIONS
        ),
        "from_pt": Flag(
            bool,
            False,
            "",
            "weights are read from safetensors files as they are, whichever framework wrote them",
        ),
    },
    SD_SETTINGS
    | {
        "adapter.kind": "full",
        "engine.kind": "jax",
        "data.resample": "bilinear",
        "checkpoint.resume": "auto",
        "train.accumulation_steps": 1,
    },
)

SCRIPTS = {
    "train_text_to_image": SD_FULL,
    "train_text_to_image_lora": SD_LORA,
    "train_text_to_image_sdxl": SDXL_FULL,
    "train_text_to_image_lora_sdxl": SDXL_LORA,
    "train_text_to_image_prior": PRIOR_FULL,
    "train_text_to_image_decoder": DECODER_FULL,
    "train_text_to_image_lora_prior": PRIOR_LORA,
    "train_text_to_image_lora_decoder": DECODER_LORA,
    "train_text_to_image_flax": SD_FLAX,
}
