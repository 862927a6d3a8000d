"""The index of a data set: every record is read and decoded once, before training.

Bad data is thus refused, by name, before any weight is loaded.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from limner import rng
from limner.config.schema import DataSettings
from limner.data import buckets, geometry, image, similarity
from limner.data.buckets import TooSmall
from limner.data.color import has_unusable_profile
from limner.data.known_pictures import (
    DecodedPictures,
    PictureFacts,
    read_decoded_pictures,
    write_decoded_pictures,
)
from limner.data.picture_file import Undecodable
from limner.data.source import BadRecord, Record, Source
from limner.errors import InputError, join_first, say_count
from limner.json_types import Plain
from limner.progress import open_progress
from limner.protocols import Report
from limner.redaction import redact
from limner.storage import atomic
from limner.storage.run_folder import RunFolder

BadEntry = tuple[str, str]  # key and reason


@dataclass(frozen=True)
class Entry:
    """A good record: its number in the source, and all that training needs but the picture."""

    row: int
    key: str
    captions: tuple[str, ...]
    digest: str  # of the picture's content
    height: int  # upright
    width: int
    perceptual_hash: int = 0
    mirrored_hash: int | None = None  # None where pictures are not mirrored
    further_frames: bool = False
    unusable_profile: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True)
class Index:
    """The good records in the source's order, and those left out."""

    entries: tuple[Entry, ...]
    skipped: tuple[BadEntry, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Digest of pictures and captions in their order, whatever the files are called."""
        return atomic.digest_json([[entry.digest, entry.captions] for entry in self.entries])

    def sample(self, count: int, seed: int) -> "Index":
        """Draw ``count`` records, in the source's order; all of them, if there are no more."""
        if count >= len(self.entries):
            return self
        numbers = np.sort(rng.at(seed, "limit", 0).permutation(len(self.entries))[:count])
        return Index(tuple(self.entries[number] for number in numbers), self.skipped)

    @property
    def without_caption(self) -> list[Entry]:
        """Records of which a caption is empty."""
        return [entry for entry in self.entries if not all(text.strip() for text in entry.captions)]

    @property
    def exact_duplicates(self) -> list[Entry]:
        """Records whose picture has the same content as an earlier one's."""
        digests: set[str] = set()
        duplicates = []
        for entry in self.entries:
            if entry.digest in digests:
                duplicates.append(entry)
            digests.add(entry.digest)
        return duplicates

    @cached_property
    def near_duplicates(self) -> list[list[Entry]]:
        """Groups of records whose pictures look alike, mirrored ones too where the run mirrors
        them, and differ in content."""
        # The first record of each content stands for all of them.
        first_of_content = {entry.digest: entry for entry in reversed(self.entries)}
        distinct = sorted(first_of_content.values(), key=lambda entry: entry.row)
        mirrored = [entry.mirrored_hash for entry in distinct if entry.mirrored_hash is not None]
        groups = similarity.group_similar([entry.perceptual_hash for entry in distinct], mirrored)
        return [[distinct[number] for number in group] for group in groups]

    def group_alike(self) -> list[int]:
        """Return a number for each record; equal for pictures of the same content, or that look
        alike."""
        group_of_digest: dict[str, int] = {}
        for number, group in enumerate(self.near_duplicates):
            group_of_digest |= dict.fromkeys((entry.digest for entry in group), number)
        for entry in self.entries:
            group_of_digest.setdefault(entry.digest, len(self.entries) + entry.row)
        return [group_of_digest[entry.digest] for entry in self.entries]

    @property
    def with_several_captions(self) -> list[Entry]:
        """Records that have more than one caption."""
        return [entry for entry in self.entries if len(entry.captions) > 1]

    @property
    def with_further_frames(self) -> list[Entry]:
        """Records whose picture is the first of several in its file."""
        return [entry for entry in self.entries if entry.further_frames]

    @property
    def with_unusable_profile(self) -> list[Entry]:
        """Records whose picture has a colour profile that is ignored."""
        return [entry for entry in self.entries if entry.unusable_profile]

    def captions(self) -> Iterator[tuple[str, str]]:
        """Yield every caption as (key of its record, caption)."""
        return ((entry.key, text) for entry in self.entries for text in entry.captions)

    def to_plain(self) -> Plain:
        """Return the index as plain values, for JSON from one process to the others."""
        return {"entries": [vars(entry) for entry in self.entries], "skipped": self.skipped}

    @staticmethod
    def from_plain(plain: Plain) -> "Index":
        """Return the index from the values of ``to_plain``."""
        entries = (
            Entry(**(fields | {"captions": tuple(fields["captions"])}))
            for fields in plain["entries"]
        )
        return Index(tuple(entries), tuple((key, reason) for key, reason in plain["skipped"]))


def build_index(
    source: Source,
    config: DataSettings,
    *,
    cache_file: Path | None = None,
    report: Report,
    only_look: bool = False,
) -> Index:
    """Read, hash and decode every record.

    Args:
        cache_file: lists pictures that were decoded before; those are only hashed.
        report: receives one line each when records are left out, have several captions or an empty
            one, or repeat a picture.
        only_look: bad records are listed in the index, whatever ``data.on_bad_record`` says.

    Raises:
        InputError: naming the records that cannot be used (``data.on_bad_record="refuse"``), or
            when none is left.
    """
    image.parse_color(config.background)
    if not len(source):
        raise InputError("the source has no records; give at least one picture with a caption")
    results = inspect_all(source, config, cache_file, report)
    entries = tuple(result for result in results if isinstance(result, Entry))
    skipped = tuple(result for result in results if not isinstance(result, Entry))
    refuse = config.on_bad_record == "refuse"
    if skipped and (not entries or (refuse and not only_look)):
        raise InputError(describe_bad_records(skipped, len(results), bool(entries)))
    index = Index(entries, skipped)
    report_flaws(index, config, report)
    return index


def inspect_all(
    source: Source, config: DataSettings, cache_file: Path | None, report: Report
) -> list[Entry | BadEntry]:
    """Inspect every record in threads, with a progress bar, and update the cache file."""
    decoded = read_decoded_pictures(cache_file, report)
    count_before = len(decoded)

    def inspect(row: int) -> Entry | BadEntry:
        try:
            return inspect_record(source, row, config, decoded)
        except BadRecord as bad:
            return bad.key, bad.reason

    pool = ThreadPoolExecutor(config.threads, thread_name_prefix="limner-index")
    rows = range(len(source))
    try:
        inspected = []
        with open_progress(len(rows), "pictures", "picture") as progress:
            for entry in pool.map(inspect, rows):
                inspected.append(entry)
                progress.update()
        return inspected
    finally:
        # Also after Ctrl-C: what was decoded so far need not be decoded again.
        pool.shutdown(cancel_futures=True)
        if cache_file is not None and len(decoded) > count_before:
            write_decoded_pictures(cache_file, decoded, report)


def report_flaws(index: Index, config: DataSettings, report: Report) -> None:
    """Report records that are left out, have an empty caption or repeat a picture, a line each."""
    total = len(index.entries) + len(index.skipped)
    if index.skipped and config.on_bad_record == "skip":
        reasons = [f"{key}: {reason}" for key, reason in index.skipped]
        said = say_count(len(reasons), f"of {total} records is", f"of {total} records are")
        report(f"{said} left out: {join_first(reasons, 3, '; ')}")
    without_caption = index.without_caption if config.caption is not None else []
    near_duplicates = [entry for group in index.near_duplicates for entry in group[1:]]
    several = "several captions, one of which is drawn each time"
    further = "further frames or pages, of which none but the first is used"
    profile = "a colour profile that cannot be used, and sRGB is assumed instead"
    for one, many, flaw, entries in (
        ("has", "have", several, index.with_several_captions),
        ("has", "have", further, index.with_further_frames),
        ("has", "have", profile, index.with_unusable_profile),
        ("has", "have", "an empty caption", without_caption),
        ("repeats", "repeat", "the picture of an earlier one", index.exact_duplicates),
        ("looks", "look", "like an earlier one", near_duplicates),
    ):
        if entries:
            keys = join_first([entry.key for entry in entries], 3, "; ")
            said = say_count(
                len(entries), f"of {total} records {one}", f"of {total} records {many}"
            )
            report(f"{said} {flaw}: {keys}")


def describe_bad_records(bad: tuple[BadEntry, ...], total: int, some_are_good: bool) -> str:
    """Return the error message that lists bad records."""
    lines = [f"{len(bad)} of {total} records cannot be used:"]
    lines += [f"  {key}: {reason}" for key, reason in bad[:10]]
    if len(bad) > 10:
        lines.append(f"  and {len(bad) - 10} more")
    if some_are_good:
        lines.append('Mend or remove them, or set data.on_bad_record="skip" to go on without them.')
    else:
        lines.append("None is left to train on.")
    return "\n".join(lines)


def inspect_record(
    source: Source, row: int, config: DataSettings, decoded: DecodedPictures
) -> Entry:
    """Read, hash and decode one record.

    Raises:
        BadRecord: when it cannot be used.
    """
    record = source[row]
    if not isinstance(record, Record):
        raise InputError(
            f"record {row} of the source is {type(record).__name__}; limner.Record(key, image, "
            "captions) is expected"
        )
    try:
        digest, facts = measure_picture(record.image, config, decoded)
        check_resized_size(facts.height, facts.width, config)
    except (Undecodable, TooSmall) as error:
        raise BadRecord(record.key, str(error)) from error
    except MemoryError as error:
        raise InputError(explain_want_of_memory(record.key)) from error
    entry = Entry(row, record.key, record.captions, digest, *facts)
    return entry if config.flip else replace(entry, mirrored_hash=None)


def explain_want_of_memory(key: str) -> str:
    """Return the message for a picture that does not fit into what memory there is."""
    return (
        f"{key}: not enough memory to unpack this picture. Make memory free, set data.threads "
        "lower, or make the picture smaller"
    )


def check_resized_size(height: int, width: int, config: DataSettings) -> None:
    """Refuse a picture too small for its bucket, or so thin that resizing makes it huge."""
    shape = buckets.choose_shape((height, width), config)
    resized_height, resized_width = geometry.covering_size((height, width), shape)
    pixels, limit = resized_height * resized_width, config.max_pixels
    if pixels > height * width or config.resample not in image.KERNELS:
        limit = min(limit, image.RESIZED_BY_PIL)
        if height * width > image.LARGE:
            limit = min(limit, image.LARGE // 4)
    if pixels <= limit or pixels == height * width:
        return
    if config.buckets is None:
        condition = f"data.size = {config.size}"
    else:
        condition = f"its bucket of {shape[1]}x{shape[0]} is covered"
    raise Undecodable(
        f"{width}x{height} pixels are too long and thin: {resized_width}x{resized_height} once the "
        f"shorter side is {condition}"
    )


def measure_picture(
    picture: image.Picture, config: DataSettings, decoded: DecodedPictures
) -> tuple[str, PictureFacts]:
    """Return the digest of a picture's content, and its facts, which are added to ``decoded``."""
    if not isinstance(picture, Path | bytes):
        pixels = decode(picture, config)
        bad_profile = isinstance(picture, Image.Image) and has_unusable_profile(picture)
        # The size is width first, as it has been in digests from the first.
        content = f"{pixels.shape[1::-1]}".encode() + pixels.tobytes()
        return xxhash.xxh3_128(content).hexdigest(), read_facts(pixels, False, bad_profile)
    # The bytes of a file decode alike each time on one background.
    digest = digest_file_content(picture)
    name = f"{digest} {config.background}"
    facts = decoded.get(name)
    # A picture that is larger than this recipe allows is refused by decoding it again.
    if facts is None or not 0 < facts.height * facts.width <= config.max_pixels:
        facts = read_facts(decode(picture, config), *image.find_unused(picture))
        decoded[name] = facts
    return digest, facts


def decode(picture: image.Picture, config: DataSettings) -> np.ndarray:
    """Decode a picture by a recipe's settings, as training does."""
    return image.decode(picture, background=config.background, max_pixels=config.max_pixels)


def read_facts(pixels: np.ndarray, further_frames: bool, unusable_profile: bool) -> PictureFacts:
    """Return the facts of a decoded picture, uint8 [H, W, 3]."""
    height, width, _ = pixels.shape
    hashes = similarity.perceptual_hashes(pixels)
    return PictureFacts(height, width, *hashes, further_frames, unusable_profile)


def digest_file_content(picture: Path | bytes) -> str:
    """Return the digest of a picture's file.

    Raises:
        Undecodable: when it cannot be read.
    """
    if isinstance(picture, bytes):
        return xxhash.xxh3_128(picture).hexdigest()
    try:
        if not picture.is_file():
            raise Undecodable("not a regular file" if picture.exists() else "no such file")
        return atomic.digest_file(picture)
    except OSError as error:
        raise Undecodable(f"cannot be read: {error.strerror or error}") from error


def write_skipped(run: Path, skipped: Iterable[BadEntry]) -> None:
    """Write path and reason of each record left out to ``skipped.jsonl`` in the run's folder.

    If there is none, there is no file.
    """
    path = RunFolder(run).skipped
    lines = [json.dumps(redact({"path": key, "reason": reason})) + "\n" for key, reason in skipped]
    if lines:
        atomic.write_text(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)
