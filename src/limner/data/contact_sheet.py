"""Contact sheets: pictures side by side with their captions."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from limner.storage import atomic

MARGIN = 6  # pixels around every picture
CAPTION_WIDTH = 200  # pixels
HEAD_HEIGHT = 28  # pixels


def draw_contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    *,
    heads: Sequence[str] = (),
    tile: int | None = None,
) -> Image.Image:
    """Draw one row of pictures for each caption, with column heads above.

    Args:
        rows: of pictures, uint8 [height, width, 3].
        heads: one for each column, or none.
        tile: the side of a picture on the sheet; None: the largest height, at least 128.
    """
    side = tile or max(128, max(picture.shape[0] for row in rows for picture in row))
    pitch = side + MARGIN
    font = ImageFont.load_default(13)
    top = HEAD_HEIGHT if heads else MARGIN
    width = CAPTION_WIDTH + pitch * max(map(len, rows)) + MARGIN
    sheet = Image.new("RGB", (width, top + pitch * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        x = CAPTION_WIDTH + MARGIN + column * pitch
        pen.text((x, 8), head, fill="black", font=font)
    for line, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + line * pitch
        text = wrap_text(caption, 26)
        pen.multiline_text((MARGIN, y + 8), text, fill="black", font=font)
        for column, picture in enumerate(row):
            x = CAPTION_WIDTH + MARGIN + column * pitch
            sheet.paste(scale_to_square(picture, side), (x, y))
    return sheet


def scale_to_square(picture: np.ndarray, side: int) -> Image.Image:
    """Scale a picture to side x side; small ones keep their hard pixels."""
    enlarged = picture.shape[0] < side
    filter_ = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((side, side), filter_)


def read_picture(path: Path) -> np.ndarray:
    """Read a PNG file as uint8 [height, width, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def draw_sheet_of_files(paths: Sequence[Path], captions: Sequence[str], target: Path) -> None:
    """Write a contact sheet of pictures on disk, equally many for each caption; whole or absent."""
    pictures = [read_picture(path) for path in paths]
    count = len(pictures) // len(captions)
    if not count:
        return
    rows = [pictures[i * count : (i + 1) * count] for i in range(len(captions))]
    with atomic.replacing(target) as temporary:
        draw_contact_sheet(rows, captions).save(temporary, format="PNG")


def wrap_text(text: str, width: int) -> str:
    """Break a text into at most six lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width)[:6])
