"""Files of pictures: read whole, opened by their header, and bounded before pixels are unpacked."""

import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MEMORY = 7 * 2**27  # bytes that one picture may take, its file included: 896 MiB
JPEG_SIGNATURE = b"\xff\xd8"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bytes that PIL keeps of a pixel, by mode; 4 of any other.
BYTES_OF_MODE = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# Bytes of a pixel that a decoder takes beside those; 0 where it works row by row.
BYTES_OF_DECODER = {"WEBP": 16, "AVIF": 16, "TIFF": 6}
# Texts of a PNG that may tell how it is turned; of others Pillow would refuse the long ones.
PNG_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
PNG_TEXT_BYTES = 2**20  # that a text or profile may unpack to for Pillow
SEGMENTS = 2**19  # of a file, each of which Pillow looks at
# That Pillow may make of a file, by block of a GIF and by run of a BMP: 2 seconds.
READS = 3 * 2**20
HEADER_BYTES = 2**25  # of a JPEG before its first scan; a sixteenth of it of tables and EXIF
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")
TIFF_NUMBERS = 2**18  # in a tag of a TIFF, as of its strips; Pillow makes a list of them
TIFF_BYTES = (1, 2, 6, 7)  # types of tags of bytes, of which it makes none
TIFF_LAYERS = 8  # that the strips of a TIFF may make, one over the other: one for each band
ORIENTATION_TAG = 0x0112  # of EXIF; 1 is upright
START_OF_SCAN, END_OF_PICTURE = b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of a JPEG, none of those within a scan
TABLES = (b"\xff\xc4", b"\xff\xdb")
EXIF = b"Exif\0\0"
SCANNED_PIXELS = 2**32  # of a JPEG, in all of its scans: 3 seconds
SCANS = 2**12  # of a JPEG; 2,688 would bring one bit of one coefficient each
RUN_PIXELS = 2**24  # of a BMP in runs, which Pillow unpacks in Python: 2 seconds
# Bytes of a file beyond 8 for a pixel, which none needs: for further frames, previews, a film.
ROOM = 2**28
PNG_ROOM = 2**25  # of the first frame of a PNG: zlib may take 2.5 seconds for so many of nothing
PROFILE_BYTES = 2**24  # that a profile may unpack to; a larger one counts as none
UNPACKED_BYTES = 2**26  # that all texts and profiles of a PNG may unpack to
ZLIB_RATIO = 1032  # the most bytes that zlib makes of one


class Undecodable(ValueError):
    """A picture that cannot be used; the message is the reason, without the picture's name."""


class CountedFile(io.BytesIO):
    """The bytes of a picture's file, of which so many may be read, in so many calls."""

    bytes_left = 2**63
    reads_left = READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Read some bytes.

        Raises:
            Undecodable: when that was too often, or too much.
        """
        data = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(data)
        if self.reads_left < 0:
            raise Undecodable(f"more than {READS} blocks or runs: save it as PNG")
        if self.bytes_left < 0:
            raise Undecodable("its data are far longer than its pixels need: save it again")
        return data


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


def read_file(path: Path) -> bytes:
    """Read a picture's file.

    Raises:
        Undecodable: when it cannot be read, is no file, or is larger than ``MEMORY``.
    """
    with translate_errors():
        status = os.stat(path)
        # A pipe or a device could be read for ever.
        if not stat.S_ISREG(status.st_mode):
            raise Undecodable("not a regular file")
        if status.st_size > MEMORY:
            raise Undecodable(
                f"a file of {status.st_size >> 20} MiB; at most {MEMORY >> 20} are read"
            )
        return path.read_bytes()


def open_content(content: bytes) -> ImageFile.ImageFile:
    """Open the bytes of a picture's file by its header; its pixels stay packed."""
    profile = None
    if content.startswith(JPEG_SIGNATURE):
        find_first_scan(content)
    if content.startswith(PNG_SIGNATURE):
        content, profile = drop_long_chunks(content)
    if content.startswith(b"RIFF"):
        count_webp_chunks(content)
    if content[:4] in TIFF_SIGNATURES:
        check_tiff_tags(content)
    picture = read_header(content)
    if profile is not None:
        picture.info["icc_profile"] = profile
    return picture


def read_header(content: bytes) -> ImageFile.ImageFile:
    """Open a picture by the first format that knows its first bytes."""
    # Not by ``Image.open``, which warns about, or refuses, sizes by one limit for the whole
    # process. The limit here is ``max_pixels``.
    if not content:
        raise Undecodable("the file is empty")
    Image.init()
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(content[:16])
        # PIL answers with a text for a format that it knows and was built without.
        if isinstance(accepted, str):
            raise Undecodable(f"{name} pictures need a Pillow that was built with {name}")
        if accepted:
            return factory(CountedFile(content), "")
    raise Undecodable(f"not a picture in a known format ({', '.join(FORMATS)})")


def drop_long_chunks(content: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG without texts and profile that Pillow would refuse it for, and that profile;
    an empty one for one beyond ``PROFILE_BYTES``.

    Raises:
        Undecodable: when there are more chunks than ``SEGMENTS``, or more to unpack in them than
            ``UNPACKED_BYTES``.
    """
    kept, profile, start, at = [], None, 0, len(PNG_SIGNATURE)
    left = UNPACKED_BYTES
    for _ in range(SEGMENTS):
        if at + 12 > len(content):
            break
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt") and end <= len(content):
            unpacked, count = unpack_chunk(kind, content[at + 8 : end - 4])
            left -= count
            if left < 0:
                raise Undecodable(
                    f"texts and profiles of more than {UNPACKED_BYTES >> 20} MiB: save it without"
                )
            if unpacked is None or len(unpacked) > PNG_TEXT_BYTES:
                kept.append(content[start:at])
                start = end
                if kind == b"iCCP":
                    profile = unpacked or b""
        at = end
    else:
        raise Undecodable(f"more than {SEGMENTS} chunks")
    if not kept:
        return content, None
    return b"".join([*kept, content[start:]]), profile


def unpack_chunk(kind: bytes, data: bytes) -> tuple[bytes | None, int]:
    """Return a profile, or a text that tells how the picture is turned, None where it is not
    needed; and how many bytes were unpacked for it, at most.

    Of a damaged one nothing is left, so that Pillow says what is wrong with it.
    """
    name, _, rest = data.partition(b"\0")
    if kind != b"iCCP" and name not in PNG_TEXTS:
        return None, 0
    limit = PROFILE_BYTES if kind == b"iCCP" else PNG_TEXT_BYTES
    packed = kind in (b"iCCP", b"zTXt") or rest[:1] == b"\1"
    if kind == b"iTXt":
        # A flag, the method, then the language and the translated keyword, each with a NUL.
        rest = rest[1:2] + rest[2:].split(b"\0", 2)[-1]
    if not packed:
        return (rest if len(rest) <= limit else None), 0
    try:
        unpacked = zlib.decompressobj().decompress(rest[1:], limit + 1)
    except zlib.error:
        return b"", min(limit, len(rest) * ZLIB_RATIO)
    return (unpacked if len(unpacked) <= limit else None), len(unpacked)


def count_webp_chunks(content: bytes) -> None:
    """Refuse a WebP of more chunks than ``SEGMENTS``, those in its frames included."""
    at = 12
    for _ in range(SEGMENTS):
        if at + 8 > len(content):
            return
        kind, length = struct.unpack_from("<4sI", content, at)
        # A frame is a header of 16 bytes, and chunks.
        at += 8 + (16 if kind == b"ANMF" else length + length % 2)
    raise Undecodable(f"more than {SEGMENTS} chunks")


def check_tiff_tags(content: bytes) -> None:
    """Refuse a TIFF of more tags, or with more numbers in one of them, than ``TIFF_NUMBERS``."""
    order = "<" if content.startswith(b"II") else ">"
    if content[2:3] != b"+":
        check_tag_table(content, f"{order}4xL", f"{order}H", f"{order}HHL4x")
    # Of a big-endian BigTIFF, Pillow reads the first way and libtiff the second.
    if b"+" in content[2:4]:
        check_tag_table(content, f"{order}8xQ", f"{order}Q", f"{order}HHQ8x")


def check_tag_table(content: bytes, header: str, number: str, entry: str) -> None:
    """Refuse too many tags, or numbers in one.

    Args:
        header: how the place of the table is read from the file's beginning.
        number: how the number of tags is read there.
        entry: how a tag is read, its type, and how many numbers it has.
    """
    try:
        (at,) = struct.unpack_from(header, content)
        (count,) = struct.unpack_from(number, content, at)
    except (struct.error, OverflowError):
        return  # Pillow says what is wrong with it
    if count > TIFF_NUMBERS:
        raise Undecodable(f"{count} tags, {TIFF_NUMBERS} at most are read: save it as PNG")
    at += struct.calcsize(number)
    size = struct.calcsize(entry)
    table = content[at : at + count * size]
    for tag, kind, numbers in struct.iter_unpack(entry, table[: len(table) // size * size]):
        # What is longer than the file is skipped, as damage.
        if TIFF_NUMBERS < numbers < len(content) and kind not in TIFF_BYTES:
            raise Undecodable(
                f"{numbers} numbers in its tag {tag}, {TIFF_NUMBERS} at most are read: save it as "
                "PNG"
            )


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture that is too large, or empty."""
    if width * height > max_pixels:
        raise Undecodable(
            f"{width}x{height} pixels are more than data.max_pixels = {max_pixels}: a "
            "decompression bomb?"
        )
    if width * height == 0:
        raise Undecodable(f"{width}x{height} pixels: an empty picture")


def check_memory(picture: ImageFile.ImageFile, content: bytes) -> None:
    """Refuse a picture that would take more than ``MEMORY``, its file included, or more time than
    any that was meant to be seen."""
    pixels = picture.width * picture.height
    check_work(picture, content)
    if picture.format in ("JPEG", "MPO"):
        bytes_per_pixel = count_jpeg_bytes(picture, content)
    else:
        bytes_per_pixel = BYTES_OF_MODE.get(picture.mode, 4) + 3
        bytes_per_pixel += BYTES_OF_DECODER.get(picture.format or "", 0)
        bytes_per_pixel += 6 * has_deep_key_color(picture)  # the lower bytes, and what is hidden
    needed = pixels * bytes_per_pixel + len(content)
    if needed > MEMORY:
        raise Undecodable(
            f"{picture.width}x{picture.height} pixels take {needed >> 20} MiB while they are "
            f"unpacked, and {MEMORY >> 20} at most are allowed: make the picture smaller"
        )


def has_deep_key_color(picture: ImageFile.ImageFile) -> bool:
    """Whether an opened picture is a PNG of 16-bit colours, of which one is transparent."""
    is_deep = bool(picture.tile) and picture.tile[0].args == "RGB;16B"
    return picture.format == "PNG" and is_deep and "transparency" in picture.info


def check_work(picture: ImageFile.ImageFile, content: bytes) -> None:
    """Refuse a picture whose file asks for more time than its pixels do."""
    pixels = picture.width * picture.height
    size = f"{picture.width}x{picture.height} pixels"
    if picture.format in ("JPEG", "MPO"):
        check_scans(content, pixels, size)
    if picture.format == "TIFF":
        check_layers(picture, pixels, size)
    # A TIFF may have pages and layers without end.
    elif len(content) > 8 * pixels + ROOM:
        raise Undecodable(
            f"a file of {len(content) >> 20} MiB for {size}, {8 * pixels + ROOM >> 20} at most are "
            "read: save the picture alone"
        )
    if picture.format == "PNG" and isinstance(picture.fp, CountedFile):
        picture.fp.bytes_left = 8 * pixels + PNG_ROOM
    if pixels > RUN_PIXELS and any(codec == "bmp_rle" for codec, *_ in picture.tile):
        raise Undecodable(f"{size} in runs, {RUN_PIXELS} at most are read: save it as PNG")


def check_scans(content: bytes, pixels: int, size: str) -> None:
    """Refuse a JPEG of so many scans that they take long."""
    most = min(SCANS, SCANNED_PIXELS // pixels)
    scans = content.count(START_OF_SCAN, find_first_scan(content))
    # The first count is fast, and too large where pictures or a film follow.
    if scans > most:
        scans = count_scans(content)
    if scans > most:
        raise Undecodable(f"{scans} scans of {size}: save it as an ordinary JPEG")


def check_layers(picture: ImageFile.ImageFile, pixels: int, size: str) -> None:
    """Refuse a TIFF whose strips or tiles lie over one another again and again."""
    parts = [extents for _, extents, *_ in picture.tile if extents is not None]
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in parts)
    if covered > TIFF_LAYERS * pixels:
        raise Undecodable(f"strips for {covered // pixels} pictures of {size}: save it again")


def count_jpeg_bytes(picture: Image.Image, content: bytes) -> int:
    """Return the bytes that a pixel of a JPEG takes: unpacked, as sRGB, and turned; and its
    coefficients, of 16 bits, where they are kept until the last of several scans."""
    components = len(picture.getbands())
    needed = 3 if components == 3 else components + 3
    if read_orientation(picture) != 1:
        needed += 3
    first = find_first_scan(content)
    in_first = content[first + 4] if first + 4 < len(content) else 0
    if in_first < components or picture.info.get("progressive"):
        needed += 2 * components
    return needed


def find_first_scan(content: bytes) -> int:
    """Return where a JPEG's first scan begins, after its headers; its end, where there is none.

    Raises:
        Undecodable: when there are more headers, or stray bytes between them, than ``SEGMENTS``, or
            more bytes of them than ``HEADER_BYTES``.
    """
    at, left = 2, HEADER_BYTES
    for _ in range(SEGMENTS):
        if left < 0:
            raise Undecodable(
                f"headers of more than {HEADER_BYTES >> 20} MiB, or {HEADER_BYTES >> 24} of tables "
                "and EXIF: save it without"
            )
        marker = content[at : at + 2]
        if marker == START_OF_SCAN:
            return at
        if at + 4 > len(content):
            return len(content)
        if marker[0] != 0xFF or marker[1] in (0, 0xFF):
            at += 1
        else:
            length = int.from_bytes(content[at + 2 : at + 4])
            # Pillow takes long over these.
            is_slow = marker in TABLES or content[at + 4 : at + 10] == EXIF
            left -= length * (16 if is_slow else 1)
            at += 2 + length
    raise Undecodable(f"more than {SEGMENTS} headers")


def count_scans(content: bytes) -> int:
    """Return the scans of a JPEG, without what the pictures and films behind its end have."""
    scans, at = 0, find_first_scan(content)
    for _ in range(SEGMENTS):
        found = MARKER.search(content, at)
        if found is None or found[0] == END_OF_PICTURE:
            return scans
        scans += found[0] == START_OF_SCAN
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return SEGMENTS


def read_orientation(picture: Image.Image) -> int:
    """Return how a picture's pixels are stored, by its EXIF: 1, upright, to 8; 1 where there is
    none, or none that can be read."""
    try:
        orientation: Any = picture.getexif().get(ORIENTATION_TAG)
    except MemoryError:
        raise
    # Damaged EXIF can break its reader in any way.
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1
