"""Contact sheets: pictures side by side with their captions."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from limner.storage import atomic


def draw_contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    *,
    heads: Sequence[str] = (),
    tile: int | None = None,
) -> Image.Image:
    """One row per caption, one column per picture, with captions at the left and column heads
    above; pictures uint8 [h, w, 3]."""
    side = tile or max(128, max(p.shape[0] for row in rows for p in row))
    font, margin, left, top = ImageFont.load_default(13), 6, 200, 28 if heads else 6
    sheet = Image.new(
        "RGB",
        (left + (side + margin) * max(map(len, rows)) + margin, top + (side + margin) * len(rows)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        pen.text((left + margin + x * (side + margin), 8), head, fill="black", font=font)
    for y, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        pen.multiline_text(
            (margin, top + y * (side + margin) + 8), wrap_text(caption, 26), fill="black", font=font
        )
        for x, picture in enumerate(row):
            scaled = Image.fromarray(picture).resize(
                (side, side),
                Image.Resampling.NEAREST if picture.shape[0] < side else Image.Resampling.LANCZOS,
            )
            sheet.paste(scaled, (left + margin + x * (side + margin), top + y * (side + margin)))
    return sheet


def read_picture(path: Path) -> np.ndarray:
    """A PNG file as uint8 [height, width, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def draw_sheet_of_files(paths: Sequence[Path], captions: Sequence[str], target: Path) -> None:
    """A contact sheet of pictures on disk, as many for each caption; whole or absent."""
    pictures = [read_picture(path) for path in paths]
    count = len(pictures) // len(captions)
    if not count:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with atomic.disk_errors(target):
        draw_contact_sheet(
            [pictures[i * count : (i + 1) * count] for i in range(len(captions))], captions
        ).save(temporary, format="PNG")
        os.replace(temporary, target)


def wrap_text(text: str, width: int) -> str:
    """Lines of at most ``width`` characters where words allow."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:6])
