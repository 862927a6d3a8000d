"""Pictures that look alike are found by a few bits of difference, without comparing all with all,
and flat ones look like those of the same pixels."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from limner.data import similarity


def scene(seed: int, size: tuple[int, int] = (180, 240)) -> Image.Image:
    draws = np.random.default_rng(seed)
    small = Image.fromarray(draws.integers(0, 256, (7, 9, 3), np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=60)
    return Image.open(stream)


def look(picture: Image.Image) -> int:
    return similarity.perceptual_hashes(picture)[0]


CHANGES = {
    "as it is": lambda p: p,
    "another format": jpeg,
    "half the size": lambda p: p.resize((120, 90), Image.Resampling.LANCZOS),
    "three times the size": lambda p: p.resize((720, 540), Image.Resampling.BICUBIC),
    "darker": lambda p: ImageEnhance.Brightness(p).enhance(0.8),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_is_found_and_others_are_not(name: str) -> None:
    hashes = [look(scene(i)) for i in range(30)] + [
        look(CHANGES[name](scene(i))) for i in range(30)
    ]
    found = similarity.group_similar(hashes)
    assert len(found) >= 29 and all(group == [group[0], group[0] + 30] for group in found)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_mirror_image_is_found_where_mirrors_are_alike(name: str) -> None:
    pictures = [scene(i) for i in range(30)]
    pictures += [ImageOps.mirror(CHANGES[name](scene(i))) for i in range(30)]
    hashes, mirrored = zip(*map(similarity.perceptual_hashes, pictures), strict=True)
    assert similarity.group_similar(hashes) == []
    found = similarity.group_similar(hashes, mirrored)
    assert len(found) >= 29 and all(group == [group[0], group[0] + 30] for group in found)


def draw_line(column: int) -> Image.Image:
    """A sheet that is all but empty."""
    sheet = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(sheet).line((column, 100, column, 130), fill="black", width=3)
    return sheet


def test_flat_pictures_are_alike_by_their_pixels_only() -> None:
    flat = [Image.new("RGB", (90, 70), colour) for colour in ("white", "black", "red")]
    flat += [Image.new("RGB", (70, 90), "white"), *(draw_line(20 + 50 * i) for i in range(5))]
    assert similarity.group_similar([look(picture) for picture in flat]) == []
    twice = [look(picture) for picture in [*flat, *flat]]
    assert similarity.group_similar(twice) == [[i, i + 9] for i in range(9)]
    pair = [similarity.perceptual_hashes(p) for p in (flat[-1], ImageOps.mirror(flat[-1]))]
    hashes, mirrored = zip(*pair, strict=True)
    assert similarity.group_similar(hashes) == []
    assert similarity.group_similar(hashes, mirrored) == [[0, 1]]


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_groups_are_those_of_comparing_all_with_all(distance: int) -> None:
    draws = np.random.default_rng(distance)
    seeds = draws.integers(1, 2**63, 40, np.uint64)
    hashes = [
        int(seeds[draws.integers(40)])
        ^ sum(1 << int(b) for b in set(draws.integers(0, 64, draws.integers(0, 5))))
        for _ in range(300)
    ]
    near = [[(a ^ b).bit_count() <= distance for b in hashes] for a in hashes]
    seen: set[int] = set()
    wanted = []
    for i in range(300):
        group, waiting = set(), [i]
        while waiting:
            j = waiting.pop()
            if j not in group and j not in seen:
                group.add(j)
                waiting += [k for k in range(300) if near[j][k]]
        seen |= group
        if len(group) > 1:
            wanted.append(sorted(group))
    assert similarity.group_similar(hashes, distance=distance) == sorted(wanted) and len(wanted) > 5


def test_a_bucket_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BLOCK", 3)
    hashes = [(1 << 40) + i for i in range(1, 16)]  # all equal in most bands
    assert similarity.group_similar(hashes, distance=4) == [list(range(15))]
