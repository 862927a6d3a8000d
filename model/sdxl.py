"""Puts a very small Stable Diffusion XL together from the parts of the bundled model, with a new
UNet: the base that ``model/sdxl.toml`` trains.

    python model/sdxl.py OUTPUT

Both text encoders see with the bundled one's eyes. The first is the bundled one as it is. The
second has one new layer on top, so that its states before the last layer are what the bundled one
ends with, and a new projection for the pooled embedding.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from limner import bundled

BUNDLED = Path(bundled.__file__).parent / "model"
POOLED, TIME = 128, 32
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128, 128],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 320,
    "use_linear_projection": True,
    "time_embedding_dim": 192,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME,
    "projection_class_embeddings_input_dim": POOLED + 6 * TIME,
}


def assemble(output: Path) -> None:
    torch.manual_seed(0)
    first = CLIPTextModel.from_pretrained(BUNDLED / "text_encoder", dtype=torch.float32)
    settings = first.config.to_dict() | {
        "num_hidden_layers": first.config.num_hidden_layers + 1,
        "projection_dim": POOLED,
    }
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            **{
                k: v
                for k, v in settings.items()
                if k not in ("architectures", "dtype", "transformers_version")
            }
        )
    )
    missing, strange = second.text_model.load_state_dict(first.state_dict(), strict=False)
    assert not strange and all(
        f"layers.{first.config.num_hidden_layers}." in name for name in missing
    ), (missing, strange)
    torch.nn.init.normal_(second.text_projection.weight, std=first.config.hidden_size**-0.5)
    for name, part in (
        ("text_encoder", first),
        ("text_encoder_2", second),
        ("unet", UNet2DConditionModel(**UNET)),
    ):
        part.save_pretrained(output / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED / "tokenizer", output / name)
    shutil.copytree(BUNDLED / "vae", output / "vae")
    noise = json.loads((BUNDLED / "scheduler" / "scheduler_config.json").read_text())
    kept = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "steps_offset")
    EulerDiscreteScheduler(
        **{k: noise[k] for k in kept}, timestep_spacing="leading"
    ).save_pretrained(output / "scheduler")
    classes = {
        "vae": "AutoencoderKL",
        "unet": "UNet2DConditionModel",
        "scheduler": "EulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
    }
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    index |= {
        name: ["diffusers" if name in ("vae", "unet", "scheduler") else "transformers", kind]
        for name, kind in classes.items()
    }
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    assemble(parser.parse_args().output)
