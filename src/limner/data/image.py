"""Pictures as upright sRGB pixels, the same on every machine."""

import functools
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageColor, ImageOps

from limner.data.geometry import Geometry
from limner.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
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
ORIENTATION_TAG = 0x0112  # of EXIF; 1 is upright

Picture = Path | bytes | np.ndarray | Image.Image
Color = tuple[int, int, int]  # red, green, blue, 0 to 255
View = tuple[Geometry, str]  # a crop, and the filter that resizes


class Undecodable(ValueError):
    """A picture that cannot be used; the message is the reason, without the picture's name."""


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


def decode(image: Picture, *, background: str, max_pixels: int) -> Image.Image:
    """Return a picture upright, in sRGB, without transparency; of an animation the first frame.

    Embedded ICC profiles of RGB and CMYK pictures are honoured; a profile that cannot be read, or
    is meant for another kind of picture, is ignored. Safe in threads.

    Args:
        image: a file, a file's bytes, uint8 pixels (H,W / H,W,3 / H,W,4), or an image of PIL.
        background: the colour behind transparent pixels.
        max_pixels: a larger picture is refused by its header, before its pixels are unpacked.

    Raises:
        Undecodable: with the reason.
    """
    color = parse_color(background)
    with translate_errors():
        if isinstance(image, np.ndarray):
            return flatten_to_srgb(convert_array(image, max_pixels), color)
        if isinstance(image, Image.Image):
            return unpack(image, color, max_pixels)
        if isinstance(image, bytes | bytearray | memoryview):
            return unpack(read_header(io.BytesIO(image)), color, max_pixels)
        if not isinstance(image, Path):
            raise Undecodable(
                "a picture must be a path, bytes, a uint8 array or a PIL image; this is "
                f"{type(image).__name__}"
            )
        # A pipe or a device could be read for ever.
        if image.exists() and not image.is_file():
            raise Undecodable("not a regular file")
        with open(image, "rb") as stream:
            return unpack(read_header(stream), color, max_pixels)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn whatever PIL raises about a picture into ``Undecodable``."""
    try:
        yield
    except (Undecodable, MemoryError):
        raise
    except FileNotFoundError:
        raise Undecodable("no such file") from None
    except OSError as error:
        raise Undecodable(f"cannot be read: {error.strerror or error}") from error
    # A damaged file can break its decoder in any way.
    except Exception as error:
        raise Undecodable(
            f"damaged: {error or type(error).__name__} ({type(error).__name__})"
        ) from error


def read_header(stream: IO[bytes]) -> Image.Image:
    """Open a picture by its header; its pixels stay packed."""
    # Not by ``Image.open``, which warns about, or refuses, sizes by one limit for the whole
    # process. The limit here is ``max_pixels``.
    prefix = stream.read(16)
    if not prefix:
        raise Undecodable("the file is empty")
    Image.init()
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        # PIL answers with a text for a format that it knows and was built without.
        if isinstance(accepted, str):
            raise Undecodable(f"{name} pictures need a Pillow that was built with {name}")
        if accepted:
            stream.seek(0)
            return factory(stream, "")
    raise Undecodable(f"not a picture in a known format ({', '.join(FORMATS)})")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture that is too large, or empty."""
    if width * height > max_pixels:
        raise Undecodable(
            f"{width}x{height} pixels are more than data.max_pixels = {max_pixels}: a "
            "decompression bomb?"
        )
    if width * height == 0:
        raise Undecodable(f"{width}x{height} pixels: an empty picture")


def unpack(picture: Image.Image, background: Color, max_pixels: int) -> Image.Image:
    """Unpack the pixels of an opened picture, upright and in sRGB."""
    check_size(*picture.size, max_pixels)
    picture.load()
    if picture.getexif().get(ORIENTATION_TAG, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    return flatten_to_srgb(picture, background)


def convert_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    """Return uint8 pixels as an image of PIL."""
    is_grey = array.ndim == 2
    is_color = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or not (is_grey or is_color):
        raise Undecodable(
            "an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4); this is "
            f"{array.dtype} of shape {array.shape}"
        )
    check_size(array.shape[1], array.shape[0], max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def flatten_to_srgb(picture: Image.Image, background: Color) -> Image.Image:
    """Convert a picture of any mode to 8-bit sRGB, with ``background`` behind it."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = reduce_to_8_bits(picture)
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
    picture = picture.convert("RGBA")
    ground = Image.new("RGB", picture.size, background)
    return Image.composite(convert_to_srgb(picture.convert("RGB")), ground, picture.getchannel("A"))


def reduce_to_8_bits(picture: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to 8 bits.

    Integers hold 16 bits, in whatever type; floats lie within 0 to 1, or else within 0 to 255.
    """
    values = np.asarray(picture)
    low = float(values.min())
    high = float(values.max())
    if picture.mode == "F":
        if not (math.isfinite(low + high) and low >= 0 and high <= 255):
            raise Undecodable(
                f"float grey values {low:g} to {high:g}; 0 to 1 or 0 to 255 is expected"
            )
        grey = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise Undecodable(f"grey values {low:.0f} to {high:.0f}; 0 to 65535 is expected")
        # 65535 / 255 is 257: division that rounds to the nearest.
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" not in picture.info:
        return Image.fromarray(grey)
    alpha = np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def convert_to_srgb(picture: Image.Image) -> Image.Image:
    """Convert a picture by its ICC profile if it has a usable one, else by its mode."""
    icc = picture.info.get("icc_profile")
    if icc and needs_conversion(icc, picture.mode):
        return apply_profile(picture, icc)
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


@functools.lru_cache(maxsize=64)
def needs_conversion(icc: bytes, mode: str) -> bool:
    """Whether a profile can be read, is meant for this mode, and is not sRGB."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.xcolor_space.strip()
        if mode not in ("RGB", "CMYK") or space != mode:
            return False
        if mode == "CMYK":
            # Converting one pixel shows whether the profile works.
            apply_profile(Image.new("CMYK", (1, 1)), icc)
            return True
        # sRGB has many profiles with many names: whether this is one is asked of its numbers.
        steps = np.arange(0, 256, 51, dtype=np.uint8)
        colors = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        converted = np.asarray(apply_profile(Image.fromarray(colors), icc)).astype(int)
        return bool(np.abs(converted - colors).max() > 2)
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return False


def load_views(
    picture: Picture, views: Sequence[View], *, background: str, max_pixels: int
) -> list[np.ndarray]:
    """Return views of a picture that is decoded once, each uint8 [crop_height, crop_width, 3].

    Equal, to the bit, to ``crop`` of ``decode``. Safe in threads.

    Raises:
        Undecodable: with the reason.
    """
    if isinstance(picture, bytes):
        with translate_errors():
            pixels = decode_plain_jpeg(picture, max_pixels)
            if pixels is not None:
                return [resize_and_crop(pixels, geometry, resample) for geometry, resample in views]
    decoded = decode(picture, background=background, max_pixels=max_pixels)
    return [crop(decoded, geometry, resample) for geometry, resample in views]


def decode_plain_jpeg(content: bytes, max_pixels: int) -> np.ndarray | None:
    """Return the pixels of an upright sRGB JPEG, uint8 [H, W, 3]; None for any other picture."""
    header = read_header(io.BytesIO(content))
    check_size(*header.size, max_pixels)
    if header.format != "JPEG" or header.mode != "RGB":
        return None
    icc = header.info.get("icc_profile")
    is_rotated = header.getexif().get(ORIENTATION_TAG, 1) != 1
    if is_rotated or (icc and needs_conversion(icc, "RGB")):
        return None
    import simplejpeg

    # Straight into an array: PIL's pixels to the bit, in less time.
    return simplejpeg.decode_jpeg(content, "RGB")


def crop(picture: Image.Image, geometry: Geometry, resample: str) -> np.ndarray:
    """Resize and crop a picture: uint8 [crop_height, crop_width, 3].

    libvips makes it smaller, with the same filters as PIL in vector instructions (docs/log.md has
    speed and difference); all else is PIL's.
    """
    return resize_and_crop(np.asarray(picture), geometry, resample)


def resize_and_crop(pixels: np.ndarray, geometry: Geometry, resample: str) -> np.ndarray:
    """Resize, crop and mirror pixels, uint8 [H, W, 3]; see ``crop``."""
    factors = pixels.shape[0] / geometry.height, pixels.shape[1] / geometry.width
    if resample in KERNELS and min(factors) >= 1 and 1 < max(factors) <= MAX_SHRINK:
        cropped = shrink_and_crop(pixels, geometry, KERNELS[resample])
    else:
        # The whole picture, not only the part that the crop needs: PIL keeps the borders of a part
        # in single precision, so that its bits could differ.
        size = geometry.width, geometry.height
        resized = np.asarray(Image.fromarray(pixels).resize(size, RESAMPLE[resample]))
        bottom = geometry.top + geometry.crop_height
        right = geometry.left + geometry.crop_width
        cropped = resized[geometry.top : bottom, geometry.left : right]
    return np.ascontiguousarray(cropped[:, ::-1] if geometry.flip else cropped)


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
    """Return the versions of the libraries that decode and resize: the last bits depend on them."""
    vips = load_vips()
    vips_version = ".".join(str(vips.version(part)) for part in range(3))
    return (
        f"Pillow {PIL.__version__}, simplejpeg {metadata.version('simplejpeg')}, libvips "
        f"{vips_version}"
    )


def to_pixels(pictures: np.ndarray) -> np.ndarray:
    """Convert uint8 [n, H, W, 3] to float32 [n, 3, H, W] in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    pixels = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32)
    # Three operations in single precision, as torchvision's ``ToTensor`` and ``Normalize``.
    pixels /= np.float32(255)
    pixels -= np.float32(0.5)
    pixels /= np.float32(0.5)
    return pixels
