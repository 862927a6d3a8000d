"""Decoding and resizing pictures: Limner's chain beside the one of diffusers' scripts, one thread
each, in turns.

    python benchmarks/decode.py

Synthetic JPEGs (noise of all scales, boxes, lines and text) stand for photographs. The reference
chain is PIL's decoder, Lanczos so that the shorter side fits, then torchvision's ``ToTensor`` and
``Normalize`` written out; Limner's is ``image.load`` and ``image.pixels``. Times are the best of
several rounds; the difference is in grey levels, over the whole resized picture.
"""

import io
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw

from limner.data import geometry, image
from limner.data.geometry import Geometry

CASES = [
    (4000, 3000, 1024, 90, "4:2:0"),
    (4000, 3000, 1024, 80, "4:4:4"),
    (1600, 1200, 512, 90, "4:2:0"),
    (1600, 1200, 512, 80, "4:4:4"),
]
ROUNDS = 8


def photograph(width: int, height: int, seed: int) -> Image.Image:
    draws, whole = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for level in range(2, 11):
        small = draws.standard_normal((2**level * height // width + 1, 2**level, 3)).astype(
            np.float32
        )
        large = [
            np.asarray(
                Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC)
            )
            for c in range(3)
        ]
        whole += 0.62**level * np.stack(large, -1)
    picture = Image.fromarray(
        ((whole - whole.min()) / (whole.max() - whole.min()) * 255).astype(np.uint8)
    )
    pen = ImageDraw.Draw(picture)
    for _ in range(40):
        x, y, x2, y2 = (int(v) for v in draws.integers(0, (width, height, width, height)))
        colours = [tuple(int(v) for v in draws.integers(0, 255, 3)) for _ in range(2)]
        pen.rectangle([x, y, x + width // 15, y + height // 20], fill=colours[0])
        pen.text((x, y), "limner paints", fill=colours[1], font_size=height // 40)
        pen.line([x, y, x2, y2], fill="black", width=2)
    return picture


def reference(content: bytes, shape: Geometry) -> torch.Tensor:
    """What the scripts do to one picture, as [3, height, width]."""
    picture = (
        Image.open(io.BytesIO(content))
        .convert("RGB")
        .resize((shape.width, shape.height), Image.Resampling.LANCZOS)
    )
    tensor = (
        torch.from_numpy(np.array(picture, np.uint8, copy=True))
        .view(picture.height, picture.width, 3)
        .permute(2, 0, 1)
        .contiguous()
    )
    tensor = tensor.to(torch.float32).div(255)
    return tensor.sub_(torch.full((3, 1, 1), 0.5)).div_(torch.full((3, 1, 1), 0.5))


def ours(content: bytes, shape: Geometry) -> np.ndarray:
    return image.to_pixels(
        image.load_views(content, [(shape, "lanczos")], background="white", max_pixels=10**9)[0][
            None
        ]
    )[0]


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    print(image.decoder_versions())
    print(
        "| JPEG | to | diffusers' chain | Limner's | ratio | difference: mean, 99.9 % below, "
        "largest | PSNR |\n|---|---|---|---|---|---|---|"
    )
    for i, (width, height, side, quality, chroma) in enumerate(CASES):
        stream = io.BytesIO()
        photograph(width, height, i).save(stream, "JPEG", quality=quality, subsampling=chroma)
        content = stream.getvalue()
        tall, wide = geometry.covering_size((height, width), (side, side))
        shape = Geometry(tall, wide, 0, 0, tall, wide, False)
        rows = []
        for _ in range(ROUNDS):
            pair = (partial(reference, content, shape), partial(ours, content, shape))
            rows.append([seconds(run) for run in pair])
        times = np.array(rows).min(0) * 1000
        off = np.abs(reference(content, shape).numpy() - ours(content, shape)) * 127.5
        noise = 10 * np.log10(255**2 / np.square(off).mean())
        print(
            f"| {width}x{height}, quality {quality}, {chroma} | {side} | {times[0]:.1f} ms | "
            f"{times[1]:.1f} ms | {times[0] / times[1]:.2f} "
            f"| {off.mean():.2f}, {np.percentile(off, 99.9):.0f}, {off.max():.0f} | {noise:.1f} "
            "dB |"
        )


if __name__ == "__main__":
    main()
