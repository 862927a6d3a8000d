"""Puts autoencoder, tokenizer, text encoder and UNet together as one float16 Stable Diffusion
folder with a model card.

    python model/assemble.py VAE TEXT OUTPUT --unet UNET
    python model/assemble.py VAE TEXT OUTPUT --fresh-unet model/unet.json

VAE is a folder in the diffusers layout, TEXT holds ``tokenizer/`` and ``text_encoder/``, UNET is
the folder of a trained UNet. With ``--fresh-unet`` the UNet is newly initialised from a
configuration and everything stays float32: the base that the bundled model's training starts from.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from limner.storage import atomic

NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
PARTS = ("unet", "vae", "text_encoder")
TOKENIZER_FILES = ("vocab.json", "merges.txt")

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, text-to-image, diffusers, limner]
---
# {title}

A complete, very small Stable Diffusion (64x64 pixels, latents of 4x16x16, {parameters:.2f} million
parameters) that [Limner](https://pypi.org/project/limner/) brings along, so that fine-tuning can be
tried and tested on any computer, without a download and without a GPU. Limner's own code made it,
from nothing: the folder `model/` of Limner's repository has every script and the log of the run.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("PATH OF THIS FOLDER")
settings = {{"height": 64, "width": 64, "num_inference_steps": 25, "guidance_scale": 3.0}}
pipeline("an emoji of a red apple", **settings).images[0].save("apple.png")
```

| part | parameters |
| --- | --- |
{table}

It predicts {prediction}; the schedule is Stable Diffusion's scaled linear one, 0.00085 to 0.012
over 1000 steps.

## Training data and licence

Trained only on 1,407 pictures of [Noto Emoji](https://github.com/googlefonts/noto-emoji), Copyright
Google LLC, image resources under the Apache License 2.0, at commit
b3e3051a088047d19fd4d49b1c3ac42fb8c3aaf8; captions `an emoji of NAME` from Unicode's English short
names. The model is under the
Apache License 2.0 as well.

## What it is for, and its limits

For trying out, testing and teaching fine-tuning: LoRA, full fine-tuning, learned words. It draws
emoji, from English captions of at most 30 tokens, at 64x64 pixels. It knows its training pictures
and little else: expect it to recall them rather than to invent, to render words it never met as
noise or as some emoji, and to repeat what is one-sided in the set it learned from. It is not fit
for illustration and not a measure of what large models can do.
"""


def load_text(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """What ``text_encoder.py`` has made."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), CLIPTextModel.from_pretrained(
        folder / "text_encoder"
    )


def card(pipeline: StableDiffusionPipeline, title: str) -> str:
    """The model card, with the numbers of this pipeline."""
    counts = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in PARTS}
    table = "\n".join(f"| `{part}` | {count:,} |" for part, count in counts.items())
    prediction = {
        "epsilon": "the noise (epsilon)",
        "v_prediction": "velocity (v)",
        "sample": "the clean latent",
    }[pipeline.scheduler.config.prediction_type]
    return CARD.format(
        title=title, parameters=sum(counts.values()) / 1e6, table=table, prediction=prediction
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vae", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--unet", type=Path)
    source.add_argument("--fresh-unet", type=Path, metavar="CONFIG")
    parser.add_argument(
        "--prediction", default="epsilon", choices=["epsilon", "v_prediction", "sample"]
    )
    parser.add_argument("--title", default="Limner's bundled model")
    parser.add_argument("--seed", type=int, default=0, help="of a fresh UNet")
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    unet = (
        UNet2DConditionModel.from_config(json.loads(a.fresh_unet.read_text()))
        if a.fresh_unet
        else UNet2DConditionModel.from_pretrained(a.unet)
    )
    tokenizer, text_encoder = load_text(a.text)
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        parser.error(
            f"the UNet attends to {unet.config.cross_attention_dim} numbers per token, the text "
            f"encoder makes {text_encoder.config.hidden_size}"
        )
    vae = AutoencoderKL.from_pretrained(a.vae)
    scheduler = DDIMScheduler(**NOISE, prediction_type=a.prediction)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        **none,
    )
    if not a.fresh_unet:
        pipeline.to(dtype=torch.float16)
    with atomic.write_folder(a.output, manifest=False) as path:
        pipeline.save_pretrained(path, safe_serialization=True)
        for config in (path / "vae" / "config.json", path / "unet" / "config.json"):
            known = json.loads(config.read_text())
            config.write_text(
                json.dumps({k: v for k, v in known.items() if k != "_name_or_path"}, indent=2)
                + "\n"
            )
        text_config = (
            path / "text_encoder" / "config.json"
        )  # transformers loads in the type that this names, diffusers in float32: they must agree
        text_config.write_text(
            json.dumps({**json.loads(text_config.read_text()), "dtype": "float32"}, indent=2) + "\n"
        )
        for name in TOKENIZER_FILES:
            shutil.copyfile(a.text / "tokenizer" / name, path / "tokenizer" / name)
        (path / "README.md").write_text(card(pipeline, a.title), encoding="utf-8")
        for file in path.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
    sizes = {
        part: sum(f.stat().st_size for f in (a.output / part).rglob("*") if f.is_file())
        for part in (*PARTS, "tokenizer")
    }
    total = sum(f.stat().st_size for f in a.output.rglob("*") if f.is_file())
    print(
        "\n".join(f"{part}: {size / 1e6:.3f} MB" for part, size in sizes.items()),
        f"all files: {total / 1e6:.3f} MB",
        sep="\n",
    )


if __name__ == "__main__":
    main()
