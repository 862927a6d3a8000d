"""Pictures that were made to take long: each of so many pieces, and few pixels."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

SIDE = 64  # pixels


def encode(kind: str, side: int = SIDE, mode: str = "L", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (side, side), 50 if mode in "LP" else (50, 60, 70)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def make_bmp(data: bytes, side: int = SIDE) -> bytes:
    """A BMP in runs of 8 bits."""
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
    at = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + head + bytes(1024) + data


ROWS = (bytes([SIDE, 7]) + b"\0\0") * SIDE  # of a BMP: one run each, and their ends


def make_gif(before: bytes, first: bytes = b"", after: bytes = b"") -> bytes:
    """A GIF with something before its picture, and in the blocks of that."""
    head = b"GIF89a" + struct.pack("<HHBBB", SIDE, SIDE, 0x80, 0, 0) + bytes(range(6))
    picture = encode("GIF", mode="P")
    picture = picture[picture.index(b"," + bytes(4)) :]
    palette = 3 << (picture[9] % 8 + 1) if picture[9] & 128 else 0
    data = 10 + palette + 1  # behind the width of its codes, 8 bits
    assert picture[data - 1] == 8
    return head + before + picture[:data] + first + picture[data:-2] + after + picture[-2:]


# A block of a GIF: its length, and codes of 9 bits that mean to begin anew.
CLEAR_CODES = b"\xfc" + np.packbits(([0] * 8 + [1]) * 8, bitorder="little").tobytes() * 28


def make_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(before: bytes, data: bytes, side: int = SIDE) -> bytes:
    """A PNG of these chunks and this IDAT."""
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = make_chunk(b"IHDR", head) + before + make_chunk(b"IDAT", data) + make_chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + chunks


GREY = zlib.compress(bytes(SIDE * (SIDE + 1)))
# Two blocks of deflate, each with codes of its own and not a byte.
EMPTY_BLOCKS = bytes.fromhex("04c0810800000000207feb47001c880000000000f2b77e")


def make_jpeg(before: bytes = b"", scans: int = 0, after: bytes = b"") -> bytes:
    """A progressive JPEG with headers before its own, its last scan repeated, and more behind."""
    whole = encode("JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:2] + before + whole[2:-2] + last * scans + whole[-2:] + after


def make_segment(kind: int, data: bytes) -> bytes:
    """A header of a JPEG."""
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


PHOTOSHOP = b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5400


def make_scans(count: int) -> bytes:
    """The last scan of a progressive JPEG of 2,000 x 2,000, again and again."""
    whole = encode("JPEG", 2000, progressive=True)
    return whole[whole.rindex(b"\xff\xda") : -2] * count + whole[-2:]


def make_webp(chunks: bytes) -> bytes:
    """An animated WebP whose first frame has these chunks, and which has them after it."""
    size = struct.pack("<I", SIDE - 1)[:3] * 2
    head = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + size
    frame = bytes(6) + size + b"\1\0\0\0" + encode("WEBP", mode="RGB")[12:] + chunks
    body = b"WEBP" + head + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame + chunks
    return b"RIFF" + struct.pack("<I", len(body)) + body


def make_tiff(
    tags: dict[int, list[int]], data: bytes = bytes(SIDE * SIDE), big: bool = False
) -> bytes:
    """A grey TIFF, or BigTIFF, with these tags of 32 bits; 0 in them is where the data are."""
    usual = {256: [SIDE], 257: [SIDE], 258: [8], 259: [1], 262: [1], 273: [0], 277: [1]}
    given = usual | {278: [SIDE], 279: [SIDE * SIDE]} | tags
    all_tags = sorted((tag, numbers) for tag, numbers in given.items() if numbers)
    entry, number, place = ("<HHQ", "<Q", "<Q") if big else ("<HHI", "<H", "<I")
    width = struct.calcsize(place)
    start = (16 if big else 8) + struct.calcsize(number) + len(all_tags) * (4 + 2 * width) + width
    table, body = struct.pack(number, len(all_tags)), data
    for tag, numbers in all_tags:
        values = np.array(numbers, "<u4")
        if tag in (273, 324):
            values = values + start
        packed = values.tobytes()
        if len(packed) > width:
            packed, body = struct.pack(place, start + len(body)), body + packed
        table += struct.pack(entry, tag, 4, len(numbers)) + packed.ljust(width, b"\0")
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0" + struct.pack("<I", 8)
    return head + table + bytes(width) + body


def make_strips(count: int) -> bytes:
    """A TIFF of as many rows, each a strip."""
    return make_tiff({257: [count], 273: [0] * count, 278: [1], 279: [SIDE] * count})


def make_layers(count: int, side: int = SIDE) -> bytes:
    """A TIFF whose tiles cover it so many times."""
    tiles = 2 * count  # one for all rows but the last, and one for that
    tags = {322: [side], 323: [side - 1], 324: [0] * tiles, 325: [side * side] * tiles}
    return make_tiff({256: [side], 257: [side], 273: [], **tags}, bytes(side * side))


def make_exif(pieces: int) -> bytes:
    """A JPEG whose EXIF is in so many segments, which Pillow joins one by one."""
    return make_jpeg(make_segment(0xE1, b"Exif\0\0" + bytes(60_000)) * pieces)


READS = 3 * 2**20
JPEG_HEADERS = "headers of more than 32 MiB, or 2 of tables and EXIF: save it without"
TOO_OFTEN = f"more than {READS} blocks or runs: save it as PNG"
# What so many pieces make, where there may be so many; and what is said of more.
Kind = tuple[Callable[[int], bytes], int, str]
# Of these Pillow reads each piece by itself.
READ_BY_PIECES: dict[str, Kind] = {
    "bmp ends of lines": (lambda n: make_bmp(b"\0\0" * n + ROWS), READS // 2, TOO_OFTEN),
    "bmp runs of nothing": (
        lambda n: make_bmp(ROWS[:2] + b"\1\1" * n + ROWS[2:]),
        READS // 2,
        TOO_OFTEN,
    ),
    "bmp moves by nothing": (lambda n: make_bmp(b"\0\2\0\0" * n + ROWS), READS // 3, TOO_OFTEN),
    "gif comment": (lambda n: make_gif(b"!\xfe" + b"\1x" * n + b"\0"), READS // 2, TOO_OFTEN),
    "gif extensions": (lambda n: make_gif(b"!\xf9\0\0" * n), READS // 4, TOO_OFTEN),
    "gif stray bytes": (lambda n: make_gif(b"\1" * n), READS, TOO_OFTEN),
}
# These are refused by what their headers say.
COUNTED: dict[str, Kind] = {
    "jpeg tables": (
        lambda n: make_jpeg(make_segment(0xDB, b"\0" + b"\1" * 64) * n),
        2**21 // 67,
        JPEG_HEADERS,
    ),
    "jpeg exif": (make_exif, 2**21 // 60_010, JPEG_HEADERS),
    "jpeg profiles": (
        lambda n: make_jpeg(make_segment(0xE2, bytes(60_000)) * n),
        2**25 // 60_004,
        JPEG_HEADERS,
    ),
    "webp chunks": (
        lambda n: make_webp(b"ABCD\0\0\0\0" * (n // 2)),
        2**19,
        "more than 524288 chunks",
    ),
    "tiff strips": (
        lambda n: make_tiff({273: [0] * n}),
        2**18,
        "numbers in its tag 273, 262144 at most are read: save it as PNG",
    ),
    "tiff numbers": (
        lambda n: make_tiff({33550: [1] * n}, big=True),
        2**18,
        "numbers in its tag 33550, 262144 at most are read: save it as PNG",
    ),
    "tiff layers": (make_layers, 8, "pictures of 64x64 pixels: save it again"),
}
# Such files are long, or are read before they are refused. What is left out is a large picture of
# hundreds of MB of empty blocks of deflate: zlib takes 25 seconds for 300.
LONG: dict[str, Callable[[], bytes]] = {
    **{
        name: lambda make=make, most=most: make(25 * most)
        for name, (make, most, _) in READ_BY_PIECES.items()
    },
    "bmp runs and ends": lambda: make_bmp(b"\0\0" * (READS // 2 - 9000) + b"\1\1\0\0" * 4096, 4096),
    "gif clear codes": lambda: make_gif(b"", CLEAR_CODES * 2**20),
    "png chunks of no data": lambda: make_png(make_chunk(b"IDAT") * (2**19 - 9), GREY),
    "png texts": lambda: make_png(make_chunk(b"tEXt", b"a\0b") * (2**19 - 9), GREY),
    "png empty blocks": lambda: make_png(b"", GREY[:2] + EMPTY_BLOCKS * 2**23),
    "jpeg exif": lambda: make_exif(2000),
    "jpeg photoshop": lambda: make_jpeg(make_segment(0xED, PHOTOSHOP) * 510),
    "jpeg stray bytes": lambda: make_jpeg()[:-2] + b"\xff\xd0" * 2**26,
    "jpeg scans": lambda: encode("JPEG", 2000, progressive=True)[:-2] + make_scans(1000),
    "jpeg scans of a few pixels": lambda: make_jpeg(scans=60_000),
    "tiff strips": lambda: make_strips(2**18),
    "tiff more strips": lambda: make_tiff({273: [0] * 2**22, 278: [1]}),
    "tiff layers": lambda: make_layers(10_000, 4000),
    "tiff large tags": lambda: make_tiff({33550: [1] * 2**26}),
    "webp chunks": lambda: make_webp(b"ABCD\0\0\0\0" * 2**24),
    "avif boxes": lambda: encode("AVIF", mode="RGB") + b"\0\0\0\x08free" * 2**24,
}
