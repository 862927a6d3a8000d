"""A picture file becomes the same upright sRGB pixels on every machine, or one reason why not."""

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
Picture = Path | bytes | np.ndarray | Image.Image
_ORIENTATION = 0x0112
KERNELS = {
    "lanczos": "lanczos3",
    "bicubic": "cubic",
    "bilinear": "linear",
}  # libvips's names of the same filters
FARTHEST = 64  # times smaller


class Undecodable(ValueError):
    """A picture that cannot be used; the message is the reason, without the picture's name."""


def parse_color(name: str) -> tuple[int, int, int]:
    """The red, green and blue of ``data.background``.

    Raises:
        InputError: when it names no opaque colour.
    """
    try:
        rgb = ImageColor.getrgb(name)
    except ValueError:
        rgb = ()  # type: ignore[assignment]
    if len(rgb) != 3:
        raise InputError(
            f"data.background: {name!r} is no opaque colour; give a name such as white or gray, "
            "or #rrggbb"
        )
    return rgb[0], rgb[1], rgb[2]


def decode(image: Picture, *, background: str, max_pixels: int) -> Image.Image:
    """The picture upright, in sRGB, without transparency; of an animation the first frame.

    Embedded ICC profiles of RGB and CMYK pictures are honoured; a profile that cannot be read, or
    is meant for another kind of picture, is as good as none. Safe in threads.

    Args:
        image: a file, a file's bytes, uint8 pixels (H,W / H,W,3 / H,W,4), or an image of PIL.
        background: what shows through transparent pixels.
        max_pixels: a larger picture is refused by its header, before its pixels are unpacked.

    Raises:
        Undecodable: with the reason.
    """
    ground = parse_color(background)
    with _reasons():
        if isinstance(image, np.ndarray):
            return _rgb(_of_array(image, max_pixels), ground)
        if isinstance(image, Image.Image):
            return _upright_rgb(image, ground, max_pixels)
        if isinstance(image, bytes | bytearray | memoryview):
            return _upright_rgb(_open(io.BytesIO(image)), ground, max_pixels)
        if not isinstance(image, Path):
            raise Undecodable(
                "a picture must be a path, bytes, a uint8 array or a PIL image; this is "
                f"{type(image).__name__}"
            )
        if image.exists() and not image.is_file():
            raise Undecodable("not a regular file")
        with open(image, "rb") as stream:
            return _upright_rgb(_open(stream), ground, max_pixels)


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever PIL raises about a picture, as one kind of fault."""
    try:
        yield
    except (Undecodable, MemoryError):
        raise
    except FileNotFoundError:
        raise Undecodable("no such file") from None
    except OSError as error:
        raise Undecodable(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise Undecodable(
            f"damaged: {error or type(error).__name__} ({type(error).__name__})"
        ) from error


def _open(stream: IO[bytes]) -> Image.Image:
    """Read the header. ``Image.open`` would warn about, or refuse, sizes by a limit of the whole
    process; ours is ``max_pixels``."""
    prefix = stream.read(16)
    if not prefix:
        raise Undecodable("the file is empty")
    Image.init()
    for name in [name for name in FORMATS if name in Image.OPEN]:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if isinstance(accepted, str):
            raise Undecodable(f"{name} pictures need a Pillow that was built with {name}")
        if accepted:
            stream.seek(0)
            return factory(stream, "")
    raise Undecodable(f"not a picture in a known format ({', '.join(FORMATS)})")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Undecodable(
            f"{width}x{height} pixels are more than data.max_pixels = {max_pixels}: a "
            "decompression bomb?"
        )
    if width * height == 0:
        raise Undecodable(f"{width}x{height} pixels: an empty picture")


def _upright_rgb(
    picture: Image.Image, ground: tuple[int, int, int], max_pixels: int
) -> Image.Image:
    _check_pixels(*picture.size, max_pixels)
    picture.load()
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    return _rgb(picture, ground)


def _of_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    ):
        raise Undecodable(
            "an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4); this is "
            f"{array.dtype} of shape {array.shape}"
        )
    _check_pixels(array.shape[1], array.shape[0], max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(picture: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if not picture.has_transparency_data:
        return _srgb(picture.convert("RGB") if picture.mode in ("P", "PA") else picture)
    if picture.mode == "RGB" and max(picture.info["transparency"]) > 255:
        picture.info["transparency"] = tuple(
            v >> 8 for v in picture.info["transparency"]
        )  # a 16-bit PNG: PIL reduces its pixels, not its key
    picture = (
        picture.convert("LA").convert("RGBA") if picture.mode == "La" else picture.convert("RGBA")
    )
    return Image.composite(
        _srgb(picture.convert("RGB")),
        Image.new("RGB", picture.size, ground),
        picture.getchannel("A"),
    )


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Greyscale of 16 bits, of 32-bit integers that hold 16, and of floats within 0 to 1, or else 0
    to 255, as 8 bits."""
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F":
        if not (math.isfinite(low + high) and low >= 0 and high <= 255):
            raise Undecodable(
                f"float grey values {low:g} to {high:g}; 0 to 1 or 0 to 255 is expected"
            )
        grey = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise Undecodable(f"grey values {low:.0f} to {high:.0f}; 0 to 65535 is expected")
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" not in picture.info:
        return Image.fromarray(grey)
    alpha = np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _srgb(picture: Image.Image) -> Image.Image:
    icc = picture.info.get("icc_profile")
    if not icc or not _needs_conversion(icc, picture.mode):
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    return _through(picture, icc)


def _through(picture: Image.Image, icc: bytes) -> Image.Image:
    converted = ImageCms.profileToProfile(
        picture,
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    assert converted is not None
    return converted


@functools.lru_cache(maxsize=64)
def _needs_conversion(icc: bytes, mode: str) -> bool:
    """Whether a profile can be read, is meant for this mode, and is another colour space than sRGB
    (asked of numbers, not of its name)."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.xcolor_space.strip()
        if mode not in ("RGB", "CMYK") or space != mode:
            return False
        if mode == "CMYK":
            probe = Image.new("CMYK", (1, 1))
            return _through(probe, icc) is not None
        steps = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        moved = np.asarray(_through(Image.fromarray(colours), icc)).astype(int) - colours
        return bool(np.abs(moved).max() > 2)
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return False


View = tuple[Geometry, str]  # how a picture is cut, and by what filter it is resized


def load_views(
    picture: Picture, views: Sequence[View], *, background: str, max_pixels: int
) -> list[np.ndarray]:
    """Views of a picture that is decoded once: each uint8 [crop_height, crop_width, 3]; equal, to
    the bit, to ``cut`` of ``decode``.

    A plain JPEG (RGB, upright, sRGB) is unpacked straight into an array. Safe in threads.

    Raises:
        Undecodable: with the reason.
    """
    if isinstance(picture, bytes):
        with _reasons():
            header = _open(io.BytesIO(picture))
            _check_pixels(*header.size, max_pixels)
            if header.format == "JPEG" and header.mode == "RGB" and not _needs_care(header):
                import simplejpeg

                pixels = simplejpeg.decode_jpeg(picture, "RGB")
                return [_part(pixels, shape, resample) for shape, resample in views]
    decoded = decode(picture, background=background, max_pixels=max_pixels)
    return [crop(decoded, shape, resample) for shape, resample in views]


def crop(picture: Image.Image, shape: Geometry, resample: str) -> np.ndarray:
    """The part as uint8 [crop_height, crop_width, 3].

    Made smaller by libvips, which computes the same filters as PIL with vector instructions
    (docs/log.md has speed and difference), else by PIL. PIL resizes the whole picture, not only
    what the part needs: it keeps boxes in single precision, so the bits could differ.
    """
    return _part(np.asarray(picture), shape, resample)


def _part(pixels: np.ndarray, shape: Geometry, resample: str) -> np.ndarray:
    tall, wide = pixels.shape[:2]
    factors = tall / shape.height, wide / shape.width
    if resample in KERNELS and min(factors) >= 1 and 1 < max(factors) <= FARTHEST:
        whole, kernel = (
            _vips().Image.new_from_memory(pixels.data, wide, tall, 3, "uchar"),
            KERNELS[resample],
        )
        small = whole.reducev(factors[0], kernel=kernel).reduceh(factors[1], kernel=kernel)
        array = np.frombuffer(
            small.crop(shape.left, shape.top, *shape.shape[::-1]).write_to_memory(), np.uint8
        ).reshape(*shape.shape, 3)
    else:
        resized = np.asarray(
            Image.fromarray(pixels).resize((shape.width, shape.height), RESAMPLE[resample])
        )
        array = resized[
            shape.top : shape.top + shape.crop_height, shape.left : shape.left + shape.crop_width
        ]
    return np.ascontiguousarray(array[:, ::-1] if shape.flip else array)


def _needs_care(header: Image.Image) -> bool:
    """Whether a JPEG must be turned upright or converted to sRGB."""
    icc = header.info.get("icc_profile")
    return header.getexif().get(_ORIENTATION, 1) != 1 or bool(icc and _needs_conversion(icc, "RGB"))


@functools.cache
def _vips() -> Any:
    """libvips, with one thread for each caller and nothing remembered."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    pyvips.cache_set_max(0)
    return pyvips


def decoder_versions() -> str:
    """The libraries that the last bits of a picture depend on."""
    vips = _vips()
    return (
        f"Pillow {PIL.__version__}, simplejpeg {metadata.version('simplejpeg')}, libvips "
        f"{'.'.join(str(vips.version(i)) for i in range(3))}"
    )


def to_pixels(squares: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3] as float32 [n, 3, H, W] in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    out = np.ascontiguousarray(squares.transpose(0, 3, 1, 2)).astype(np.float32)
    out /= np.float32(255)
    out -= np.float32(0.5)
    out /= np.float32(0.5)
    return out
