"""Pictures as upright sRGB pixels, the same on every machine."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageColor, ImageFile

from limner.data.color import (
    Color,
    find_scale,
    flatten_to_srgb,
    has_unusable_profile,
    needs_conversion,
    scale_key_color,
)
from limner.data.geometry import Geometry
from limner.data.picture_file import (
    JPEG_SIGNATURE,
    Undecodable,
    check_memory,
    check_size,
    has_deep_key_color,
    open_content,
    read_file,
    read_orientation,
    translate_errors,
)
from limner.errors import InputError

RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
}
# libvips's names of the same filters.
KERNELS = {
    "lanczos": "lanczos3",
    "bicubic": "cubic",
    "bilinear": "linear",
}
MAX_SHRINK = 64  # the largest factor by which libvips shrinks, PIL does beyond
STRIP_PIXELS = 2**22  # that are converted to sRGB at once
LARGE = 2**26  # pixels from which a picture is halved, or more, before PIL resizes it
READING = 2  # counts the changes of what is read of a file: features of before are encoded again
RESIZED_BY_PIL = 50_000_000  # pixels that PIL may resize a picture to
# How the rows and columns of a picture become upright, by the orientation in its EXIF.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
# Warnings of libjpeg that leave the pixels whole.
HARMLESS_WARNINGS = re.compile(
    "extraneous bytes before marker|JFIF revision number|Adobe color transform"
    "|Invalid SOS parameters|bad ICC marker"
)

Picture = Path | bytes | np.ndarray | Image.Image
View = tuple[Geometry, str]  # a crop, and the filter that resizes


def parse_color(name: str) -> Color:
    """Return the colour of ``data.background``.

    Raises:
        InputError: when it names no opaque colour.
    """
    channels: tuple[int, ...]
    try:
        channels = ImageColor.getrgb(name)
    except ValueError:
        channels = ()
    if len(channels) != 3:
        raise InputError(
            f"data.background: {name!r} is no opaque colour; give a name such as white or gray, "
            "or #rrggbb"
        )
    red, green, blue = channels
    return red, green, blue


def decode(picture: Picture, *, background: str, max_pixels: int) -> np.ndarray:
    """Return a picture's pixels, upright, in sRGB and without transparency: uint8 [H, W, 3].

    Of an animation it is the first frame.

    Embedded ICC profiles of grey, RGB, CMYK and Lab are honoured; a profile that cannot be read, or
    is meant for another kind of picture, is ignored. Safe in threads. At most
    ``picture_file.MEMORY`` is taken.

    Args:
        picture: a file, a file's bytes, pixels (H,W / H,W,3 / H,W,4), or an image of PIL.
        background: the colour behind transparent pixels.
        max_pixels: a larger picture is refused by its header, before its pixels are unpacked.

    Raises:
        Undecodable: with the reason.
    """
    color = parse_color(background)
    with translate_errors():
        if isinstance(picture, np.ndarray):
            picture = convert_array(picture, max_pixels)
        if isinstance(picture, Image.Image):
            check_size(*picture.size, max_pixels)
            picture.load()
            return finish(picture, None, color)
        if isinstance(picture, Path):
            picture = read_file(picture)
        if not isinstance(picture, bytes | bytearray | memoryview):
            raise Undecodable(
                "a picture must be a path, bytes, an array or a PIL image; this is "
                f"{type(picture).__name__}"
            )
        return unpack(bytes(picture), color, max_pixels)


def unpack(content: bytes, background: Color, max_pixels: int) -> np.ndarray:
    """Unpack the pixels of a picture's file, upright and in sRGB."""
    picture = open_content(content)
    check_size(*picture.size, max_pixels)
    check_memory(picture, content)
    if picture.format == "JPEG":
        return finish(picture, decode_jpeg(picture, content), background)
    hides_deep_color = has_deep_key_color(picture)
    scale_key_color(picture)
    picture.load()
    if hides_deep_color:
        hide_deep_color(picture, content)
    return finish(picture, None, background)


def hide_deep_color(picture: ImageFile.ImageFile, content: bytes) -> None:
    """Make one colour of an unpacked PNG of 16 bits transparent. Pillow keeps the higher 8 bits,
    which other colours may have too."""
    key = picture.info.pop("transparency")
    lower = open_content(content)
    check_memory(lower, content)
    # The bytes of each value in reverse order: what Pillow keeps are then the lower ones.
    lower.tile = [type(tile)(*tile[:3], args="RGB;16L") for tile in lower.tile]
    lower.load()
    alpha = np.empty((picture.height, picture.width), np.uint8)
    for top, bottom in list_strips(picture):
        area = 0, top, picture.width, bottom
        values = np.asarray(picture.crop(area)).astype(np.uint16) << 8
        values |= np.asarray(lower.crop(area))
        alpha[top:bottom] = np.where((values == key).all(-1), 0, 255)
    picture.putalpha(Image.fromarray(alpha))


def decode_jpeg(picture: Image.Image, content: bytes) -> np.ndarray:
    """Return the pixels of an opened JPEG in PIL's mode, uint8 [H, W, 1, 3 or 4].

    They are PIL's to the bit, straight into an array and in less time; and what libjpeg warns of
    is refused unless it leaves the pixels whole.
    """
    import simplejpeg

    space = {"L": "GRAY"}.get(picture.mode, picture.mode)
    try:
        pixels = simplejpeg.decode_jpeg(content, space)
    except ValueError as error:
        if "Premature end of JPEG file" in str(error):
            raise Undecodable("cannot be read: image file is truncated") from error
        if not HARMLESS_WARNINGS.search(str(error)):
            raise Undecodable(f"damaged: {error}") from error
        try:
            pixels = simplejpeg.decode_jpeg(content, space, strict=False)
        except ValueError:
            # It was about the headers, of which simplejpeg takes no warning.
            picture.load()
            return np.array(picture).reshape(picture.height, picture.width, -1)
    # Printers' software, which alone writes CMYK, writes it inverted, as PIL assumes too.
    return np.invert(pixels, out=pixels) if picture.mode == "CMYK" else pixels


def finish(picture: Image.Image, unpacked: np.ndarray | None, background: Color) -> np.ndarray:
    """Return the pixels of a picture upright and in sRGB; what must be converted is so in strips,
    for which little memory is needed.

    Args:
        unpacked: the pixels, where they are not in ``picture``, which then has the rest.
    """
    width, height = picture.size
    pixels = unpacked
    if pixels is None or pixels.shape[2] != 3:
        pixels = np.empty((height, width, 3), np.uint8)
    icc = picture.info.get("icc_profile")
    if pixels is not unpacked or (icc and needs_conversion(icc, "RGB")):
        strips = list_strips(picture)
        scale = find_scale(take_rows(picture, unpacked, *rows) for rows in strips)
        for top, bottom in strips:
            strip = take_rows(picture, unpacked, top, bottom)
            pixels[top:bottom] = np.asarray(flatten_to_srgb(strip, background, scale))
    turn = UPRIGHT.get(read_orientation(picture))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def list_strips(picture: Image.Image) -> list[tuple[int, int]]:
    """Return the first row of each strip, and the row after its last."""
    rows = max(1, STRIP_PIXELS // picture.width)
    return [(top, min(top + rows, picture.height)) for top in range(0, picture.height, rows)]


def take_rows(
    picture: Image.Image, unpacked: np.ndarray | None, top: int, bottom: int
) -> Image.Image:
    """Return some rows of a picture, with its profile and what is transparent in it."""
    if unpacked is None:
        whole = (top, bottom) == (0, picture.height)
        return picture if whole else picture.crop((0, top, picture.width, bottom))
    size = picture.width, bottom - top
    strip = Image.frombytes(picture.mode, size, unpacked[top:bottom].tobytes())
    strip.info["icc_profile"] = picture.info.get("icc_profile")
    return strip


def convert_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    """Return pixels of any type as an image of PIL; see ``reduce_array``."""
    is_grey = array.ndim == 2
    is_color = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype.kind not in "biuf" or not (is_grey or is_color):
        raise Undecodable(
            "an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4); this is "
            f"{array.dtype} of shape {array.shape}"
        )
    check_size(array.shape[1], array.shape[0], max_pixels)
    return Image.fromarray(np.ascontiguousarray(reduce_array(array)))


def reduce_array(array: np.ndarray) -> np.ndarray:
    """Return numbers as uint8 where their range says what they mean.

    ``uint16`` has 16 bits, however dark the picture is. Other whole numbers lie within 0 to 255, or
    else within 0 to 65535; fractions within 0 to 1; and so do floats that are 0 and 1 only.

    Raises:
        Undecodable: for all other numbers.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return np.where(array, np.uint8(255), np.uint8(0))
    low, high = float(array.min()), float(array.max())
    is_float = array.dtype.kind == "f"
    is_16_bit = array.dtype.kind == "u" and array.dtype.itemsize == 2
    if is_float and 0 <= low <= high <= 1:
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if 0 <= low <= high <= 65535 and not (is_float and np.any(array != np.rint(array))):
        if high <= 255 and not is_16_bit:
            return array.astype(np.uint8)
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise Undecodable(
        f"an array must be uint8, or hold 0 to 1 or whole numbers of 0 to 255 or 65535; this is "
        f"{array.dtype} of {low:g} to {high:g}"
    )


def find_unused(picture: Path | bytes) -> tuple[bool, bool]:
    """Return what of a file that decodes is not used: whether there are further frames or pages,
    and whether there is a profile that cannot be used."""
    bad_profile = False
    try:
        content = read_file(picture) if isinstance(picture, Path) else picture
        opened = open_content(content)
        bad_profile = has_unusable_profile(opened)
        # What follows a JPEG in its file is a preview, a map or the other eye's view.
        is_jpeg = content.startswith(JPEG_SIGNATURE)
        return not is_jpeg and bool(getattr(opened, "is_animated", False)), bad_profile
    except MemoryError:
        raise
    # What follows can be damaged in any way; it is not used.
    except Exception:
        return False, bad_profile


def load_views(
    picture: Picture, views: Sequence[View], *, background: str, max_pixels: int
) -> list[np.ndarray]:
    """Return views of a picture that is decoded once, each uint8 [crop_height, crop_width, 3].

    Equal, to the bit, to ``crop`` of ``decode``. Safe in threads.

    Raises:
        Undecodable: with the reason.
    """
    pixels = decode(picture, background=background, max_pixels=max_pixels)
    return [crop(pixels, geometry, resample) for geometry, resample in views]


def crop(pixels: np.ndarray, geometry: Geometry, resample: str) -> np.ndarray:
    """Resize, crop and mirror pixels, uint8 [H, W, 3]: uint8 [crop_height, crop_width, 3].

    libvips makes them smaller, with the same filters as PIL in vector instructions (docs/log.md has
    speed and difference); all else is PIL's.
    """
    factors = pixels.shape[0] / geometry.height, pixels.shape[1] / geometry.width
    if resample in KERNELS and min(factors) >= 1 and 1 < max(factors) <= MAX_SHRINK:
        cropped = shrink_and_crop(pixels, geometry, KERNELS[resample])
    elif RESAMPLE[resample] is Image.Resampling.NEAREST:
        cropped = pick_and_crop(pixels, geometry)
    else:
        # The whole picture, not only the part that the crop needs: PIL keeps the borders of a part
        # in single precision, so that its bits could differ.
        size = geometry.width, geometry.height
        if pixels.shape[0] * pixels.shape[1] > LARGE:
            # PIL takes a copy of what it resizes: of a size near what is asked for.
            pixels = shrink(pixels, int(min(factors)))
        resized = pixels
        if size != pixels.shape[1::-1]:
            resized = np.asarray(Image.fromarray(pixels).resize(size, RESAMPLE[resample]))
        bottom = geometry.top + geometry.crop_height
        right = geometry.left + geometry.crop_width
        cropped = resized[geometry.top : bottom, geometry.left : right]
    return np.ascontiguousarray(cropped[:, ::-1] if geometry.flip else cropped)


def pick_and_crop(pixels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Resize pixels, uint8 [H, W, 3], to the nearest ones, as PIL does, and crop them."""
    crop_height, crop_width = geometry.shape
    rows = pick_nearest(pixels.shape[0], geometry.height)[geometry.top :][:crop_height]
    columns = pick_nearest(pixels.shape[1], geometry.width)[geometry.left :][:crop_width]
    return pixels[rows[:, None], columns]


def pick_nearest(count: int, wanted: int) -> np.ndarray:
    """Return which of ``count`` rows becomes each of the wanted ones, int64 [wanted]."""
    steps = np.full(wanted, count / wanted)
    steps[0] /= 2
    # A running sum, as PIL has it: a product would be rounded otherwise.
    return np.cumsum(steps).astype(np.int64).clip(max=count - 1)


def shrink(pixels: np.ndarray, factor: int, mode: str = "RGB") -> np.ndarray:
    """Make pixels, uint8 [H, W, 3], smaller by a whole factor, as PIL's ``reduce`` does, and
    convert them to another mode of PIL; in strips, for which little memory is needed."""
    if factor < 2 and mode == "RGB":
        return pixels
    factor = max(1, factor)
    rows = factor * max(1, STRIP_PIXELS // (factor * pixels.shape[1]))
    strips = (pixels[top : top + rows] for top in range(0, len(pixels), rows))
    return np.concatenate(
        [np.asarray(Image.fromarray(one).reduce(factor).convert(mode)) for one in strips]
    )


def shrink_and_crop(pixels: np.ndarray, geometry: Geometry, kernel: str) -> np.ndarray:
    """Make pixels, uint8 [H, W, 3], smaller with a filter of libvips, and crop them."""
    height, width = pixels.shape[:2]
    picture = load_vips().Image.new_from_memory(pixels.data, width, height, 3, "uchar")
    picture = picture.reducev(height / geometry.height, kernel=kernel)
    picture = picture.reduceh(width / geometry.width, kernel=kernel)
    crop_height, crop_width = geometry.shape
    picture = picture.crop(geometry.left, geometry.top, crop_width, crop_height)
    content = picture.write_to_memory()
    return np.frombuffer(content, np.uint8).reshape(crop_height, crop_width, 3)


@functools.cache
def load_vips() -> Any:
    """Load libvips, with one thread for each caller and no cache of its own."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    pyvips.cache_set_max(0)
    return pyvips


def decoder_versions() -> str:
    """Return the versions of what decodes and resizes: the last bits depend on them."""
    vips = load_vips()
    vips_version = ".".join(str(vips.version(part)) for part in range(3))
    return (
        f"reading {READING}, Pillow {PIL.__version__}, simplejpeg "
        f"{metadata.version('simplejpeg')}, libvips {vips_version}"
    )


def to_pixels(pictures: np.ndarray) -> np.ndarray:
    """Convert uint8 [n, H, W, 3] to float32 [n, 3, H, W] in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    pixels = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32)
    # Three operations in single precision, as torchvision's ``ToTensor`` and ``Normalize``.
    pixels /= np.float32(255)
    pixels -= np.float32(0.5)
    pixels /= np.float32(0.5)
    return pixels
