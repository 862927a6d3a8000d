"""Pictures and metadata files as they go bad, each made from its number: the same every time."""

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, PngImagePlugin, features

SEED = 20261127
SIZE = (32, 24)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def list_pictures() -> list[bytes]:
    """Good pictures of all formats and modes that Pillow writes."""
    draws = np.random.default_rng(SEED)
    small = Image.fromarray(draws.integers(0, 256, (5, 6, 4), np.uint8))
    rgba = small.resize(SIZE, Image.Resampling.BICUBIC)
    deep = Image.fromarray(draws.integers(0, 65536, SIZE[::-1], np.uint16))
    lab = Image.frombytes("LAB", SIZE, draws.bytes(32 * 24 * 3))
    return [
        *list_pngs(rgba, deep),
        *list_jpegs(rgba.convert("RGB")),
        *list_tiffs(rgba, deep, lab),
        *list_others(rgba),
    ]


def turn() -> Image.Exif:
    """What says that a picture is stored on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def add_frames(picture: Image.Image) -> dict[str, object]:
    """Two frames more; new ones, as PIL leaves settings of a format in what it has saved."""
    return {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}


def list_pngs(rgba: Image.Image, deep: Image.Image) -> Iterator[bytes]:
    rgb = rgba.convert("RGB")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 3000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<tiff:Orientation>3</tiff:Orientation>", zip=True)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield encode(rgb.convert(mode), "PNG", icc_profile=make_profile(b"RGB "))
    yield encode(deep, "PNG", icc_profile=make_profile(b"GRAY"))
    yield encode(rgb, "PNG", pnginfo=text, exif=turn())
    yield encode(rgb.convert("P"), "PNG", transparency=bytes(range(200)))
    yield encode(rgb, "PNG", **add_frames(rgb))


def list_jpegs(rgb: Image.Image) -> Iterator[bytes]:
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}):
        yield encode(rgb, "JPEG", quality=80, **options)
    yield encode(rgb, "JPEG", exif=turn(), icc_profile=make_profile(b"RGB "))
    yield encode(rgb.convert("L"), "JPEG", icc_profile=make_profile(b"GRAY"))
    yield encode(rgb.convert("CMYK"), "JPEG", icc_profile=make_profile(b"CMYK"))
    yield encode(rgb.convert("CMYK"), "JPEG", progressive=True)
    yield encode(rgb, "MPO", **add_frames(rgb))


def list_tiffs(rgba: Image.Image, deep: Image.Image, lab: Image.Image) -> Iterator[bytes]:
    rgb, icc = rgba.convert("RGB"), make_profile(b"RGB ")
    for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "lzma", "zstd"):
        yield encode(rgb, "TIFF", compression=name, exif=turn(), icc_profile=icc)
    for name in ("group3", "group4", "tiff_ccitt"):
        yield encode(rgb.convert("1"), "TIFF", compression=name)
    for mode in ("L", "P", "CMYK", "F", "RGBA"):
        picture = rgb.convert("L").convert("F") if mode == "F" else rgba.convert(mode)
        yield encode(picture, "TIFF", compression="tiff_lzw")
        yield encode(picture, "TIFF", **add_frames(picture))
    yield encode(deep, "TIFF", compression="tiff_lzw")
    yield encode(deep, "TIFF")
    yield encode(lab, "TIFF")


def list_others(rgba: Image.Image) -> Iterator[bytes]:
    rgb = rgba.convert("RGB")
    turned = {"exif": turn(), "icc_profile": make_profile(b"RGB ")}
    for options in ({}, {"lossless": True}, add_frames(rgba), turned):
        yield encode(rgba, "WEBP", method=0, **options)
    for options in ({}, {"transparency": 3}, {"interlace": 1}, add_frames(rgb)):
        yield encode(rgb.convert("P"), "GIF", **options)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield encode(rgba.convert(mode), "BMP")
    if features.check("avif"):
        yield encode(rgba, "AVIF", speed=10)
        yield encode(rgb, "AVIF", speed=10, **add_frames(rgb))


def make_profile(space: bytes) -> bytes:
    """An ICC profile that little is wrong with."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = dict.fromkeys((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), white)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC", b"kTRC"), curve)
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI", at + len(body), b"lcms", 0x02100000) + b"mntr" + space + b"XYZ "
    head = (head + b"\0" * 12 + b"acsp" + b"\0" * 28 + white[8:]).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


NUMBERS = [
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80\0",
    b"\0\1",
]


def damage(content: bytes, others: list[bytes], draws: np.random.Generator) -> bytes:
    """Return a content with a few bytes, a part or its end changed."""
    for _ in range(int(draws.integers(1, 4))):
        # What is near the beginning says what all else means.
        reach = len(content) if draws.random() < 0.5 else min(len(content), 200)
        at = int(draws.integers(reach)) if reach else 0
        other = others[draws.integers(len(others))]
        head, part, rest = content[:at], content[at : at + int(draws.integers(1, 40))], content[at:]
        tail = content[at + len(part) :]
        changed = [
            draws.bytes(1) + rest[1:],
            bytes(byte ^ (1 << int(draws.integers(8))) for byte in rest[:1]) + rest[1:],
            (number := NUMBERS[draws.integers(len(NUMBERS))]) + rest[len(number) :],
            b"",
            tail,
            draws.bytes(len(part)) + rest,
            bytes(len(part)) + tail,
            part * int(draws.integers(1, 30)) + rest,
            other[int(draws.integers(len(other))) :],
        ]
        content = head + changed[draws.integers(len(changed))]
    return content


def mend_png(content: bytes) -> bytes:
    """Give every chunk of a PNG the checksum that its data have."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def make_damaged_picture(number: int, good: list[bytes]) -> bytes:
    draws = np.random.default_rng([SEED, number])
    content = damage(good[number % len(good)], good, draws)
    is_png = content.startswith(b"\x89PNG")
    return mend_png(content) if is_png and draws.random() < 0.7 else content


ROWS = [
    {"file_name": "a.png", "text": "a red boat"},
    {"file_name": "b.png", "text": ["one", "zwei ☃"]},
    {"file_name": "sub\\c.png", "text": "x" * 300, "n": 1.5e3, "o": {"p": [1, {"q": None}]}},
    {"file_name": "../out.png", "text": None},
]


def write_jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write_csv() -> bytes:
    return b'file_name,text,n\r\na.png,"a ""red"" boat",1\r\nb.png,"two\nlines",\r\n'


def write_txt() -> bytes:
    return "one\nzwei ☃\u2028\r\nthree".encode()


def write_parquet(**options: object) -> bytes:
    import pyarrow
    import pyarrow.parquet

    names = pyarrow.array([row["file_name"] for row in ROWS] * 4)
    texts = pyarrow.array([["a red boat"], ["one", None], [], None] * 4)
    stream = io.BytesIO()
    table = pyarrow.table({"file_name": names, "text": texts, "plain": names})
    pyarrow.parquet.write_table(table, stream, row_group_size=7, **options)
    return stream.getvalue()


METADATA: list[tuple[str, Callable[[], bytes]]] = [
    ("metadata.jsonl", write_jsonl),
    ("metadata.csv", write_csv),
    ("a.txt", write_txt),
    ("metadata.parquet", write_parquet),
    ("metadata.parquet", lambda: write_parquet(compression="zstd", data_page_version="2.0")),
]


def change_text(content: bytes, draws: np.random.Generator) -> bytes:
    """Return a text that is unusual as a whole: another encoding, deep, long, or repeated."""
    match int(draws.integers(6)):
        case 0:
            encoding = ["utf-16", "utf-16-le", "utf-32-be", "cp1252", "utf-8-sig"][
                draws.integers(5)
            ]
            return content.decode().encode(encoding, errors="replace")
        case 1:
            deep = [b"[", b'{"text":', b'"', b"\\ud800", b"\xed\xa0\x80", b",", b";"]
            part = deep[draws.integers(len(deep))] * int(10 ** draws.uniform(0, 5))
            at = int(draws.integers(len(content)))
            return content[:at] + part + content[at:]
        case 2:
            return content.replace(b"\n", [b"\r", b"\x0b", b"\0", b"\n\n", b" "][draws.integers(5)])
        case 3:
            return content.replace(b",", [b";", b"\t", b",,", b'","'][draws.integers(4)])
        case 4:
            return content * int(10 ** draws.uniform(0, 3))
        case _:
            return content.replace(
                b"text", [b"file_name", b"TEXT", b"", b"te\0xt"][draws.integers(4)]
            )


def make_damaged_metadata(number: int) -> tuple[str, bytes]:
    """Return the name of a metadata or caption file, and its content."""
    draws = np.random.default_rng([SEED, 1, number])
    name, write = METADATA[number % len(METADATA)]
    content = write()
    if not name.endswith("parquet") and draws.random() < 0.5:
        content = change_text(content, draws)
    if draws.random() < 0.7:
        content = damage(content, [write_jsonl(), write_csv(), content], draws)
    return name, content
