"""A picture of few pixels takes little time: a file that was made to take long is refused with one
message, in less than five seconds, and what cameras and programs write is taken."""

import io
import struct
import time
import zlib

import hostile
import numpy as np
import pytest
from hostile import COUNTED, GREY, LONG, READ_BY_PIECES, ROWS, SIDE
from PIL import Image, TiffImagePlugin

from limner.config.schema import DataSettings
from limner.data import image, picture_file
from limner.data.index import measure_picture
from limner.data.picture_file import PNG_SIGNATURE, CountedFile, Undecodable

MIB = 2**20
SECONDS = 5
SCALE = 1000  # by which what is counted is less in the everyday tests


def judge(content: bytes) -> str:
    """What the check says of a picture, in less than five seconds."""
    began = time.process_time()
    try:
        _, facts = measure_picture(content, DataSettings(size=32), {})
        said = f"{facts.width}x{facts.height}"
    except Undecodable as error:
        said = str(error)
    seconds = time.process_time() - began
    print(f"{len(content) / MIB:.1f} MiB: {seconds:.2f} s, {said}")
    assert seconds < SECONDS
    return said


@pytest.mark.parametrize("name", READ_BY_PIECES)
def test_what_is_read_piece_by_piece_has_an_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of pieces, a thousandth of it."""
    make, most, message = READ_BY_PIECES[name]
    monkeypatch.setattr(CountedFile, "reads_left", picture_file.READS // SCALE)
    # The rest of the file, its rows too, is read in some hundred calls.
    assert judge(make((most - 200_000) // SCALE)) == f"{SIDE}x{SIDE}"
    assert judge(make(most // SCALE)) == message


@pytest.mark.parametrize("name", COUNTED)
def test_what_headers_say_has_an_end(name: str) -> None:
    make, most, message = COUNTED[name]
    assert judge(make(most * 9 // 10)) == f"{SIDE}x{SIDE}"
    assert judge(make(most * 11 // 10 + 1)).endswith(message)


def test_scans_have_an_end() -> None:
    """Those of the picture: a film that a telephone puts behind it has any bytes."""
    assert judge(hostile.make_jpeg(scans=5000)) == (
        "5006 scans of 64x64 pixels: save it as an ordinary JPEG"
    )
    film = b"\xff\xda" * 5000 + bytes(1000)
    assert judge(hostile.make_jpeg(after=film)) == f"{SIDE}x{SIDE}"
    # In a comment between two scans there may be what looks like the end.
    comment = hostile.make_segment(0xFE, picture_file.END_OF_PICTURE)
    hidden = hostile.make_jpeg(scans=5000)
    at = hidden.rindex(b"\xff\xda")
    assert "scans of 64x64 pixels" in judge(hidden[:at] + comment + hidden[at:])
    first = hidden.index(b"\xff\xda", hidden.index(b"\xff\xda") + 2)
    assert "scans of 64x64 pixels" in judge(hidden[:first] + comment + hidden[first:])


def test_runs_of_a_large_bmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line a pixel and its end: Pillow fills the rest byte by byte."""
    line = b"\1\1\0\0"
    assert judge(hostile.make_bmp(line * 4097, 4097)) == (
        "4097x4097 pixels in runs, 16777216 at most are read: save it as PNG"
    )
    monkeypatch.setattr(picture_file, "RUN_PIXELS", 100 * 100)
    assert "in runs" in judge(hostile.make_bmp(line * 101, 101))
    assert judge(hostile.make_bmp(line * 100, 100)) == "100x100"


def test_data_of_a_png_are_no_longer_than_its_pixels_need() -> None:
    """Stored, and in codes of their own: nothing."""
    stored = b"\0\0\0\xff\xff" * (7 * MIB)
    wanted = "its data are far longer than its pixels need: save it again"
    assert judge(hostile.make_png(b"", GREY[:2] + stored)) == wanted
    assert zlib.decompressobj().decompress(GREY[:2] + hostile.EMPTY_BLOCKS * 100) == b""


def test_a_file_is_no_longer_than_its_pixels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_file, "ROOM", 2 * MIB)
    long = {
        "JPEG": hostile.make_jpeg(after=bytes(3 * MIB)),
        "GIF": hostile.make_gif(b"", after=(b"\xff" + bytes(255)) * (3 * MIB // 256)),
        "BMP": hostile.make_bmp(ROWS + bytes(3 * MIB)),
        "AVIF": hostile.encode("AVIF", mode="RGB") + b"\0\0\0\x08free" * (3 * MIB // 8),
    }
    for kind, content in long.items():
        assert judge(content).endswith(
            "MiB for 64x64 pixels, 2 at most are read: save the picture alone"
        ), kind
        assert judge(content[: -2 * MIB]) != "", kind
    # Pages and layers are without end.
    assert judge(hostile.make_tiff({}) + bytes(3 * MIB)) == f"{SIDE}x{SIDE}"


def save(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def decode(content: bytes) -> np.ndarray:
    return image.decode(content, background="white", max_pixels=10_000)


def make_deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits and four bands, whose rows are stored as they are."""
    height, width = pixels.shape[:2]
    rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels]
    head = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"".join(rows), 0)), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(hostile.make_chunk(*one) for one in chunks)


def list_real(rgb: np.ndarray) -> dict[str, bytes]:
    """Files of a picture that have much besides it, as cameras and programs write them."""
    picture = Image.fromarray(rgb)
    frames = [Image.fromarray(np.roll(rgb, k, 0)) for k in range(1, 30)]
    animated = {"save_all": True, "append_images": frames}
    icc = {"icc_profile": bytes(500_000)}
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    jpeg = save(picture, "JPEG", quality=95, exif=exif, icc_profile=bytes(4 * MIB))
    depth = hostile.make_segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000))
    film = np.random.default_rng(1).bytes(4 * MIB)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[37724], tags.tagtype[37724] = bytes(MIB // 2), 7  # layers of Photoshop
    opaque = np.full((*rgb.shape[:2], 1), 65535, np.uint16)
    return {
        "png with a profile and texts": save(picture, "PNG", **icc, exif=exif),
        "png of 16 bits": make_deep_png(np.dstack([rgb.astype(np.uint16) * 257, opaque])),
        "animated png": save(picture, "PNG", **animated),
        "animated webp": save(picture, "WEBP", lossless=True, **animated, exif=exif, **icc),
        "tiff with pages and layers": save(picture, "TIFF", tiffinfo=tags, **animated, **icc),
        "tiff of rows": save(picture, "TIFF", strip_size=1, exif=exif),
        "bmp": save(picture, "BMP"),
        "jpeg with depth and a film": jpeg[:2] + depth * 300 + jpeg[2:] + film,
    }


def test_what_cameras_and_programs_write_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly more room in a PNG than its pixels take."""
    monkeypatch.setattr(picture_file, "PNG_ROOM", 1000)
    rgb = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    for name, content in list_real(rgb).items():
        assert judge(content) == "90x80", name
        if name.startswith("jpeg"):
            rgb = decode(save(Image.fromarray(rgb), "JPEG", quality=95))
        assert (decode(content) == rgb).all(), name


def test_a_large_animation_is_taken() -> None:
    """Of a thousand frames, and a comment."""
    draws = np.random.default_rng(0)
    frames = [Image.fromarray(draws.integers(0, 256, (64, 64), np.uint8)) for _ in range(1000)]
    options = {"save_all": True, "append_images": frames[1:], "comment": "x" * 10_000}
    content = save(frames[0], "GIF", **options)
    assert len(content) > 4 * MIB and judge(content) == "64x64"
    assert (decode(content)[..., 0] == np.asarray(frames[0])).all()


@pytest.mark.soak
@pytest.mark.parametrize("name", LONG)
def test_the_longest(name: str) -> None:
    """Taken or refused: in less than five seconds, and with little memory beside the file."""
    assert judge(LONG[name]())
