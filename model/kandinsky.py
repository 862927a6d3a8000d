"""Makes the base of a very small Kandinsky 2.2: trains CLIP towers, and puts an autoencoder, a new
prior and a new decoder beside them.

    python model/kandinsky.py PICTURES OUTPUT

PICTURES is a folder of RGBA files with ``metadata.jsonl``; OUTPUT receives ``prior/`` and
``decoder/``, two folders as the published model's, which ``model/kandinsky-prior.toml`` and
``model/kandinsky-decoder.toml`` train.

The text tower is the bundled model's text encoder with a new projection. The vision tower learns to
be near the text embedding of its caption (InfoNCE, arXiv:2103.00020), and to hold what the picture
looks like: a small MLP, used here only, reads the picture at 16x16 from the embedding. The MOVQ is
the bundled autoencoder in other clothes; unlike the published one's, its decoder has plain group
norms.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from PIL import Image
from text_encoder import read, tokens, wording
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from limner import bundled, rng

BUNDLED = Path(bundled.__file__).parent / "model"
WIDTH, SIDE = 160, 64  # of all embeddings; of the pictures that the vision tower sees
VISION = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "projection_dim": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 16,
}
PRIOR = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "num_layers": 4,
    "embedding_dim": WIDTH,
    "num_embeddings": 32,
    "additional_embeddings": 4,
}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 8,
    "block_out_channels": [64, 128, 128],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": [
        "ResnetDownsampleBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "SimpleCrossAttnDownBlock2D",
    ],
    "up_block_types": [
        "SimpleCrossAttnUpBlock2D",
        "SimpleCrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
    ],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "attention_head_dim": 32,
    "cross_attention_dim": WIDTH,
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
    "resnet_time_scale_shift": "scale_shift",
}
MOVQ = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIDE,
    "mid_block_add_attention": False,
    "norm_type": "group",
    "num_vq_embeddings": 64,
    "vq_embed_dim": 4,
}


def learn(
    what: str,
    params: list[nn.Parameter],
    loss_of: Callable[[int], tuple[torch.Tensor, str]],
    steps: int,
    rate: float,
) -> None:
    """AdamW with a warm-up and a cosine; ``loss_of`` takes the step, and gives the loss and what to
    print of it."""
    optimizer = torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    began = time.monotonic()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        loss, text = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(
                f"{what}, step {step + 1}: {text} ({(step + 1) / (time.monotonic() - began):.1f} "
                "steps/s)",
                flush=True,
            )


def seen(folder: Path, processor: CLIPImageProcessorPil) -> torch.Tensor:
    """All pictures on white as the vision tower sees them, [pictures, 3, 64, 64]."""
    pictures = []
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        rgba = Image.open(folder / json.loads(line)["file_name"]).convert("RGBA")
        pictures.append(
            Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        )
    return torch.from_numpy(np.stack(processor(pictures).pixel_values))


def towers(
    folder: Path, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil, steps: int, batch: int
) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The text tower, the vision tower, and the image embeddings of all pictures."""
    bare = CLIPTextModel.from_pretrained(BUNDLED / "text_encoder", dtype=torch.float32)
    settings = bare.config.to_dict() | {"projection_dim": WIDTH}
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            **{
                k: v
                for k, v in settings.items()
                if k not in ("architectures", "dtype", "transformers_version")
            }
        )
    )
    text.text_model.load_state_dict(bare.state_dict())
    text.text_model.requires_grad_(False)
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    readout = nn.Sequential(nn.Linear(WIDTH, 384), nn.GELU(), nn.Linear(384, 3 * 16 * 16))
    pictures, names = read(folder)
    target = F.avg_pool2d(torch.from_numpy(pictures - pictures.mean(0)), 2).flatten(1)
    images = seen(folder, processor)
    sharpness = nn.Parameter(torch.tensor(math.log(10.0)))

    def loss_of(step: int) -> tuple[torch.Tensor, str]:
        chosen = rng.at(0, "towers", step).permutation(len(names))[:batch]
        captions = [
            wording(names[i], rng.at(0, "towers wording", step * batch + k)) or names[i]
            for k, i in enumerate(chosen)
        ]
        image, said = (
            vision(images[chosen]).image_embeds,
            text(tokens(tokenizer, captions)).text_embeds,
        )
        likeness = (
            sharpness.clamp(max=math.log(100.0)).exp() * F.normalize(image) @ F.normalize(said).T
        )
        truth = torch.arange(batch)
        contrast = (F.cross_entropy(likeness, truth) + F.cross_entropy(likeness.T, truth)) / 2
        drawn = F.mse_loss(readout(image), target[chosen]) / target.square().mean()
        size = (image.square().mean() - 1).square() + (said.square().mean() - 1).square()
        hit = (likeness.argmax(1) == truth).float().mean()
        return (
            contrast + 4 * drawn + 0.1 * size,
            f"contrast {contrast.item():.3f}, nearest {hit.item():.2f}, unexplained "
            f"{drawn.item():.4f}",
        )

    learn(
        "towers",
        [text.text_projection.weight, *vision.parameters(), *readout.parameters(), sharpness],
        loss_of,
        steps,
        1e-3,
    )
    with torch.no_grad():
        embeds = torch.cat([vision.eval()(part).image_embeds for part in images.split(64)])
    return text, vision, embeds


def movq() -> VQModel:
    """The bundled autoencoder as a VQ model that does not quantize, its latents scaled to unit
    variance, so that nothing about it is left to train."""
    old, new = AutoencoderKL.from_pretrained(BUNDLED / "vae", dtype=torch.float32), VQModel(**MOVQ)
    scale, state = old.config.scaling_factor, old.state_dict()
    state["quant_conv.weight"], state["quant_conv.bias"] = (
        scale * state["quant_conv.weight"][:4],
        scale * state["quant_conv.bias"][:4],
    )  # the mean alone
    state["post_quant_conv.weight"] = state["post_quant_conv.weight"] / scale
    # What goes into quant_conv is eight numbers wide in the one and four in the other: the two
    # linear layers become one.
    mix = state["quant_conv.weight"][:, :, 0, 0]
    state["encoder.conv_out.bias"] = mix @ state["encoder.conv_out.bias"] + state["quant_conv.bias"]
    state["encoder.conv_out.weight"] = torch.einsum(
        "oi,ichw->ochw", mix, state["encoder.conv_out.weight"]
    )
    state["quant_conv.weight"], state["quant_conv.bias"] = (
        torch.eye(4)[:, :, None, None],
        torch.zeros(4),
    )
    new.load_state_dict(state | {"quantize.embedding.weight": new.quantize.embedding.weight})
    return new


def write_index(folder: Path, pipeline: str, components: dict[str, tuple[str, str]]) -> None:
    (folder / "model_index.json").write_text(
        json.dumps(
            {"_class_name": pipeline} | {k: list(v) for k, v in components.items()}, indent=2
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    a = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    text, vision, embeds = towers(a.pictures, tokenizer, processor, a.steps, 128)
    prior = PriorTransformer(**PRIOR)
    for name in ("positional_embedding", "prd_embedding"):
        nn.init.normal_(getattr(prior, name), std=0.02)
    prior.clip_mean.data, prior.clip_std.data = (
        embeds.mean(0, keepdim=True),
        embeds.std(0, keepdim=True),
    )
    for name, part in (
        ("text_encoder", text),
        ("image_encoder", vision),
        ("image_processor", processor),
        ("prior", prior),
    ):
        part.save_pretrained(a.output / "prior" / name)
    shutil.copytree(BUNDLED / "tokenizer", a.output / "prior" / "tokenizer", dirs_exist_ok=True)
    UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
    ).save_pretrained(a.output / "prior" / "scheduler")
    write_index(
        a.output / "prior",
        "KandinskyV22PriorPipeline",
        {
            "prior": ("diffusers", "PriorTransformer"),
            "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
            "tokenizer": ("transformers", "CLIPTokenizer"),
            "scheduler": ("diffusers", "UnCLIPScheduler"),
            "image_processor": ("transformers", "CLIPImageProcessor"),
        },
    )
    movq().save_pretrained(a.output / "decoder" / "movq")
    UNet2DConditionModel(**UNET).save_pretrained(a.output / "decoder" / "unet")
    noise = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "clip_sample": False,
        "thresholding": False,
    }
    DDPMScheduler(**noise, variance_type="fixed_small").save_pretrained(
        a.output / "decoder" / "scheduler"
    )
    components = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "movq": ("diffusers", "VQModel"),
        "scheduler": ("diffusers", "DDPMScheduler"),
    }
    write_index(a.output / "decoder", "KandinskyV22Pipeline", components)


if __name__ == "__main__":
    main()
