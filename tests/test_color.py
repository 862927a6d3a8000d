"""Profiles of every colour space are honoured; what a PNG carries beside its pixels keeps no
picture away; and no picture takes more memory than it may."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_image import (
    chunk,
    cmyk_profile,
    decoded,
    encode,
    icc,
    linear_profile,
    png,
    reason,
)

from limner.data import geometry, image, picture_file

RAMP = np.arange(0, 256, 5, dtype=np.uint8)[None]


def grey_profile(curve: bytes) -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"kTRC": b"curv\0\0\0\0" + curve, b"wtpt": white}
    return icc(b"mntr", b"GRAY", b"XYZ ", tags)


LINEAR = grey_profile(struct.pack(">I", 0))
SRGB_LIGHT = [188, 255]  # of a linear 128 and 255


def encode_light(value: np.ndarray) -> np.ndarray:
    """What sRGB writes for light of 0 to 1."""
    low, high = value * 12.92, 1.055 * np.maximum(value, 1e-9) ** (1 / 2.4) - 0.055
    return np.where(value <= 0.0031308, low, high) * 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "L;16", "LA", "key"])
def test_grey_goes_through_its_profile(kind: str) -> None:
    ramp = RAMP.repeat(16, 0)
    wanted = encode_light(ramp / 255)
    options: dict[str, object] = {"icc_profile": LINEAR}
    picture, form = Image.fromarray(ramp), kind if kind in ("PNG", "JPEG", "TIFF") else "PNG"
    if kind == "L;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif kind == "LA":
        picture = Image.merge("LA", (picture, Image.new("L", picture.size, 255)))
    elif kind == "key":
        options["transparency"] = 1  # a value that the ramp does not have
    result = decoded(encode(picture, form, **options))
    # The darkest values of 8 bits are steep: a level of JPEG's is 13 of sRGB.
    bright = ramp[0] > 40
    assert np.abs(result[:, bright, 0] - wanted[:, bright]).max() <= (4 if kind == "JPEG" else 1)
    assert np.abs(result.astype(int) - result[..., :1]).max() <= 1


def test_grey_behind_transparency_goes_through_its_profile() -> None:
    grey = np.array([[128, 128, 255]], np.uint8)
    alpha = np.array([[255, 0, 255]], np.uint8)
    picture = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    result = decoded(encode(picture, icc_profile=LINEAR), "#010203")
    assert result.tolist() == [[[188] * 3, [1, 2, 3], [255] * 3]]


def test_lab_becomes_srgb() -> None:
    rgb = np.random.default_rng(0).integers(20, 236, (6, 7, 3), np.uint8)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(rgb), *profiles, outputMode="LAB")
    assert lab is not None and lab.mode == "LAB"
    data = encode(lab, "TIFF")
    # Lab of 8 bits has about two levels of sRGB in a step.
    assert np.abs(decoded(data).astype(int) - rgb).mean() < 2
    lab_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(
        decoded(encode(lab, "TIFF", icc_profile=lab_profile)), decoded(data)
    )


@pytest.mark.parametrize("profile", [linear_profile(), cmyk_profile(), LINEAR[:140], b"none"])
def test_a_profile_of_another_space_changes_no_grey(profile: bytes) -> None:
    data = encode(Image.fromarray(RAMP), icc_profile=profile)
    np.testing.assert_array_equal(decoded(data)[..., 0], RAMP)


def text_chunk(kind: bytes, name: bytes, text: bytes) -> bytes:
    packed = zlib.compress(text, 9)
    return chunk(
        kind,
        {
            b"tEXt": name + b"\0" + text,
            b"zTXt": name + b"\0\0" + packed,
            b"iTXt": name + b"\0\1\0\0\0" + packed,
            b"iCCP": name + b"\0\0" + packed,
        }[kind],
    )


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("size", [2**20 + 1, 2**24 + 1])
@pytest.mark.parametrize("place", ["before", "after"])
def test_long_texts_and_profiles_keep_no_picture_away(kind: bytes, size: int, place: str) -> None:
    rows = b"\0" + bytes([9, 8, 7, 200, 100, 50])
    extra = text_chunk(kind, b"Comment", b"\0" * size)
    data = png(2, 1, 8, 2, rows, extra if place == "before" else b"")
    if place == "after":
        data = data.replace(chunk(b"IEND", b""), extra + chunk(b"IEND", b""))
    assert decoded(data).tolist() == [[[9, 8, 7], [200, 100, 50]]]


def test_many_texts_keep_no_picture_away() -> None:
    texts = b"".join(text_chunk(b"zTXt", b"key%d" % i, b" " * 2**20) for i in range(70))
    assert decoded(png(1, 1, 8, 0, b"\0\7", texts)).tolist() == [[[7] * 3]]


def test_headers_without_number_are_refused() -> None:
    chunks = chunk(b"abCd", b"") * 2**19
    assert reason(png(1, 1, 8, 0, b"\0\7", chunks)) == "more than 524288 chunks"
    content = encode(Image.new("L", (8, 8), 7), "JPEG")
    for part in (b"\xff\xfe\0\2", b"\x01"):
        at = content.index(b"\xff\xdb")  # the first table of quantization
        many = content[:at] + part * 2**19 + content[at:]
        assert reason(many) == "more than 524288 headers"
        few = content[:at] + part * 100 + content[at:]
        np.testing.assert_array_equal(decoded(few), decoded(content))


def test_a_long_profile_is_honoured() -> None:
    long = linear_profile() + b"\0" * 2**21
    extra = text_chunk(b"iCCP", b"light", long)
    assert decoded(png(1, 1, 8, 2, b"\0" + bytes([128] * 3), extra)).tolist() == [[[188] * 3]]


@pytest.mark.parametrize(
    "extra",
    [
        text_chunk(
            b"iTXt",
            b"XML:com.adobe.xmp",
            b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><tiff:Orientation>6'
            b"</tiff:Orientation></x:xmpmeta>",
        ),
        chunk(b"tEXt", b"Software\0anything"),
    ],
)
def test_texts_that_turn_a_picture_still_do(extra: bytes) -> None:
    data = png(2, 1, 8, 0, b"\0\1\2", extra)
    turned = b"Orientation" in zlib.decompress(extra[8 + 22 : -4]) if b"XML" in extra else False
    assert decoded(data)[..., 0].tolist() == ([[1], [2]] if turned else [[1, 2]])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB"])
def test_strips_make_the_same_picture_as_the_whole(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = np.random.default_rng(0)
    if mode == "F":
        picture = Image.fromarray(draws.random((31, 17), np.float32))
    elif mode == "I;16":
        picture = Image.fromarray(draws.integers(0, 65536, (31, 17), np.uint16))
    else:
        picture = Image.fromarray(draws.integers(0, 256, (31, 17, 4), np.uint8))
        picture = picture.convert("RGB").convert(mode) if mode != "RGBA" else picture
        if mode == "LAB":
            picture = Image.frombytes("LAB", (17, 31), draws.bytes(31 * 17 * 3))
    if mode == "P":
        picture.info["transparency"] = bytes(range(256))
    whole = decoded(picture, "#102030")
    monkeypatch.setattr(image, "STRIP_PIXELS", 17 * 4)
    np.testing.assert_array_equal(decoded(picture, "#102030"), whole)
    pixels = draws.integers(0, 256, (31, 17, 3), np.uint8)
    reduced = np.asarray(Image.fromarray(pixels).reduce(3))
    np.testing.assert_array_equal(image.shrink(pixels, 3), reduced)


@pytest.mark.parametrize("high", [0.5, 1.0, 200.0])
def test_floats_have_one_scale_in_all_strips(high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.full((8, 4), 0.5, np.float32)
    values[7] = high
    monkeypatch.setattr(image, "STRIP_PIXELS", 4)
    result = decoded(Image.fromarray(values))[..., 0]
    wanted = np.rint(values * (255 if high <= 1 else 1))
    np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize(
    ("side", "depth", "colour", "words"),
    [
        (12_000, 8, 2, "12000x12000 pixels take 961 MiB while they are unpacked"),
        (12_000, 8, 6, "take 961 MiB"),
        (16_000, 1, 0, "take 976 MiB"),
    ],
)
def test_memory_is_bounded_by_the_header(side: int, depth: int, colour: int, words: str) -> None:
    told = reason(png(side, side, depth, colour, b""), max_pixels=10**9)
    assert words in told and "896 at most" in told


def test_a_large_picture_is_halved_before_pil_resizes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (410, 610, 3), np.uint8)
    cut = geometry.place_crop((410, 610), (40, 40))
    whole = image.crop(pixels, cut, "box")
    monkeypatch.setattr(image, "LARGE", 1000)
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *a: sizes.append(self.size) or resize(self, *a)
    )
    small = image.crop(pixels, cut, "box")
    assert sizes == [(61, 41)] and np.abs(small.astype(int) - whole).mean() < 9
    near = geometry.place_crop((410, 610), (250, 250))
    image.crop(pixels, near, "box")
    assert sizes[-1] == (610, 410)


def test_a_file_beyond_all_memory_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.new("RGB", (4, 4))))
    monkeypatch.setattr(picture_file, "MEMORY", 10)
    assert reason(path) == "a file of 0 MiB; at most 0 are read"


def test_a_usual_srgb_profile_of_grey_changes_nothing() -> None:
    value = np.linspace(0, 1, 1024)
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    curve = struct.pack(">I1024H", 1024, *np.rint(light * 65535).astype(int))
    data = encode(Image.fromarray(RAMP), icc_profile=grey_profile(curve))
    np.testing.assert_array_equal(decoded(data)[..., 0], RAMP)
