"""Pictures that look alike are found by a few bits of difference, without comparing all with all;
faint ones by what is left of them in another size or format, plain ones by their colour."""

import io
import itertools

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


def draw_line(column: int, top: int = 100) -> Image.Image:
    """A sheet that is all but empty."""
    sheet = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(sheet).line((column, top, column, top + 30), fill="black", width=3)
    return sheet


def save(picture: Image.Image, kind: str, quality: int) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, kind, quality=quality)
    return Image.open(stream).convert("RGB")


def draw_faintly(seed: int, paper: tuple[int, int, int], ink: int, width: int) -> Image.Image:
    """Some lines and ellipses, ``ink`` levels darker than the paper."""
    draws = np.random.default_rng(seed)
    sheet = Image.new("RGB", (512, 512), paper)
    pen, color = ImageDraw.Draw(sheet), tuple(level - ink for level in paper)
    for number in range(4):
        left, right = sorted(draws.integers(0, 512, 2).tolist())
        top, bottom = sorted(draws.integers(0, 512, 2).tolist())
        if number % 2:
            pen.ellipse((left, top, right, bottom), outline=color, width=width)
        else:
            pen.line((left, top, right, bottom), fill=color, width=width)
    return sheet


def tint(seed: int) -> Image.Image:
    """A pattern of red and green that are equally bright."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6), np.uint8)
    pattern = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)) / 2.5
    channels = [90 + pattern, 170 - pattern * 0.299 / 0.587, np.full_like(pattern, 90)]
    return Image.fromarray(np.rint(np.stack(channels, -1)).astype(np.uint8))


FAINT = {
    "a light sketch on white": lambda i: draw_faintly(i, (255, 255, 255), 30, 1),
    "pencil that can hardly be seen": lambda i: draw_faintly(i, (255, 255, 255), 8, 3),
    "a drawing on pink": lambda i: draw_faintly(i, (250, 200, 210), 20, 2),
    "on black": lambda i: ImageOps.invert(draw_faintly(i, (255, 255, 255), 25, 2)),
    "a short line": lambda i: draw_line(20 + 80 * (i % 6), 100 + 200 * (i // 6)),
    "colours that are equally bright": tint,
}
BOUND_INKS = range(18, 60, 2)  # some of which are above the bound between faint and ordinary
TWINS = {
    "half the size": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS),
    "three times the size": lambda p: p.resize((p.width * 3, p.height * 3)),
    "JPEG": lambda p: save(p, "JPEG", 90),
    "WebP": lambda p: save(p, "WEBP", 90),
    "AVIF": lambda p: save(p, "AVIF", 85),
}


@pytest.mark.parametrize("kind", FAINT)
def test_faint_pictures_are_alike_in_another_size_or_format_and_others_are_not(kind: str) -> None:
    pictures = [FAINT[kind](i) for i in range(12)]
    assert max(np.asarray(p.convert("L").resize((32, 32))).std() for p in pictures) < 3
    hashes = [similarity.perceptual_hashes(picture) for picture in pictures]
    looks = [look for look, _ in hashes]
    nearest = min((a ^ b).bit_count() for a, b in itertools.combinations(looks, 2))
    assert nearest > similarity.DISTANCE and min(looks) >= 1 << 63
    for change in TWINS.values():
        twins = [similarity.perceptual_hashes(change(picture)) for picture in pictures]
        far = [
            (mine ^ other).bit_count() > similarity.DISTANCE
            for pair, twin in zip(hashes, twins, strict=True)
            for mine, other in zip(pair, twin, strict=True)
        ]
        assert sum(far) <= 3, change  # of 24


PAPERS = {
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "pink": (250, 200, 210),
    "green": (90, 200, 120),
    "blue": (60, 90, 220),
}


@pytest.mark.parametrize("paper", [*PAPERS, "black"])
def test_the_bound_between_faint_and_other_pictures_parts_few_twins(paper: str) -> None:
    """What is a little darker is read as ordinary pictures are, and has much the same hash."""
    parted = 0
    for seed in range(10):
        sheets = [draw_faintly(seed, PAPERS.get(paper, (255,) * 3), ink, 3) for ink in BOUND_INKS]
        if paper == "black":
            sheets = [ImageOps.invert(sheet) for sheet in sheets]
        small = [
            s.convert("L").reduce(8).resize((32, 32), Image.Resampling.LANCZOS) for s in sheets
        ]
        above = int(np.searchsorted([np.asarray(s).std() for s in small], similarity.FLAT))
        assert 0 < above < len(sheets)
        one, other = look(sheets[above - 1]), look(sheets[above])
        parted += (one ^ other).bit_count() > similarity.DISTANCE
    assert parted <= 1


def test_a_faint_drawing_on_papers_of_other_colours_is_not_alike() -> None:
    for seed in range(10):
        looks = [look(draw_faintly(seed, paper, 20, 1)) for paper in PAPERS.values()]
        assert similarity.group_similar(looks) == []
        # A shade that a scanner may give the same paper.
        shades = [tuple(level - 4 for level in paper) for paper in PAPERS.values()]
        again = [look(draw_faintly(seed, shade, 20, 1)) for shade in shades]
        count = len(PAPERS)
        assert similarity.group_similar([*looks, *again]) == [[i, i + count] for i in range(count)]


COLOURS = list(itertools.product((0, 85, 170, 255), repeat=3))


def test_plain_pictures_are_alike_by_colour_in_another_size_or_format() -> None:
    plain = [Image.new("RGB", (90, 70), colour) for colour in COLOURS]
    hashes = [look(picture) for picture in plain]
    assert similarity.group_similar(hashes) == [] and max(hashes) < similarity.PLAIN_END
    for name in ("half the size", "three times the size", "JPEG", "AVIF"):
        twins = [look(TWINS[name](picture)) for picture in plain]
        found = similarity.group_similar([*hashes, *twins])
        assert found == [[i, i + len(plain)] for i in range(len(plain))], name
    # A lossy WebP of a plain colour has traces of a pattern, of any colour the same.
    traces = [look(save(picture, "WEBP", 50)) for picture in plain]
    groups = similarity.group_similar([*hashes, *traces])
    assert all(group[1:] == [group[0] + len(plain)] for group in groups)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ((200, 30, 30), (203, 27, 33), True),
        ((200, 30, 30), (204, 30, 30), False),
        ((255, 255, 255), (252, 252, 252), True),
        ((255, 255, 255), (251, 255, 255), False),
        ((0, 0, 0), (0, 0, 4), False),
        # Fields of the hash that are full, and the next one.
        ((10, 255, 255), (11, 0, 0), False),
        ((10, 10, 255), (10, 11, 0), False),
    ],
)
def test_how_far_plain_colours_may_differ(one: tuple, other: tuple, alike: bool) -> None:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in (one, other, (90, 160, 90))]
    looks = [look(picture) for picture in pictures]
    for order in (looks, looks[::-1], [*looks, 1 << 63, (1 << 63) + 0xFFFFF]):
        groups = similarity.group_similar(order)
        assert [sorted(order[i] for i in group) for group in groups] == [sorted(looks[:2])] * alike


def test_plain_pictures_of_other_proportions_are_not_alike() -> None:
    sizes = [(64, 64), (640, 640), (90, 64), (64, 90), (1, 300), (2, 600), (1, 1)]
    looks = [look(Image.new("RGB", size, "teal")) for size in sizes]
    assert similarity.group_similar(looks) == [[0, 1, 6], [4, 5]]


def test_flat_pictures_of_other_pixels_are_not_alike() -> None:
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
