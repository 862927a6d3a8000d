"""JPEGs: one decoder decides, for the check and for training; and what it takes is bounded."""

import io

import numpy as np
import pytest
from PIL import Image

from limner.config.schema import DataSettings
from limner.data import geometry, image, picture_file
from limner.data.index import build_index
from limner.data.picture_file import Undecodable
from limner.data.source import Record

OPTIONS = {"background": "white", "max_pixels": 10**9}
STRAY = bytes(range(1, 48))  # no 0xFF among them


def scene(mode: str = "RGB") -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(small).resize((120, 90), Image.Resampling.BICUBIC).convert(mode)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    scene(mode).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


KINDS = {
    "rgb": {},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "progressive": {"progressive": True},
    "turned": {"exif": turned()},
    "restarts": {"restart_marker_blocks": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stray_bytes_before_the_end_change_no_pixel(kind: str) -> None:
    content = jpeg(**KINDS[kind])
    stray = content[:-2] + STRAY + content[-2:]
    with pytest.raises(ValueError, match="extraneous bytes before marker"):
        decode_strictly(stray, kind)
    wanted = image.decode(content, **OPTIONS)
    np.testing.assert_array_equal(image.decode(stray, **OPTIONS), wanted)
    cut = geometry.place_crop(wanted.shape[:2], (64, 64))
    loaded = [image.load_views(one, [(cut, "lanczos")], **OPTIONS)[0] for one in (content, stray)]
    np.testing.assert_array_equal(*loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_stray_bytes_between_the_headers_change_no_pixel(kind: str) -> None:
    content = jpeg(**KINDS[kind])
    at = content.index(b"\xff\xdb")  # the first table of quantization
    stray = content[:at] + STRAY + content[at:]
    with pytest.raises(ValueError, match="47 extraneous bytes before marker 0xdb"):
        decode_strictly(stray, kind)
    np.testing.assert_array_equal(image.decode(stray, **OPTIONS), image.decode(content, **OPTIONS))


def test_an_unknown_revision_changes_no_pixel() -> None:
    content = jpeg()
    at = content.index(b"JFIF\0") + 5
    later = content[:at] + b"\x09\x07" + content[at + 2 :]
    with pytest.raises(ValueError, match=r"unknown JFIF revision number 9\.07"):
        decode_strictly(later, "rgb")
    np.testing.assert_array_equal(image.decode(later, **OPTIONS), image.decode(content, **OPTIONS))


def decode_strictly(content: bytes, kind: str) -> None:
    import simplejpeg

    simplejpeg.decode_jpeg(content, {"grey": "GRAY", "cmyk": "CMYK"}.get(kind, "RGB"))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_pil(kind: str) -> None:
    content = jpeg(**KINDS[kind])
    with Image.open(io.BytesIO(content)) as picture:
        wanted = np.asarray(picture.convert("RGB"))
    wanted = np.rot90(wanted, -1) if kind == "turned" else wanted
    np.testing.assert_array_equal(image.decode(content, **OPTIONS), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_check_and_training_agree_on_damage(kind: str) -> None:
    """Also on data that PIL takes with wrong pixels: those are refused when a run begins."""
    draws, content = np.random.default_rng(1), jpeg(**KINDS[kind])
    taken_by_pil, refused = 0, 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in draws.integers(len(content) // 2, len(content), 8):
            damaged[place] = draws.integers(256)
        record = Record("a", bytes(damaged), ("x",))
        settings = DataSettings(size=32, on_bad_record="skip")
        index = build_index(
            [record, Record("b", content, ("y",))], settings, report=lambda line: None
        )
        cut = geometry.place_crop((90, 120), (32, 32))
        try:
            image.load_views(bytes(damaged), [(cut, "bicubic")], **OPTIONS)
            assert not index.skipped
        except Undecodable as error:
            assert index.skipped == (("a", str(error)),)
            refused += 1
            taken_by_pil += is_taken_by_pil(bytes(damaged))
    assert refused > 1 and taken_by_pil > 0


def is_taken_by_pil(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
        return True
    except Exception:
        return False


def test_wrong_data_are_told_as_libjpeg_tells_them() -> None:
    content = jpeg()
    half = content[: len(content) // 2] + content[-2:]  # the second half is missing
    with pytest.raises(Undecodable, match="damaged: Corrupt JPEG data: premature end of data"):
        image.decode(half, **OPTIONS)
    with pytest.raises(Undecodable, match="cannot be read: image file is truncated"):
        image.decode(content[:-2], **OPTIONS)


def test_memory_counts_coefficients_turning_and_other_colours() -> None:
    def count(content: bytes) -> int:
        with picture_file.translate_errors():
            return picture_file.count_jpeg_bytes(picture_file.open_content(content), content)

    assert count(jpeg()) == 3
    assert count(jpeg(exif=turned())) == 6
    assert count(jpeg(progressive=True)) == 9
    assert count(jpeg("L")) == 4 and count(jpeg("L", progressive=True)) == 6
    assert count(jpeg("CMYK")) == 7
    small = io.BytesIO()
    scene().save(small, "JPEG", progressive=True)
    with_thumbnail = jpeg(comment=small.getvalue())
    assert with_thumbnail.count(b"\xff\xda") > 9 and count(with_thumbnail) == 3


def enlarge_header(content: bytes, side: int, marker: bytes) -> bytes:
    """Give a JPEG the height and width of a much larger one; its data are not touched."""
    at = content.index(marker) + 5
    return content[:at] + side.to_bytes(2) * 2 + content[at + 4 :]


@pytest.mark.parametrize(
    ("side", "options", "marker", "words"),
    [
        (12_000, {"progressive": True}, b"\xff\xc2", "12000x12000 pixels take 1235 MiB"),
        (18_000, {}, b"\xff\xc0", "18000x18000 pixels take 926 MiB"),
        (13_000, {"exif": turned()}, b"\xff\xc0", "13000x13000 pixels take 967 MiB"),
    ],
)
def test_too_much_memory_is_refused_by_the_header(
    side: int, options: dict, marker: bytes, words: str
) -> None:
    content = enlarge_header(jpeg(**options), side, marker)
    with pytest.raises(Undecodable, match=words):
        image.decode(content, **OPTIONS)


def test_scans_without_number_are_refused_by_the_header() -> None:
    content = enlarge_header(jpeg(progressive=True), 9_000, b"\xff\xc2")
    last = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(Undecodable, match=r"6\d scans of 9000x9000 pixels: save it as an ordinary"):
        image.decode(content[:-2] + last * 50 + content[-2:], **OPTIONS)
