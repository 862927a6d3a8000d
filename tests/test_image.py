"""Every kind of picture becomes the right sRGB numbers, or one reason."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from limner.data import color, geometry, image
from limner.data.geometry import Geometry
from limner.data.image import KERNELS, RESAMPLE
from limner.data.picture_file import Undecodable
from limner.errors import InputError

MARK = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [250, 240, 230], [128, 127, 126]]],
    np.uint8,
)  # no symmetry: all 8 orientations differ
UPRIGHT_OF_STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(picture: object, background: str = "white", max_pixels: int = 10**6) -> np.ndarray:
    result = image.decode(picture, background=background, max_pixels=max_pixels)  # type: ignore[arg-type]
    assert result.dtype == np.uint8 and result.shape[2] == 3 and result.flags.c_contiguous
    return result


def reason(picture: object, **options: object) -> str:
    with pytest.raises(Undecodable) as caught:
        decoded(picture, **options)  # type: ignore[arg-type]
    return str(caught.value)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    data: bytes,
    extra: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def icc(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 from its tags."""
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    d50 = struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    header = (
        struct.pack(">I4sI", at + len(body), b"lcms", 0x02100000)
        + kind
        + space
        + connection
        + b"\0" * 12
        + b"acsp"
        + b"\0" * 28
        + d50
    )
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(curve: bytes) -> bytes:
    """sRGB's primaries and another curve from value to light."""
    xyz = {
        b"rXYZ": (0.4361, 0.2225, 0.0139),
        b"gXYZ": (0.3851, 0.7169, 0.0971),
        b"bXYZ": (0.1431, 0.0606, 0.7141),
        b"wtpt": (0.9642, 1.0, 0.8249),
    }
    tags = {
        name: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in value))
        for name, value in xyz.items()
    }
    return icc(
        b"mntr",
        b"RGB ",
        b"XYZ ",
        tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv\0\0\0\0" + curve),
    )


def linear_profile() -> bytes:
    """Values proportional to light: the middle is 0.5, which sRGB writes as 188."""
    return rgb_profile(struct.pack(">I", 0))


def tabled_srgb_profile() -> bytes:
    """sRGB as a coarse table: it differs from the formula, but by one level only."""
    value = np.linspace(0, 1, 20)
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return rgb_profile(struct.pack(">I20H", 20, *np.rint(light * 65535).astype(int)))


def cmyk_profile() -> bytes:
    """A press whose cyan ink is a mid grey, key is black, and whose other inks do nothing: no plain
    conversion comes near."""
    line = struct.pack(">2H", 0, 65535)
    white, grey, black = (
        struct.pack(">3H", light, 0x8000, 0x8000) for light in (0xFF00, 0x7F80, 0)
    )  # L* = 100, 50 and 0 in Lab of 16 bits
    nodes = b"".join(
        black if node & 1 else grey if node & 8 else white for node in range(16)
    )  # cyan varies slowest
    unity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = (
        b"mft2\0\0\0\0"
        + struct.pack(">4B", 4, 3, 2, 0)
        + unity
        + struct.pack(">2H", 2, 2)
        + line * 4
        + nodes
        + line * 3
    )
    return icc(
        b"prtr",
        b"CMYK",
        b"Lab ",
        {b"A2B0": lut, b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)},
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_each_orientation_is_turned_upright_once(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(MARK), kind, exif=exif, **options)
    np.testing.assert_array_equal(decoded(data), UPRIGHT_OF_STORED[orientation](MARK))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_of_a_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = MARK.repeat(16, 0).repeat(16, 1)
    upright = decoded(
        encode(Image.fromarray(blocks), "JPEG", quality=100, subsampling=0, exif=exif)
    )
    wanted = UPRIGHT_OF_STORED[orientation](blocks)
    assert upright.shape == wanted.shape
    assert np.abs(upright.astype(int) - wanted).max() <= 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_keep_every_number(kind: str, options: dict, tmp_path: Path) -> None:
    data = encode(Image.fromarray(MARK), kind, **options)
    np.testing.assert_array_equal(decoded(data), MARK)
    (tmp_path / "any.name").write_bytes(data)
    np.testing.assert_array_equal(decoded(tmp_path / "any.name"), MARK)


def test_avif_where_pillow_reads_it() -> None:
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    data = encode(Image.new("RGB", (32, 16), (200, 40, 90)), "AVIF", quality=100)
    assert np.abs(decoded(data).astype(int) - (200, 40, 90)).max() <= 4


@pytest.mark.parametrize(
    ("background", "ground"),
    [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("red", (255, 0, 0))],
)
def test_alpha_shows_the_background(background: str, ground: tuple[int, int, int]) -> None:
    rgba = np.dstack(
        [
            np.broadcast_to(np.array([200, 100, 0], np.uint8), (1, 256, 3)),
            np.arange(256, dtype=np.uint8)[None, :, None],
        ]
    )
    share = np.arange(256)[None, :, None] / 255
    wanted = np.array([200, 100, 0]) * share + np.array(ground) * (1 - share)
    for picture in (encode(Image.fromarray(rgba)), rgba, Image.fromarray(rgba)):
        result = decoded(picture, background)
        assert np.abs(result - wanted).max() <= 0.51
        assert tuple(result[0, 0]) == ground and tuple(result[0, 255]) == (200, 100, 0)


def test_palettes_with_and_without_transparency() -> None:
    plain = Image.new("P", (3, 1))
    plain.putpalette([9, 8, 7, 200, 100, 50, 0, 0, 255])
    plain.putdata([0, 1, 2])
    assert decoded(encode(plain)).tolist() == [[[9, 8, 7], [200, 100, 50], [0, 0, 255]]]
    assert decoded(encode(plain, transparency=1), "#00ff00").tolist() == [
        [[9, 8, 7], [0, 255, 0], [0, 0, 255]]
    ]
    half = decoded(encode(plain, transparency=bytes([255, 0, 128])), "black")
    assert half.tolist() == [[[9, 8, 7], [0, 0, 0], [0, 0, 128]]]
    assert decoded(encode(plain, "GIF", transparency=2), "yellow").tolist() == [
        [[9, 8, 7], [200, 100, 50], [255, 255, 0]]
    ]


def test_grey_with_alpha_and_key_colours() -> None:
    la = Image.merge(
        "LA",
        (
            Image.fromarray(np.array([[40, 90]], np.uint8)),
            Image.fromarray(np.array([[255, 0]], np.uint8)),
        ),
    )
    assert decoded(encode(la), "#010203").tolist() == [[[40, 40, 40], [1, 2, 3]]]
    assert decoded(encode(Image.fromarray(MARK), transparency=(10, 20, 30)), "#010203")[
        1
    ].tolist() == [[1, 2, 3], [250, 240, 230], [128, 127, 126]]
    grey = Image.fromarray(np.array([[40, 90]], np.uint8))
    assert decoded(encode(grey, transparency=90), "#010203").tolist() == [[[40, 40, 40], [1, 2, 3]]]


def test_key_colours_of_16_bits() -> None:
    rows = b"\0" + struct.pack(">6H", 1000, 2000, 3000, 65535, 0, 0)
    data = png(2, 1, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000)))
    assert decoded(data, "#010203").tolist() == [[[1, 2, 3], [255, 0, 0]]]
    grey = png(
        2,
        1,
        16,
        0,
        b"\0" + struct.pack(">2H", 1000, 65535),
        chunk(b"tRNS", struct.pack(">H", 1000)),
    )
    assert decoded(grey, "#010203").tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_key_colour_of_16_bits_hides_no_other(interlaced: bool) -> None:
    """Others with the same higher bytes, or the same lower ones, are to be seen."""
    key = (0x1234, 0x0056, 0x7800)
    others = [(0x12FF, 0x0056, 0x7800), (0x1234, 0x0056, 0x7801), (0x1234, 0x0100, 0x7800)]
    others += [(0x3434, 0x5656, 0x0000), (0x1233, 0x0056, 0x7800)]
    colors = [key, *others, key]
    if interlaced:  # a row of seven is divided among passes of 1, 1, 2 and 3 pixels
        parts = [colors[0:1], colors[4:5], colors[2::4], colors[1::2]]
    else:
        parts = [colors]
    rows = b"".join(b"\0" + b"".join(struct.pack(">3H", *c) for c in part) for part in parts)
    hidden = chunk(b"tRNS", struct.pack(">3H", *key))
    data = png(7, 1, 16, 2, rows, hidden, interlaced)
    wanted = [[value >> 8 for value in color] for color in colors]
    wanted[0] = wanted[-1] = [9, 8, 7]
    assert decoded(data, "#090807").tolist() == [wanted]


def test_a_dark_key_colour_of_16_bits() -> None:
    """It would be one of 8 bits by its numbers."""
    rows = b"\0" + struct.pack(">6H", 0, 0, 5, 0, 0, 0x0500)
    data = png(2, 1, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 0, 0, 5)))
    assert decoded(data, "white").tolist() == [[[255] * 3, [0, 0, 5]]]


def test_a_key_colour_of_16_bits_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0).integers(0, 3, (40, 30, 3)) * 0x0101 + 0x1200
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in draws)
    data = png(30, 40, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 0x1200, 0x1301, 0x1200)))
    whole = decoded(data, "#ff00ff")
    hidden = (draws == (0x1200, 0x1301, 0x1200)).all(-1)
    assert 0 < hidden.sum() < 200
    assert (whole[hidden] == (255, 0, 255)).all()
    np.testing.assert_array_equal(whole[~hidden], draws[~hidden] >> 8)
    monkeypatch.setattr(image, "STRIP_PIXELS", 90)
    np.testing.assert_array_equal(decoded(data, "#ff00ff"), whole)


@pytest.mark.parametrize(
    ("depth", "packed", "key", "wanted"),
    [
        (1, b"\x40", 0, [9, 255]),
        (1, b"\x40", 1, [0, 9]),
        (2, b"\x1b", 1, [0, 9, 170, 255]),
        (2, b"\x1b", 3, [0, 85, 170, 9]),
        (4, b"\x05\xaf", 5, [0, 9, 170, 255]),
        (4, b"\x05\xaf", 15, [0, 85, 170, 9]),
        (8, b"\x00\x05\x0a\xff", 5, [0, 9, 10, 255]),
        (8, b"\x00\x05\x0a\xff", 0x0105, [0, 9, 10, 255]),
    ],
)
def test_a_key_colour_of_few_bits(depth: int, packed: bytes, key: int, wanted: list) -> None:
    hidden = chunk(b"tRNS", struct.pack(">H", key))
    data = png(len(wanted), 1, depth, 0, b"\0" + packed, hidden)
    assert decoded(data, "#090909").tolist() == [[[level] * 3 for level in wanted]]


def test_the_higher_bits_of_a_key_colour_of_8_bits_mean_nothing() -> None:
    hidden = chunk(b"tRNS", struct.pack(">3H", 0x0105, 0xFF06, 7))
    data = png(2, 1, 8, 2, b"\0" + bytes([5, 6, 7, 1, 255, 0]), hidden)
    assert decoded(data, "white").tolist() == [[[255] * 3, [1, 255, 0]]]


def test_one_bit_and_eight_bit_grey() -> None:
    bits = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    assert decoded(encode(bits)).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]
    ramp = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(ramp))), np.dstack([ramp] * 3))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    wanted = np.rint(ramp / 257).astype(np.uint8)
    assert (wanted.min(), wanted.max(), len(np.unique(wanted))) == (0, 255, 256)
    for data in (
        encode(Image.fromarray(ramp)),
        encode(Image.fromarray(ramp), "TIFF"),
        png(256, 256, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp)),
    ):
        np.testing.assert_array_equal(decoded(data)[..., 1], wanted)
    np.testing.assert_array_equal(
        decoded(encode(Image.fromarray(ramp.astype(np.int32)), "TIFF"))[..., 0], wanted
    )
    assert "70000" in reason(Image.fromarray(np.array([[0, 70000]], np.int32)))
    big_endian = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 257 * 7, 65535))
    assert decoded(big_endian).tolist() == [[[7] * 3, [255] * 3]]


def test_sixteen_bit_colour() -> None:
    data = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32896, 65535, 257, 514, 51400))
    assert decoded(data).tolist() == [[[0, 128, 255], [1, 2, 200]]]


def test_float_grey() -> None:
    assert decoded(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    assert decoded(encode(Image.fromarray(np.array([[0, 100.4, 255]], np.float32)), "TIFF"))[
        0, :, 0
    ].tolist() == [0, 100, 255]
    for bad in (np.nan, np.inf, -0.5, 256.0):
        assert "float grey values" in reason(Image.fromarray(np.array([[0, bad]], np.float32)))


def test_cmyk_without_profile() -> None:
    inks = np.array(
        [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8
    )
    plain = Image.frombytes("CMYK", (5, 1), inks.tobytes())
    wanted = [[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    assert decoded(encode(plain, "TIFF")).tolist() == [wanted]
    blocks = decoded(encode(plain.resize((80, 16), Image.Resampling.NEAREST), "JPEG", quality=100))
    assert np.abs(blocks[8, 8::16].astype(int) - wanted).max() <= 6


def test_cmyk_goes_through_its_profile() -> None:
    plain = Image.frombytes("CMYK", (3, 1), bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 255, 255, 0]))
    white, cyan, other = decoded(encode(plain, "TIFF", icc_profile=cmyk_profile()))[0].astype(int)
    assert white.min() >= 253 and other.min() >= 253  # by the plain conversion the third is red
    assert (
        np.abs(cyan - 119).max() <= 3
    )  # L* = 50 is 119 in sRGB; the plain conversion gives (0, 255, 255)


def test_rgb_goes_through_its_profile() -> None:
    middle = np.full((1, 1, 3), 128, np.uint8)
    profile = linear_profile()
    assert (
        np.abs(
            decoded(encode(Image.fromarray(middle), icc_profile=profile)).astype(int) - 188
        ).max()
        <= 1
    )
    half = Image.fromarray(np.dstack([middle.repeat(2, 1), np.array([[255, 0]], np.uint8)]))
    with_alpha = decoded(encode(half, icc_profile=profile), "#010203")[0].astype(int)
    assert np.abs(with_alpha[0] - 188).max() <= 1 and with_alpha[1].tolist() == [1, 2, 3]
    palette = Image.fromarray(middle).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(decoded(encode(palette, icc_profile=profile)).astype(int) - 188).max() <= 1


def test_an_srgb_profile_or_a_useless_one_changes_no_number() -> None:
    from PIL import ImageCms

    ramp = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.any(
        np.asarray(color.apply_profile(Image.fromarray(ramp), tabled_srgb_profile())) != ramp
    )
    for profile in (
        srgb,
        tabled_srgb_profile(),
        b"no profile",
        linear_profile()[:150],
        cmyk_profile(),
    ):
        np.testing.assert_array_equal(
            decoded(encode(Image.fromarray(ramp), icc_profile=profile)), ramp
        )


def test_animations_show_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decoded(data).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64, kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(kind: str, tmp_path: Path) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    data = encode(noise, kind)
    decoded(data)
    for part in (0, 1, 5, 17, 60, len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        (tmp_path / "cut").write_bytes(data[:part])
        assert reason(tmp_path / "cut"), part


def test_thousands_of_damaged_files_raise_one_kind_of_fault() -> None:
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encode(noise, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")] + [
        encode(noise, kind) for kind in ("GIF", "BMP")
    ]
    refused = 0
    for i in range(3000):
        data = bytearray(files[i % len(files)])
        for _ in range(3):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            image.decode(bytes(data), background="white", max_pixels=10**5)
        except Undecodable as error:
            assert str(error)
            refused += 1
    assert 300 < refused < 3000


def test_a_bomb_is_refused_by_its_header() -> None:
    header_only = png(20000, 20000, 1, 0, b"")
    assert (
        reason(header_only, max_pixels=178_956_970)
        == "20000x20000 pixels are more than data.max_pixels = 178956970: a decompression bomb?"
    )
    assert "39000x39000" in reason(
        encode(Image.new("1", (1, 1)), "BMP").replace(
            struct.pack("<ii", 1, 1), struct.pack("<ii", 39000, 39000)
        ),
        max_pixels=178_956_970,
    )
    assert decoded(encode(Image.new("L", (10, 10))), max_pixels=100).shape == (10, 10, 3)
    for big in (
        encode(Image.new("L", (101, 1))),
        np.zeros((101, 1), np.uint8),
        Image.new("L", (101, 1)),
    ):
        assert "data.max_pixels = 100" in reason(big, max_pixels=100)


def test_a_limit_above_pillows_own_is_honoured_without_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        assert decoded(encode(Image.new("L", (20, 20)), kind)).shape == (20, 20, 3)


def test_want_of_memory_is_not_blamed_on_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decoded(encode(Image.fromarray(MARK)))


def test_what_is_no_picture(tmp_path: Path) -> None:
    assert reason(tmp_path / "none.png") == "no such file"
    assert reason(tmp_path) == "not a regular file"
    assert reason(b"") == "the file is empty"
    assert reason(b"<html>not found</html>").startswith(
        "not a picture in a known format (PNG, JPEG"
    )
    assert "not a picture" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "this is int" in reason(5)


def test_arrays() -> None:
    np.testing.assert_array_equal(decoded(MARK), MARK)
    np.testing.assert_array_equal(decoded(MARK[:, ::-1]), MARK[:, ::-1])
    np.testing.assert_array_equal(decoded(MARK[..., 0]), np.dstack([MARK[..., 0]] * 3))
    for wrong, words in (
        (MARK.astype(np.complex64), "complex64"),
        (MARK[..., :2], "(2, 3, 2)"),
        (MARK[0, 0], "(3,)"),
        (MARK.astype(str), "<U3"),
    ):
        assert "an array must be uint8" in reason(wrong) and words in reason(wrong)
    assert "empty picture" in reason(np.zeros((0, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (MARK.astype(np.float32), MARK),
        (MARK.astype(np.int64), MARK),
        (MARK / 255, MARK),
        ((MARK / 255).astype(np.float16), MARK),
        (MARK.astype(np.uint16) * 257, MARK),
        (MARK.astype(np.int32) * 257, MARK),
        (MARK > 100, (MARK > 100) * 255),
        ((MARK > 100).astype(np.float64), (MARK > 100) * 255),
        # 16 bits are 16 bits, however dark the picture is.
        (MARK.astype(np.uint16), (MARK > 128) * 1),
        (MARK.astype(">u2"), (MARK > 128) * 1),
        (np.zeros((2, 3, 3), np.uint16), np.zeros((2, 3, 3))),
        (MARK.astype(np.uint32), MARK),
    ],
)
def test_arrays_of_other_numbers_are_taken_by_their_range(
    array: np.ndarray, wanted: np.ndarray
) -> None:
    np.testing.assert_array_equal(decoded(array), wanted)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (MARK / 127.5 - 1, "float64 of -1 to 1"),
        (MARK / 255 * 1.001, "float64 of 0 to 1.001"),  # an overshoot, not black of 255
        (MARK.astype(np.float32) * 0.7, "float32 of 0 to 178.5"),
        (MARK.astype(np.int16) - 1, "int16 of -1 to 254"),
        (MARK.astype(np.int64) * 10**6, "int64 of 0 to 2.55e+08"),
        (np.where(MARK > 250, np.nan, 0.5), "of nan to nan"),
        (np.where(MARK > 250, np.inf, 0.5), "of 0.5 to inf"),
    ],
)
def test_arrays_of_numbers_that_could_mean_anything_are_refused(
    array: np.ndarray, words: str
) -> None:
    assert words in reason(array) and "whole numbers of 0 to 255 or 65535" in reason(array)


def test_threads_decode_the_same_as_one(tmp_path: Path) -> None:
    linear, exif = linear_profile(), Image.Exif()
    exif[0x0112] = 6
    files = [
        encode(Image.fromarray(MARK.repeat(20, 0)), kind, icc_profile=linear, exif=exif)
        for kind in ("PNG", "JPEG", "TIFF", "WEBP")
    ]
    files.append(encode(Image.fromarray(np.dstack([MARK, MARK[..., :1]]))))
    alone = [decoded(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for i, result in enumerate(pool.map(decoded, files * 20)):
            np.testing.assert_array_equal(result, alone[i % len(files)])


def test_an_unknown_background_is_refused() -> None:
    assert image.parse_color("DarkSlateGray") == (47, 79, 79)
    for wrong in ("whit", "#12", "", "#11223344"):
        with pytest.raises(InputError, match=r"data\.background"):
            image.parse_color(wrong)


@pytest.mark.parametrize(
    ("original", "wanted"),
    [
        ((300, 400), (64, 85)),
        ((400, 300), (85, 64)),
        ((64, 64), (64, 64)),
        ((10, 37), (64, 236)),
        ((1000, 999), (64, 64)),
        ((77, 50), (98, 64)),
    ],
)
def test_the_shorter_side_is_resized_and_the_longer_rounded_down(
    original: tuple[int, int], wanted: tuple[int, int]
) -> None:
    shape = geometry.place_crop(original, (64, 64))
    assert (shape.height, shape.width) == wanted
    assert (shape.top, shape.left) == (round((wanted[0] - 64) / 2), round((wanted[1] - 64) / 2))
    assert geometry.count_crops(shape) == (wanted[0] - 63) * (wanted[1] - 63)


def test_centre_crops_round_halves_to_even() -> None:
    assert [geometry.place_crop((64, 64 + extra), (64, 64)).left for extra in range(8)] == [
        0,
        0,
        1,
        2,
        2,
        2,
        3,
        4,
    ]


def test_random_crops_reach_every_place_and_no_further() -> None:
    lefts = [
        geometry.place_crop((10, 13), (10, 10), 0.5, u, False, "random").left
        for u in np.linspace(0, 1, 4001)[:-1]
    ]
    assert np.bincount(lefts).tolist() == [1000] * 4
    edge = geometry.place_crop((13, 10), (10, 10), np.nextafter(1, 0), 0.0, True, "random")
    assert edge == Geometry(13, 10, 3, 0, 10, 10, True) and all(
        type(v) is int for v in (edge.top, edge.left)
    )
    assert geometry.place_crop((10, 13), (10, 10), 0.99, 0.99, False, "center") == Geometry(
        10, 13, 0, 2, 10, 10, False
    )


@pytest.mark.parametrize("resample", sorted(RESAMPLE))
def test_cut_is_resize_then_crop_then_flip(resample: str) -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (30, 47, 3), np.uint8)
    picture = Image.fromarray(rgb)
    kind = Image.Resampling["NEAREST" if resample == "nearest_exact" else resample.upper()]
    wanted = np.asarray(picture.resize((25, 16), kind).crop((5, 0, 21, 16)))
    straight, flipped = (
        image.crop(np.asarray(picture), Geometry(16, 25, 0, 5, 16, 16, flip), resample)
        for flip in (False, True)
    )
    if resample in KERNELS:  # of noise, the hardest that can be resized
        assert (
            np.abs(straight.astype(int) - wanted).max() <= 10
            and np.abs(straight.astype(float) - wanted).mean() < 0.75
        )
    else:
        np.testing.assert_array_equal(straight, wanted)
    np.testing.assert_array_equal(flipped, straight[:, ::-1])
    assert straight.flags.c_contiguous and flipped.flags.c_contiguous and straight.dtype == np.uint8


@pytest.mark.parametrize("resample", ["nearest", "nearest_exact"])
def test_the_nearest_pixels_are_those_of_pil_at_every_size(
    resample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large picture too, whose pixels other filters average first."""
    draws = np.random.default_rng(4)
    monkeypatch.setattr(image, "LARGE", 1000)
    for _ in range(300):
        height, width, *new = (int(side) for side in draws.integers(1, 160, 4))
        rgb = draws.integers(0, 256, (height, width, 3), np.uint8)
        wanted = np.asarray(Image.fromarray(rgb).resize(new[::-1], Image.Resampling.NEAREST))
        top, left = draws.integers(0, new)
        cut = Geometry(*new, int(top), int(left), new[0] - int(top), new[1] - int(left), True)
        np.testing.assert_array_equal(image.crop(rgb, cut, resample), wanted[top:, left:][:, ::-1])
    for count, new_count in ((17_001, 512), (100_003, 1021), (512, 511), (3, 40_000)):
        line = np.arange(count, dtype=np.int32)[None]
        wanted = np.asarray(Image.fromarray(line).resize((new_count, 1), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(image.pick_nearest(count, new_count), wanted[0])


BROKEN_EXIF = [
    b"Exif\0\0garbage",
    b"Exif\0\0II",
    b"Exif\0\0",
    b"II*\0\xff\xff\xff\xff",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0",
]


@pytest.mark.parametrize("exif", BROKEN_EXIF)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exif_that_cannot_be_read_is_none(kind: str, exif: bytes) -> None:
    options = {} if kind == "JPEG" else {"lossless": True}
    whole = decoded(encode(Image.fromarray(MARK), kind, **options))
    if kind != "JPEG":
        np.testing.assert_array_equal(whole, MARK)
    broken = encode(Image.fromarray(MARK), kind, exif=exif, **options)
    np.testing.assert_array_equal(decoded(broken), whole)


@pytest.mark.parametrize("text", [b"zz\nexif\n 4\nxyzw", b"\nexif\n   6\n123456", b""])
def test_exif_in_a_text_that_cannot_be_read_is_none(text: bytes) -> None:
    extra = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    content = png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", extra)
    np.testing.assert_array_equal(decoded(content), [[[1, 2, 3], [4, 5, 6]]])


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_may_not_have_texts_without_number(
    kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 MB of them were 8.6 seconds."""
    name = b"icc" if kind == b"iCCP" else b"XML:com.adobe.xmp"
    head = name + (b"\0\1\0\0\0" if kind == b"iTXt" else b"\0\0")
    long = chunk(kind, head + zlib.compress(b"x" * 2**20))
    unpacked = []
    decompress = zlib.decompressobj

    class Count:
        def decompress(self, data: bytes, limit: int) -> bytes:
            unpacked.append(decompress().decompress(data, limit))
            return unpacked[-1]

    monkeypatch.setattr("limner.data.picture_file.zlib.decompressobj", Count)
    data = b"\0\1\2\3\4\5\6"
    assert reason(png(2, 1, 8, 2, data, long * 1000)) == (
        "texts and profiles of more than 64 MiB: save it without"
    )
    assert len(unpacked) == 65
    damaged = chunk(kind, head + zlib.compress(bytes(2**20))[:-6] + b"xxxxxx")
    assert "more than 64 MiB" in reason(png(2, 1, 8, 2, data, damaged * 1000))
    monkeypatch.undo()
    assert decoded(png(2, 1, 8, 2, data, long)).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(
        image.crop(rgb, geometry.place_crop((8, 8), (8, 8)), "lanczos"), rgb
    )


def test_pixels_are_what_to_tensor_and_normalize_give() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 8, 32, 1).repeat(3, 3)
    levels[..., 1] = 255 - levels[..., 1]
    result = image.to_pixels(levels)
    assert (
        result.shape == (1, 3, 8, 32) and result.dtype == np.float32 and result.flags.c_contiguous
    )
    exact = (levels.astype(np.float64).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(result, exact, rtol=0, atol=1.2e-7)
    assert result.min() == -1 and result.max() == 1


@pytest.mark.frameworks
def test_pixels_equal_torch_to_the_bit() -> None:
    torch = pytest.importorskip("torch")
    levels = torch.arange(256, dtype=torch.uint8)
    wanted = levels.to(torch.float32).div(255).sub_(0.5).div_(0.5)
    result = image.to_pixels(levels.numpy().reshape(1, 16, 16, 1).repeat(3, 3))
    assert np.array_equal(result[0, 2].reshape(-1), wanted.numpy())


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: noise of all scales, with a few hard edges."""
    draws, whole = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for level in range(2, 9):
        small = draws.standard_normal((2**level, 2**level, 3)).astype(np.float32)
        whole += 0.6**level * np.stack(
            [
                np.asarray(
                    Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC)
                )
                for c in range(3)
            ],
            -1,
        )
    picture = Image.fromarray(
        ((whole - whole.min()) / (whole.max() - whole.min()) * 255).astype(np.uint8)
    )
    for _ in range(6):
        left, top = (int(v) for v in draws.integers(0, min(height, width) - 20, 2))
        picture.paste(
            tuple(int(v) for v in draws.integers(0, 255, 3)), (left, top, left + 20, top + 9)
        )
    return picture


def jpeg(picture: Image.Image, **settings: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", **{"quality": 90, **settings})
    return stream.getvalue()


OPTIONS = {"background": "white", "max_pixels": 10**8}


@pytest.mark.parametrize("resample", sorted(RESAMPLE))
@pytest.mark.parametrize(
    "kind", ["420", "444", "progressive", "grey", "cmyk", "turned", "profile", "png"]
)
def test_loading_is_cutting_what_is_decoded_whatever_the_way(resample: str, kind: str) -> None:
    """The fast way and the other give the same bits, so that a cached picture does not depend on
    which was taken."""
    picture = smooth(210, 317)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = {
        "420": lambda: jpeg(picture, subsampling=2),
        "444": lambda: jpeg(picture, subsampling=0),
        "progressive": lambda: jpeg(picture, progressive=True),
        "grey": lambda: jpeg(picture.convert("L")),
        "cmyk": lambda: jpeg(picture.convert("CMYK")),
        "turned": lambda: jpeg(picture, exif=exif),
        "profile": lambda: jpeg(picture, icc_profile=linear_profile()),
        "png": lambda: encode(picture),
    }[kind]()
    whole = image.decode(content, **OPTIONS)
    for shape, flip in (((64, 64), False), ((48, 80), True), ((200, 200), True)):
        cut = geometry.place_crop(whole.shape[:2], shape, 0.3, 0.9, flip, "random")
        np.testing.assert_array_equal(
            image.load_views(content, [(cut, resample)], **OPTIONS)[0],
            image.crop(whole, cut, resample),
        )


@pytest.mark.parametrize(
    ("resample", "most", "mean"), [("lanczos", 12, 0.3), ("bicubic", 12, 0.3), ("bilinear", 8, 0.3)]
)
def test_the_fast_filters_are_those_of_pil(resample: str, most: int, mean: float) -> None:
    picture = smooth(600, 800)
    cut = geometry.place_crop((600, 800), (256, 256))
    wanted = np.asarray(picture.resize((cut.width, cut.height), RESAMPLE[resample]), int)[
        :, cut.left : cut.left + 256
    ]
    difference = np.abs(image.crop(np.asarray(picture), cut, resample) - wanted)
    assert (
        difference.max() <= most and difference.mean() < mean and np.percentile(difference, 99) <= 2
    )


def test_loading_is_the_same_in_many_threads() -> None:
    contents = [jpeg(smooth(300, 400, seed)) for seed in range(6)]
    cut = geometry.place_crop((300, 400), (96, 128))
    alone = [image.load_views(content, [(cut, "lanczos")], **OPTIONS)[0] for content in contents]
    with ThreadPoolExecutor(4) as pool:
        for content, found in zip(
            contents * 8,
            pool.map(lambda c: image.load_views(c, [(cut, "lanczos")], **OPTIONS)[0], contents * 8),
            strict=True,
        ):
            np.testing.assert_array_equal(found, alone[contents.index(content)])


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
def test_a_damaged_jpeg_is_found_on_the_fast_way(keep: float) -> None:
    content = jpeg(smooth(300, 400))
    with pytest.raises(Undecodable):
        image.load_views(
            content[: int(len(content) * keep)],
            [(geometry.place_crop((300, 400), (64, 64)), "lanczos")],
            **OPTIONS,
        )
    with pytest.raises(Undecodable, match=r"400x300 pixels are more than data.max_pixels = 1000"):
        image.load_views(
            content,
            [(geometry.place_crop((300, 400), (64, 64)), "lanczos")],
            background="white",
            max_pixels=1000,
        )
