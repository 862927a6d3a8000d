"""What each flag of the diffusers scripts must do to a config, written down by hand and apart from
the adapter's own table."""

from typing import Any

BIAS: dict[str, Any] = {
    f"objective.timestep_bias.{name}": value
    for name, value in (
        ("strategy", "later"),
        ("multiplier", 1.0),
        ("portion", 0.25),
        ("begin", 0),
        ("end", 1000),
    )
}
REACHED: dict[
    str, tuple[str, dict[str, Any]]
] = {  # flag: a command line with it, and all settings that then differ from those without any
    "pretrained_model_name_or_path": (
        "--pretrained_model_name_or_path=me/base",
        {"model.base": "me/base"},
    ),
    "revision": ("--revision=main", {"model.revision": "main"}),
    "variant": ("--variant=fp16", {"model.variant": "fp16"}),
    "cache_dir": ("--cache_dir=here", {"model.cache_dir": "here", "data.cache_dir": "here"}),
    "dataset_name": (
        "--dataset_name=me/set",
        {"data.hub": "me/set", "data.hub_files": "pictures", "data.folder": None},
    ),
    "dataset_config_name": (
        "--dataset_name=me/set --dataset_config_name=big",
        {
            "data.hub": "me/set",
            "data.hub_config": "big",
            "data.hub_files": "pictures",
            "data.folder": None,
        },
    ),
    "train_data_dir": ("--train_data_dir=mine", {"data.folder": "mine"}),
    "image_column": (
        "--dataset_name=me/set --image_column=photo",
        {
            "data.hub": "me/set",
            "data.image": "photo",
            "data.hub_files": "pictures",
            "data.folder": None,
        },
    ),
    "caption_column": ("--caption_column=words", {"data.caption": "words"}),
    "max_train_samples": ("--max_train_samples=9", {"data.max_records": 9}),
    "resolution": ("--resolution=64", {"data.size": 64}),
    "center_crop": ("--center_crop", {"data.crop": "center"}),
    "random_flip": ("--random_flip", {"data.flip": True}),
    "image_interpolation_mode": (
        "--image_interpolation_mode=nearest_exact",
        {"data.resample": "nearest_exact"},
    ),
    "dataloader_num_workers": ("--dataloader_num_workers=8", {"data.threads": 8}),
    "prediction_type": ("--prediction_type=v_prediction", {"objective.predict": "v_prediction"}),
    "snr_gamma": ("--snr_gamma=5", {"objective.min_snr": 5.0}),
    "noise_offset": ("--noise_offset=0.1", {"objective.noise_offset": 0.1}),
    "input_perturbation": ("--input_perturbation=0.1", {"objective.input_perturbation": 0.1}),
    "dream_training": ("--dream_training", {"objective.dream": 1.0}),
    "dream_detail_preservation": (
        "--dream_training --dream_detail_preservation=2",
        {"objective.dream": 2.0},
    ),
    "rank": ("--rank=16", {"adapter.rank": 16}),
    "train_batch_size": ("--train_batch_size=2", {"train.micro_batch_size": 2}),
    "gradient_accumulation_steps": (
        "--gradient_accumulation_steps=4",
        {"train.accumulation_steps": 4},
    ),
    "num_train_epochs": ("--num_train_epochs=3", {"train.epochs": 3.0}),
    "max_train_steps": ("--max_train_steps=7", {"train.steps": 7, "train.epochs": None}),
    "seed": ("--seed=0", {"train.seed": 0}),
    "learning_rate": ("--learning_rate=1e-5", {"optim.learning_rate": 1e-5}),
    "scale_lr": (
        "--scale_lr --train_batch_size=2",
        {"train.micro_batch_size": 2, "optim.learning_rate": 2e-4},
    ),
    "lr_scheduler": (
        "--lr_scheduler=cosine_with_restarts",
        {"optim.schedule": "cosine_with_restarts"},
    ),
    "lr_warmup_steps": ("--lr_warmup_steps=0", {"optim.warmup": 0}),
    "use_8bit_adam": ("--use_8bit_adam", {"optim.kind": "adamw8bit"}),
    "adam_beta1": ("--adam_beta1=0.5", {"optim.betas": [0.5, 0.999]}),
    "adam_beta2": ("--adam_beta2=0.95", {"optim.betas": [0.9, 0.95]}),
    "adam_weight_decay": ("--adam_weight_decay=0", {"optim.weight_decay": 0.0}),
    "adam_epsilon": ("--adam_epsilon=1e-6", {"optim.eps": 1e-6}),
    "max_grad_norm": ("--max_grad_norm=0.5", {"optim.max_grad_norm": 0.5}),
    "use_ema": ("--use_ema", {"optim.ema": 0.9999}),
    "offload_ema": ("--use_ema --offload_ema", {"optim.ema": 0.9999, "optim.ema_offload": True}),
    "foreach_ema": ("--foreach_ema", {}),
    "non_ema_revision": ("--non_ema_revision=non-ema", {"model.trained_revision": "non-ema"}),
    "mixed_precision": ("--mixed_precision=no", {"engine.precision": "no"}),
    "gradient_checkpointing": ("--gradient_checkpointing", {"engine.gradient_checkpointing": True}),
    "allow_tf32": ("--allow_tf32", {"engine.tf32": True}),
    "enable_xformers_memory_efficient_attention": (
        "--enable_xformers_memory_efficient_attention",
        {"engine.attention": "xformers"},
    ),
    "checkpointing_steps": ("--checkpointing_steps=2", {"checkpoint.every": 2}),
    "checkpoints_total_limit": ("--checkpoints_total_limit=1", {"checkpoint.keep": 1}),
    "resume_from_checkpoint": (
        "--resume_from_checkpoint=checkpoint-1500",
        {"checkpoint.resume": "checkpoint-1500"},
    ),
    "validation_prompts": (
        "--validation_prompts cat dog",
        {"preview.prompts": ["cat", "dog"], "preview.every_epochs": 5.0},
    ),
    "validation_prompt": (
        "--validation_prompt=cat",
        {"preview.prompts": ["cat"], "preview.count": 4, "preview.every_epochs": 1.0},
    ),
    "num_validation_images": (
        "--validation_prompt=cat --num_validation_images=2",
        {"preview.prompts": ["cat"], "preview.count": 2, "preview.every_epochs": 1.0},
    ),
    "validation_epochs": (
        "--validation_prompt=cat --validation_epochs=9",
        {"preview.prompts": ["cat"], "preview.count": 4, "preview.every_epochs": 9.0},
    ),
    "report_to": ("--report_to=wandb", {"log.to": ["wandb"]}),
    "logging_dir": ("--logging_dir=events", {"log.folder": "events"}),
    "tracker_project_name": ("--tracker_project_name=mine", {"log.project": "mine"}),
    "push_to_hub": ("--push_to_hub --output_dir=a/b/", {"run": "a/b/", "export.hub": "b"}),
    "hub_model_id": ("--push_to_hub --hub_model_id=me/mine", {"export.hub": "me/mine"}),
    "hub_token": ("--hub_token=hf_secret", {}),
    "local_rank": ("--local_rank=1", {}),
    "output_dir": ("--output_dir=there", {"run": "there"}),
    "pretrained_vae_model_name_or_path": (
        "--pretrained_vae_model_name_or_path=me/vae",
        {"model.vae": "me/vae"},
    ),
    "enable_npu_flash_attention": ("--enable_npu_flash_attention", {}),
    "proportion_empty_prompts": ("--proportion_empty_prompts=0.2", {"data.drop_caption": 0.2}),
    "timestep_bias_strategy": ("--timestep_bias_strategy=later", BIAS),
    "timestep_bias_multiplier": (
        "--timestep_bias_strategy=later --timestep_bias_multiplier=2",
        BIAS | {"objective.timestep_bias.multiplier": 2.0},
    ),
    "timestep_bias_begin": (
        "--timestep_bias_strategy=later --timestep_bias_begin=5",
        BIAS | {"objective.timestep_bias.begin": 5},
    ),
    "timestep_bias_end": (
        "--timestep_bias_strategy=later --timestep_bias_end=9",
        BIAS | {"objective.timestep_bias.end": 9},
    ),
    "timestep_bias_portion": (
        "--timestep_bias_strategy=later --timestep_bias_portion=0.5",
        BIAS | {"objective.timestep_bias.portion": 0.5},
    ),
    "train_text_encoder": ("--train_text_encoder", {"adapter.text_encoders": True}),
    "debug_loss": ("--debug_loss", {}),
}
