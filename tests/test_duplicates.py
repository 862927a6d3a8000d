"""Pictures that look alike are found by a few bits of difference, without comparing all with all,
and flat ones look like nothing."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from limner.data import similarity
from limner.data.similarity import FLAT


def scene(seed: int, size: tuple[int, int] = (180, 240)) -> Image.Image:
    draws = np.random.default_rng(seed)
    small = Image.fromarray(draws.integers(0, 256, (7, 9, 3), np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=60)
    return Image.open(stream)


CHANGES = {
    "as it is": lambda p: p,
    "another format": jpeg,
    "half the size": lambda p: p.resize((120, 90), Image.Resampling.LANCZOS),
    "three times the size": lambda p: p.resize((720, 540), Image.Resampling.BICUBIC),
    "darker": lambda p: ImageEnhance.Brightness(p).enhance(0.8),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_is_found_and_others_are_not(name: str) -> None:
    hashes = [similarity.perceptual_hash(scene(i)) for i in range(30)] + [
        similarity.perceptual_hash(CHANGES[name](scene(i))) for i in range(30)
    ]
    found = similarity.group_similar(hashes)
    assert len(found) >= 29 and all(group == [group[0], group[0] + 30] for group in found)


def test_flat_pictures_are_in_no_group() -> None:
    flat = [
        similarity.perceptual_hash(Image.new("RGB", (90, 70), colour))
        for colour in ("white", "black", "red")
    ]
    assert flat == [FLAT] * 3 and similarity.group_similar(flat) == []


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
    assert similarity.group_similar(hashes, distance) == sorted(wanted) and len(wanted) > 5


def test_a_bucket_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BLOCK", 3)
    hashes = [(1 << 40) + i for i in range(1, 16)]  # all equal in most bands
    assert similarity.group_similar(hashes, 4) == [list(range(15))]
