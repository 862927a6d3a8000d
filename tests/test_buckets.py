"""Sizes of about the same area; a picture goes to the one whose proportions are nearest."""

import math

import pytest

from limner.config import toml
from limner.config.schema import BucketSettings, DataSettings
from limner.data import buckets
from limner.data.buckets import TooSmall, choose_shape, make_shapes
from limner.errors import InputError

# Height x width, of the table in appendix I of arXiv:2307.01952.
HALF = """
512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408
704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024
""".split()  # noqa: SIM905


def data(size: int = 1024, **settings) -> DataSettings:
    return toml.build(DataSettings, {"size": size, "buckets": settings})


def test_the_sizes_of_the_paper_and_their_areas():
    found = make_shapes(1024, BucketSettings())
    paper = {(int(a), int(b)) for a, b in (name.split("x") for name in HALF)}
    paper |= {(w, h) for h, w in paper} | {(1024, 1024)}
    near = [min(max(abs(h - a), abs(w - b)) for a, b in found) for h, w in paper]
    assert (len(paper), near.count(0), max(near)) == (
        41,
        21,
        64,
    )  # the same sizes, or neighbours by one step
    assert (
        found == tuple(sorted(set(found)))
        and (1024, 1024) in found
        and {(w, h) for h, w in found} == set(found)
    )
    assert all(h % 64 == w % 64 == 0 and 512 <= h <= 2048 and 512 <= w <= 2048 for h, w in found)
    assert max(abs(h * w / 1024**2 - 1) for h, w in found) <= 64 / (2 * 512)


@pytest.mark.parametrize(
    ("size", "step"), [(512, 64), (512, 8), (768, 64), (1024, 8), (64, 8), (65, 8), (100, 64)]
)
def test_areas_are_near_whatever_the_size(size, step):
    found = make_shapes(size, BucketSettings(step))
    shortest = min(min(shape) for shape in found)
    assert max(abs(h * w / size**2 - 1) for h, w in found) <= max(
        step / (2 * shortest), 0.7 if size == 100 else 0
    )


def test_bounds_are_kept():
    assert make_shapes(1024, BucketSettings(64, smallest=1024, largest=1024)) == ((1024, 1024),)
    assert all(
        700 <= side <= 1500
        for shape in make_shapes(1024, BucketSettings(64, smallest=700, largest=1500))
        for side in shape
    )
    with pytest.raises(
        InputError,
        match="no size of about 1024x1024 pixels has sides that are multiples of 64, at least "
        "1280 and at most 1280",
    ):
        make_shapes(1024, BucketSettings(64, smallest=1280, largest=1300))


def test_the_nearest_proportions_win():
    settings = data()
    for original in [
        (3000, 4000),
        (4000, 3000),
        (1000, 1000),
        (500, 3000),
        (1080, 1920),
        (1, 5000),
    ]:
        chosen = choose_shape(original, settings)
        far = {
            shape: abs(math.log(original[0] / original[1] * shape[1] / shape[0]))
            for shape in make_shapes(1024, settings.buckets)
        }
        assert far[chosen] == min(far.values())
    assert (
        choose_shape((3000, 4000), settings) == (896, 1152)
        and choose_shape((1080, 1920), settings) == (768, 1344)
        and choose_shape((9, 9), settings) == (1024, 1024)
    )
    assert choose_shape((3000, 4000), DataSettings(size=512)) == (512, 512)


def test_several_resolutions_take_the_largest_that_is_filled():
    settings = data(resolutions=[512, 1024, 768])
    assert [
        choose_shape((side, side), settings) for side in (2000, 1024, 1023, 768, 767, 512, 100)
    ] == [
        (1024, 1024),
        (1024, 1024),
        (768, 768),
        (768, 768),
        (512, 512),
        (512, 512),
        (512, 512),
    ]
    assert choose_shape((1100, 700), settings) == (
        960,
        640,
    )  # of 768, which it fills; for 1024 it would be 1280x832


def test_too_small_is_said_in_width_and_height():
    with pytest.raises(
        TooSmall,
        match=r"300x200 pixels are too small for its bucket of 640x384 \(data.buckets.upscale "
        r"= false\)",
    ):
        choose_shape((200, 300), data(512, upscale=False))
    assert (
        choose_shape((384, 640), data(512, upscale=False))
        == (384, 640)
        == choose_shape((200, 300), data(512))
    )
    assert buckets.choose_shape((512, 512), data(1024, upscale=False, resolutions=[512, 1024])) == (
        512,
        512,
    )
