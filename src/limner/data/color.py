"""Pictures of any mode as 8-bit sRGB, by their ICC profiles where they have usable ones."""

import functools
import io
import math
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageCms, ImageFile

from limner.data.picture_file import Undecodable

Color = tuple[int, int, int]  # red, green, blue, 0 to 255
# What PIL calls the colour spaces of ICC profiles that it can convert from.
MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}
# By which Pillow multiplies grey of 2 and 4 bits, by what it calls their packing.
GREY_STEPS = {"L;2": 85, "L;4": 17}


def scale_key_color(picture: ImageFile.ImageFile) -> None:
    """Give the colour that is transparent in an opened PNG the range of its unpacked pixels, which
    Pillow does not."""
    key, tiles = picture.info.get("transparency"), picture.tile
    if picture.format != "PNG" or key is None or not tiles:
        return
    if tiles[0].args in GREY_STEPS:
        picture.info["transparency"] = key * GREY_STEPS[tiles[0].args]
    elif tiles[0].args == "RGB":
        # Of the 16 bits that the file has, the higher ones mean nothing.
        picture.info["transparency"] = tuple(value & 255 for value in key)


def flatten_to_srgb(picture: Image.Image, background: Color, scale: float) -> Image.Image:
    """Convert a picture of any mode to 8-bit sRGB, with ``background`` behind it.

    Args:
        scale: of ``find_scale``, of the whole picture that this one may be a part of.
    """
    if is_deep(picture.mode):
        picture = reduce_to_8_bits(picture, scale)
    if not picture.has_transparency_data:
        if picture.mode in ("P", "PA"):
            picture = picture.convert("RGB")
        return convert_to_srgb(picture)
    if picture.mode == "RGB" and max(picture.info["transparency"]) > 255:
        # Of a PNG of 16 bits PIL reduces the pixels, but not the colour that is transparent.
        picture.info["transparency"] = tuple(v >> 8 for v in picture.info["transparency"])
    if picture.mode == "La":
        # PIL converts premultiplied grey to LA only.
        picture = picture.convert("LA")
    opaque = "L" if picture.mode in ("1", "L", "LA") and has_grey_profile(picture) else "RGB"
    picture = picture.convert("RGBA")
    ground = Image.new("RGB", picture.size, background)
    return Image.composite(
        convert_to_srgb(picture.convert(opaque)), ground, picture.getchannel("A")
    )


def is_deep(mode: str) -> bool:
    """Whether a mode of PIL has more than 8 bits for a value."""
    return mode == "F" or mode.startswith("I")


def find_scale(strips: Iterable[Image.Image]) -> float:
    """Return what float grey values of a picture are multiplied by for 0 to 255; 1 for others.

    Integers hold 16 bits, in whatever type; floats lie within 0 to 1, or else within 0 to 255.
    """
    low, high, mode = math.inf, -math.inf, ""
    for strip in strips:
        mode = strip.mode
        if not is_deep(mode):
            return 1.0
        values = np.asarray(strip)
        # Of a value that is no number, both are none.
        low = float(np.minimum(low, values.min()))
        high = float(np.maximum(high, values.max()))
    if mode != "F":
        if low < 0 or high > 65535:
            raise Undecodable(f"grey values {low:.0f} to {high:.0f}; 0 to 65535 is expected")
        return 1.0
    if not (math.isfinite(low + high) and low >= 0 and high <= 255):
        raise Undecodable(f"float grey values {low:g} to {high:g}; 0 to 1 or 0 to 255 is expected")
    return 255.0 if high <= 1 else 1.0


def reduce_to_8_bits(picture: Image.Image, scale: float) -> Image.Image:
    """Convert grey of more than 8 bits to 8 bits."""
    values = np.asarray(picture)
    if picture.mode == "F":
        grey = np.rint(values * scale).astype(np.uint8)
    else:
        # 65535 / 255 is 257: division that rounds to the nearest.
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    reduced = Image.fromarray(grey)
    if "transparency" in picture.info:
        alpha = np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)
        reduced = Image.merge("LA", (reduced, Image.fromarray(alpha)))
    if "icc_profile" in picture.info:
        reduced.info["icc_profile"] = picture.info["icc_profile"]
    return reduced


def convert_to_srgb(picture: Image.Image) -> Image.Image:
    """Convert a picture by its ICC profile if it has a usable one, else by its mode."""
    icc = picture.info.get("icc_profile")
    if picture.mode == "1" and icc:
        picture = picture.convert("L")
    if icc and needs_conversion(icc, picture.mode):
        return apply_profile(picture, icc)
    if picture.mode == "LAB":
        return convert_lab(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def apply_profile(picture: Image.Image, icc: bytes) -> Image.Image:
    """Convert a picture from the colour space of an ICC profile to sRGB."""
    converted = ImageCms.profileToProfile(
        picture,
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    assert converted is not None
    return converted


def convert_lab(picture: Image.Image) -> Image.Image:
    """Convert CIE Lab, of the white that ICC profiles are connected by, to sRGB."""
    converted = ImageCms.profileToProfile(
        picture, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None
    return converted


def has_grey_profile(picture: Image.Image) -> bool:
    """Whether a picture has a usable profile of grey values."""
    icc: bytes = picture.info.get("icc_profile") or b""
    return bool(icc) and needs_conversion(icc, "L")


def has_unusable_profile(picture: Image.Image) -> bool:
    """Whether a picture has a profile that is ignored: one that cannot be read, or is meant for
    another kind of picture. Grey with a profile that is sRGB has a usable one."""
    if "icc_profile" not in picture.info:
        return False
    icc: bytes = picture.info["icc_profile"] or b""
    mode = picture.mode
    # Of a profile that cannot be unpacked, PIL keeps None.
    if not icc:
        return True
    is_transparent = picture.has_transparency_data
    if is_deep(mode) or mode in ("1", "L", "LA", "La"):
        if measure_profile(icc, "L") is not None:
            return False
        # Behind transparency, grey becomes RGB.
        return measure_profile(icc, "RGB") is None or (
            needs_conversion(icc, "RGB") and not is_transparent
        )
    if is_transparent or mode in ("P", "PA"):
        mode = "RGB"
    return measure_profile(icc, mode) is None


def needs_conversion(icc: bytes, mode: str) -> bool:
    """Whether a profile can be read, is meant for this mode, and is not sRGB."""
    change = measure_profile(icc, mode)
    return change is not None and change > 2


@functools.lru_cache(maxsize=64)
def measure_profile(icc: bytes, mode: str) -> int | None:
    """Return by how much, 0 to 255, a profile's conversion to sRGB changes values of its own mode
    at most: 255 for CMYK and Lab. None where it cannot be read, or is meant for another mode."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.xcolor_space.strip()
        if MODES.get(space) != mode:
            return None
        # sRGB has many profiles with many names: whether this is one is asked of its numbers.
        steps = np.arange(0, 256, 51, dtype=np.uint8)
        if mode == "RGB":
            colors = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        elif mode == "L":
            colors = steps[None]
        else:
            # Converting one pixel shows whether the profile works.
            apply_profile(Image.new(mode, (1, 1)), icc)
            return 255
        converted = np.asarray(apply_profile(Image.fromarray(colors), icc)).astype(int)
        return int(np.abs(converted - colors.reshape(1, len(colors[0]), -1)).max())
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return None
