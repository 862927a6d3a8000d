"""Thousands of damaged pictures and metadata files: each is taken by the check and by training, or
refused by both for one reason. A few of each in every run of the tests, all by ``make soak``."""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import damage
import numpy as np
import pytest
from PIL import Image

from limner.config.schema import DataSettings
from limner.data import buckets, geometry, image
from limner.data.folder import Folder
from limner.data.index import check_resized_size, measure_picture
from limner.data.picture_file import Undecodable
from limner.data.source import BadRecord, is_unicode
from limner.errors import InputError

PICTURES, METADATA, PARTS = 30_000, 4_000, 10
GIBIBYTE = 2**20  # in KiB
CONFIG = DataSettings(size=32)
FILTERS = ("lanczos", "box", "nearest")


def judge_picture(content: bytes, number: int) -> str:
    """Return what the check says of a picture, which must be what training does with it."""
    options = {"background": CONFIG.background, "max_pixels": CONFIG.max_pixels}
    cut = geometry.place_crop((32, 32), (32, 32))
    try:
        _, facts = measure_picture(content, CONFIG, {})
        size = facts.height, facts.width
    except Undecodable as error:
        with pytest.raises(Undecodable) as caught:
            image.load_views(content, [(cut, "lanczos")], **options)
        assert str(caught.value) == str(error)
        return "refused"
    try:
        check_resized_size(*size, CONFIG)
    except Undecodable:
        return "too thin"
    cut = geometry.place_crop(size, buckets.choose_shape(size, CONFIG))
    [view] = image.load_views(content, [(cut, FILTERS[number % 3])], **options)
    assert view.shape == (32, 32, 3) and view.dtype == np.uint8
    return "taken"


def judge_metadata(folder: Path, number: int) -> str:
    """Return what becomes of a metadata file."""
    name, content = damage.make_damaged_metadata(number)
    for old in (*folder.glob("metadata.*"), folder / "a.txt"):
        old.unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    try:
        source = Folder(DataSettings(folder=str(folder)), lambda line: None)
    except InputError as error:
        assert str(error)
        return "refused"
    bad = 0
    for i in range(len(source)):
        try:
            record = source[i]
            assert record.captions
            assert all("\0" not in text and is_unicode(text) for text in record.captions)
        except BadRecord as error:
            assert is_unicode(str(error))
            bad += 1
    return "taken" if bad < len(source) else "all bad"


def judge_all(numbers: range, judge: Callable[[int], str]) -> Counter[str]:
    """Judge some numbers, and print what they come to, and the worst time and memory."""
    counts: Counter[str] = Counter()
    worst, worst_number = 0.0, -1
    for number in numbers:
        begin = time.process_time()
        counts[judge(number)] += 1
        taken = time.process_time() - begin
        if taken > worst:
            worst, worst_number = taken, number
    peak = read_peak()
    print(f"{numbers}: {dict(counts)}, worst {worst:.2f} s (number {worst_number}), {peak} KiB")
    # Five seconds for the check, and five for training.
    assert worst < 10, worst_number
    return counts


def read_peak() -> int:
    """The most memory that this process has had, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def judge_pictures(numbers: range) -> Counter[str]:
    good = damage.list_pictures()
    with warnings.catch_warnings():
        # Pillow warns of what is wrong beside the pixels.
        warnings.simplefilter("ignore")
        assert {judge_picture(content, 0) for content in good} == {"taken"}
        return judge_all(numbers, lambda n: judge_picture(damage.make_damaged_picture(n, good), n))


def test_damaged_pictures() -> None:
    counts = judge_pictures(range(0, PICTURES, 53))
    assert counts["taken"] > 50 and counts["refused"] > 200


def test_damaged_metadata(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    counts = judge_all(range(0, METADATA, 11), lambda n: judge_metadata(folder, n))
    assert counts["taken"] > 50 and counts["refused"] > 50


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
def test_all_damaged_pictures(part: int) -> None:
    counts = judge_pictures(range(part, PICTURES, PARTS))
    assert sum(counts.values()) == PICTURES // PARTS and read_peak() < GIBIBYTE


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
def test_all_damaged_metadata(part: int, folder: Path) -> None:
    counts = judge_all(range(part, METADATA, PARTS), lambda n: judge_metadata(folder, n))
    assert sum(counts.values()) == METADATA // PARTS and read_peak() < GIBIBYTE
