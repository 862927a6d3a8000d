"""Tiny random models and picture folders for tests: the real classes and file layout, a few hundred
kilobytes, made in a second."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 32  # pixels that the tiny model works at: latents of 16 x 16
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 50),
    "grey": (128, 128, 128),
    "pink": (250, 150, 190),
}
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [
    "r e",
    "re d</w>",
    "b l",
    "u e</w>",
    "bl ue</w>",
    "o f</w>",
    "a n</w>",
    "p h",
    "t o</w>",
    "ph o",
    "c i",
    "r c",
    "l e</w>",
    "ci rc",
    "circ le</w>",
]


def stable_diffusion(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    cross_attention_dim: int = 32,
    seed: int = 0,
    dtype: Any = None,
    variant: str | None = None,
    scheduler: dict[str, Any] | None = None,
    dropout: float = 0.0,
    shard: str | None = None,
    channels: tuple[int, ...] = (32, 64),
    attention: bool = True,
) -> Path:
    """Write a Stable Diffusion folder in the diffusers layout, all parameters random, and return
    it.

    Args:
        attention: whether the last of the UNet's levels looks at the caption, not only the middle.
        channels: of the UNet's levels.
        dtype: torch type of the weights; None: float32.
        variant: infix of the weight files, e.g. ``fp16``.
        scheduler: replaces single entries of the scheduler's config, e.g.
            ``{"rescale_betas_zero_snr": True}``.
        shard: largest size of a UNet weight file, e.g. ``100KB``; None: one file.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        looking = 1 if attention else 0
        plain = len(channels) - looking
        blocks = {
            "down_block_types": ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * looking,
            "up_block_types": ("CrossAttnUpBlock2D",) * looking + ("UpBlock2D",) * plain,
        }
        unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            block_out_channels=channels,
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=cross_attention_dim,
            dropout=dropout,
            **blocks,
        )
        coder = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        vae = AutoencoderKL(
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=1,
            latent_channels=4,
            sample_size=SIZE,
            **coder,
        )
        words = write_tokenizer(folder / "tokenizer")
        special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "projection_dim": 32,
        }
        text_encoder = CLIPTextModel(
            CLIPTextConfig(vocab_size=words, hidden_act="quick_gelu", **shape, **special)
        )
        for name, model in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            sharding = {"max_shard_size": shard} if shard and name == "unet" else {}
            model.to(dtype or torch.float32).save_pretrained(
                folder / name, variant=variant, **sharding
            )
    write_scheduler(folder / "scheduler", prediction_type, scheduler or {})
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def stable_diffusion_xl(
    folder: Path,
    *,
    seed: int = 0,
    latent_channels: int = 4,
    force_zeros: bool = True,
    prediction_type: str = "epsilon",
    shallow: bool = False,
) -> Path:
    """Write a Stable Diffusion XL folder in the diffusers layout, all parameters random, and return
    it; widths of the two text encoders differ.

    Args:
        shallow: whether the UNet has one level, not two, and looks at the caption in its middle
            alone, and the text encoders two layers, not three.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = write_tokenizer(folder / "tokenizer")
        write_tokenizer(folder / "tokenizer_2", pad="!")
        special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
        shape = {
            "intermediate_size": 64,
            "num_hidden_layers": 2 if shallow else 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
        }
        first = CLIPTextConfig(
            vocab_size=words,
            hidden_act="quick_gelu",
            hidden_size=32,
            projection_dim=32,
            **shape,
            **special,
        )
        second = CLIPTextConfig(
            vocab_size=words,
            hidden_act="gelu",
            hidden_size=48,
            projection_dim=40,
            **shape,
            **special,
        )
        unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            in_channels=4,
            block_out_channels=(64,) if shallow else (32, 64),
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=(8,) if shallow else (4, 8),
            cross_attention_dim=80,
            transformer_layers_per_block=(2,) if shallow else (1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=40 + 6 * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[: 1 if shallow else 2],
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[1 if shallow else 0 :],
        )
        coder = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        vae = AutoencoderKL(
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=1,
            latent_channels=latent_channels,
            sample_size=SIZE,
            scaling_factor=0.13025,
            **coder,
        )
        parts = {
            "unet": unet,
            "vae": vae,
            "text_encoder": CLIPTextModel(first),
            "text_encoder_2": CLIPTextModelWithProjection(second),
        }
        for name, model in parts.items():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(folder / name)
    write_scheduler(
        folder / "scheduler", prediction_type, {"_class_name": "EulerDiscreteScheduler"}
    )
    diffusers, transformers = (
        ("unet", "vae"),
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    )
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.42.1",
        "force_zeros_for_empty_prompt": force_zeros,
    }
    index |= {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    index |= {name: ["diffusers", type(parts[name]).__name__] for name in diffusers}
    index |= {
        name: ["transformers", type(parts[name]).__name__ if name in parts else "CLIPTokenizer"]
        for name in transformers
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def stable_diffusion_3(folder: Path, *, seed: int = 0) -> Path:
    """Write a Stable Diffusion 3.5 folder: the transformer has one block with a second attention
    and one without, the text encoders are two CLIPs and a T5."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    folder = Path(folder)
    words = write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="!")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,", "▁red", "▁circle"]
    letters = T5Tokenizer(
        vocab=[(piece, -len(piece) / 8) for piece in pieces], extra_ids=0, model_max_length=512
    )

    def make_clip(width: int, projection: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=projection,
            hidden_act="gelu",
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=0,
        )
        return CLIPTextModelWithProjection(config)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=SIZE // 2,
                patch_size=2,
                in_channels=8,
                out_channels=8,
                num_layers=3,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=48,
                caption_projection_dim=32,
                pooled_projection_dim=24,
                pos_embed_max_size=24,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(
                block_out_channels=(16, 32),
                norm_num_groups=8,
                layers_per_block=1,
                latent_channels=8,
                sample_size=SIZE,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=make_clip(16, 8),
            text_encoder_2=make_clip(24, 16),
            text_encoder_3=T5EncoderModel(
                T5Config(
                    vocab_size=len(pieces),
                    d_model=48,
                    d_kv=8,
                    d_ff=64,
                    num_layers=2,
                    num_heads=4,
                    feed_forward_proj="gated-gelu",
                )
            ),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            tokenizer_3=letters,
        )
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            for parameter in getattr(pipeline, name).parameters():
                # Layers that begin as zeros or ones would hide what they do.
                if parameter.ndim == 1 or not parameter.any():
                    parameter.data += 0.1 * torch.randn_like(parameter)
        pipeline.save_pretrained(folder)
    return folder


def kandinsky22(folder: Path, *, seed: int = 0, width: int = 32) -> Path:
    """Write a Kandinsky 2.2, ``prior`` and ``decoder`` in the diffusers layout, all parameters
    random, and return the folder of both.

    Args:
        width: of all embeddings.
    """
    import torch
    from diffusers import (
        DDPMScheduler,
        PriorTransformer,
        UnCLIPScheduler,
        UNet2DConditionModel,
        VQModel,
    )
    from transformers import (
        CLIPImageProcessorPil,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    prior, decoder = Path(folder) / "prior", Path(folder) / "decoder"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = write_tokenizer(prior / "tokenizer")
        shape = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        special = {
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            "pad_token_id": words - 1,
            "max_position_embeddings": 77,
        }
        transformer = PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=width
        )
        unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            in_channels=4,
            out_channels=8,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=16,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32,
            encoder_hid_dim=width,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            resnet_time_scale_shift="scale_shift",
        )
        movq = VQModel(
            block_out_channels=(32, 64),
            norm_num_groups=8,
            layers_per_block=1,
            latent_channels=4,
            sample_size=SIZE,
            num_vq_embeddings=12,
            vq_embed_dim=4,
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_type="spatial",
        )
        parts = {
            "prior/prior": transformer,
            "prior/text_encoder": CLIPTextModelWithProjection(
                CLIPTextConfig(vocab_size=words, hidden_act="gelu", **shape, **special)
            ),
            "prior/image_encoder": CLIPVisionModelWithProjection(
                CLIPVisionConfig(image_size=24, patch_size=8, **shape)
            ),
            "decoder/unet": unet,
            "decoder/movq": movq,
        }
        for name, model in parts.items():
            for parameter in (p for p in model.parameters() if p.ndim == 1 or p.shape[0] == 1):
                parameter.data += 0.1 * torch.randn_like(parameter)
            if name == "prior/prior":
                model.clip_std.data = 0.5 + torch.rand_like(model.clip_std)
            model.save_pretrained(Path(folder) / name)
    CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    ).save_pretrained(prior / "image_processor")
    UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
    ).save_pretrained(prior / "scheduler")
    noise = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "clip_sample": False,
    }
    DDPMScheduler(variance_type="learned_range", **noise).save_pretrained(decoder / "scheduler")
    transformers = ("text_encoder", "image_encoder", "tokenizer", "image_processor")
    index: dict[str, Any] = {
        "_class_name": "KandinskyV22PriorPipeline",
        "_diffusers_version": "0.42.1",
    }
    index |= {
        name: ["transformers", type(parts[f"prior/{name}"]).__name__] for name in transformers[:2]
    }
    index |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    }
    (prior / "model_index.json").write_text(
        json.dumps(
            index
            | {
                "prior": ["diffusers", "PriorTransformer"],
                "scheduler": ["diffusers", "UnCLIPScheduler"],
            },
            indent=2,
        )
    )
    index = {
        "_class_name": "KandinskyV22Pipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (decoder / "model_index.json").write_text(
        json.dumps(
            index
            | {"unet": ["diffusers", "UNet2DConditionModel"], "movq": ["diffusers", "VQModel"]},
            indent=2,
        )
    )
    return Path(folder)


def write_scheduler(folder: Path, prediction_type: str, changes: dict[str, Any]) -> None:
    """The scheduler config of Stable Diffusion 1.x."""
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.42.1",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(config | changes, indent=2))


def write_tokenizer(folder: Path, merges: Sequence[str] = MERGES, pad: str = END) -> int:
    """A CLIP tokenizer of all bytes and a few merges, in the old files and the new; returns the
    size of its vocabulary."""
    from transformers import CLIPTokenizer

    alphabet = byte_alphabet()
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *(pair.replace(" ", "") for pair in merges),
        START,
        END,
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair.split()) for pair in merges],
        model_max_length=77,
        pad_token=pad,
    ).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )
    return len(vocabulary)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def pictures(
    folder: Path,
    count: int,
    *,
    size: tuple[int, int] = (40, 36),
    seed: int = 0,
    captions: Sequence[Any] | None = None,
    column: str = "text",
) -> Path:
    """Write ``count`` captioned pictures, (height, width) ``size``, each with a coloured disc of
    its own, and their ``metadata.jsonl``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    rows = []
    for i in range(count):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        centre, radius = draws.uniform(0.3, 0.7, 2) * size, draws.uniform(0.15, 0.4) * min(size)
        pixels = np.full((*size, 3), 255, np.float64) - draws.uniform(0, 30, (*size, 3))
        pixels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = colour
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
        rows.append(
            {
                "file_name": f"{i:03}.png",
                column: captions[i] if captions else f"a {name} circle, number {i}",
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


PIECE = 10_000  # numbers, so that some arrays of a Flax model come in several


def packed(array: np.ndarray) -> Any:
    """An array as flax's serialization has it."""
    import msgpack

    def one(part: np.ndarray) -> Any:
        return msgpack.ExtType(
            1, msgpack.packb((part.shape, part.dtype.name, part.tobytes()), use_bin_type=True)
        )

    if array.size <= PIECE:
        return one(array)
    flat = array.reshape(-1)
    chunks = {
        str(i): one(flat[start : start + PIECE])
        for i, start in enumerate(range(0, flat.size, PIECE))
    }
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": chunks,
    }


def flax_name(name: str, array: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Where Flax's classes keep a torch array, and how it lies there."""
    *path, last = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
    if "layers_" in name.replace(".layers.", ".layers_"):
        path = [
            part
            for piece in path
            for part in (piece.split("_") if re.fullmatch(r"layers_\d+", piece) else [piece])
        ]
    if last == "weight" and array.ndim == 1:
        last = "scale"
    elif "embedding" in path[-1] and path[-1].endswith("_embedding") and "time" not in path[-1]:
        last = "embedding"
    elif last == "weight":
        last, array = "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return [*path, last], array


def as_flax(base: Path, target: Path) -> Path:
    """A folder of Stable Diffusion (or XL) as a Flax repository would hold it."""
    import msgpack
    from safetensors.numpy import load_file

    shutil.copytree(base, target)
    files = {
        "unet": "diffusion_flax_model",
        "vae": "diffusion_flax_model",
        "text_encoder": "flax_model",
        "text_encoder_2": "flax_model",
    }
    for component, file in ((name, file) for name, file in files.items() if (base / name).is_dir()):
        [weights] = (target / component).glob("*.safetensors")
        tree: dict[str, Any] = {}
        for name, array in load_file(weights).items():
            prefix = (
                "text_model."
                if component.startswith("text_encoder") and not name.startswith("text_")
                else ""
            )
            path, array = flax_name(prefix + name, array)
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = packed(np.ascontiguousarray(array))
        weights.unlink()
        (target / component / f"{file}.msgpack").write_bytes(msgpack.packb(tree))
        known = json.loads((target / component / "config.json").read_text())
        known = {k: f"Flax{v}" if k == "_class_name" else v for k, v in known.items()}
        (target / component / "config.json").write_text(json.dumps(known))
    index = json.loads((target / "model_index.json").read_text())
    classes = {
        "unet": "FlaxUNet2DConditionModel",
        "vae": "FlaxAutoencoderKL",
        "text_encoder": "FlaxCLIPTextModel",
        "scheduler": f"Flax{index['scheduler'][1]}",
    }
    classes |= (
        {"text_encoder_2": "FlaxCLIPTextModelWithProjection"} if "text_encoder_2" in index else {}
    )
    index |= {"_class_name": f"Flax{index['_class_name']}"} | {
        name: [index[name][0], kind] for name, kind in classes.items()
    }
    index |= (
        {"safety_checker": ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]}
        if "text_encoder_2" not in index
        else {}
    )
    (target / "model_index.json").write_text(json.dumps(index))
    return target
