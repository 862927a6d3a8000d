"""Every record is read and decoded once before training: what is wrong with the data is known, by
name, before any weight is loaded."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import xxhash
from tqdm import tqdm

from limner import rng
from limner.config.schema import DataSettings
from limner.data import buckets, geometry, image, similarity
from limner.data.buckets import TooSmall
from limner.data.image import Undecodable
from limner.data.similarity import FLAT
from limner.data.source import BadRecord, Record, Source
from limner.errors import DiskError, InputError
from limner.protocols import Report
from limner.storage import atomic
from limner.storage.run_folder import SKIPPED_FILE

Known = dict[str, tuple[int, int, int]]  # by content: height, width, perceptual hash
_DECODER = f"2, Pillow {PIL.__version__}"  # pictures are decoded anew when either changes


@dataclass(frozen=True)
class Entry:
    """One good record: its number in the source, and all that training needs to know before it
    reads the picture again."""

    row: int
    key: str
    captions: tuple[str, ...]
    digest: str  # of the picture's content
    height: int  # upright
    width: int
    perceptual_hash: int = FLAT  # perceptual hash

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True)
class Index:
    """The good records in the source's order, and (key, reason) of those that were left out."""

    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @cached_property
    def digest(self) -> str:
        """Of pictures and captions in their order, whatever the files are called."""
        return atomic.digest_json([[entry.digest, entry.captions] for entry in self.entries])

    def sample(self, count: int, seed: int) -> "Index":
        """A random choice of ``count`` records, in the source's order; all, where there are no
        more."""
        if count >= len(self.entries):
            return self
        chosen = np.sort(rng.at(seed, "limit", 0).permutation(len(self.entries))[:count])
        return Index(tuple(self.entries[i] for i in chosen), self.skipped)

    @property
    def without_caption(self) -> list[Entry]:
        """Records of which a caption is empty."""
        return [entry for entry in self.entries if not all(text.strip() for text in entry.captions)]

    @property
    def exact_duplicates(self) -> list[Entry]:
        """Records whose picture has the same content as an earlier one's."""
        first: dict[str, int] = {}
        return [
            entry
            for entry in self.entries
            if first.setdefault(entry.digest, entry.row) != entry.row
        ]

    @cached_property
    def near_duplicates(self) -> list[list[Entry]]:
        """Groups of records whose pictures look alike and are not of the same content."""
        first = {entry.digest: entry for entry in reversed(self.entries)}
        distinct = sorted(first.values(), key=lambda entry: entry.row)
        return [
            [distinct[i] for i in group]
            for group in similarity.group_similar([entry.perceptual_hash for entry in distinct])
        ]

    def captions(self) -> Iterator[tuple[str, str]]:
        """Every caption with the key of its record."""
        return ((entry.key, text) for entry in self.entries for text in entry.captions)

    def to_plain(self) -> dict[str, Any]:
        """For JSON: how one process tells the others."""
        return {
            "entries": [list(vars(entry).values()) for entry in self.entries],
            "skipped": [list(pair) for pair in self.skipped],
        }

    @staticmethod
    def from_plain(raw: dict[str, Any]) -> "Index":
        """The inverse of ``to_plain``."""
        entries = (
            Entry(row, key, tuple(captions), *rest) for row, key, captions, *rest in raw["entries"]
        )
        return Index(tuple(entries), tuple((key, reason) for key, reason in raw["skipped"]))


def build_index(
    source: Source, config: DataSettings, *, known: Path | None = None, report: Report
) -> Index:
    """Read, hash and decode every record.

    Args:
        known: a file that remembers the content of pictures that were decoded before; those are
            only hashed.
        report: receives one line each when records are left out, have an empty caption, or repeat a
            picture.

    Raises:
        InputError: naming the records that cannot be used (``data.on_bad_record="refuse"``), or
            when none is left.
    """
    image.parse_color(config.background)
    if not len(source):
        raise InputError("the source has no records; give at least one picture with a caption")
    sizes = _recall(known)
    before = len(sizes)

    def one(row: int) -> Entry | tuple[str, str]:
        try:
            return _examine(source, row, config, sizes)
        except BadRecord as bad:
            return bad.key, bad.reason

    pool = ThreadPoolExecutor(config.threads, thread_name_prefix="limner-look")
    try:
        results = list(
            tqdm(
                pool.map(one, range(len(source))),
                total=len(source),
                desc="pictures",
                unit="",
                disable=None,
                leave=False,
            )
        )
    finally:
        pool.shutdown(cancel_futures=True)
        if known is not None and len(sizes) > before:
            _remember(known, sizes, report)
    skipped = tuple(result for result in results if not isinstance(result, Entry))
    entries = tuple(result for result in results if isinstance(result, Entry))
    if skipped and (config.on_bad_record == "refuse" or not entries):
        raise InputError(_complaint(skipped, len(results), bool(entries)))
    if skipped:
        report(
            f"{len(skipped)} of {len(results)} records are left out: "
            f"{_some([f'{key}: {reason}' for key, reason in skipped])}"
        )
    index = Index(entries, skipped)
    twins = [entry for group in index.near_duplicates for entry in group[1:]]
    attention = (
        ("have an empty caption", index.without_caption if config.caption is not None else []),
        ("repeat the picture of an earlier one", index.exact_duplicates),
        ("look like an earlier one", twins),
    )
    for what, which in attention:
        if which:
            report(
                f"{len(which)} of {len(results)} records {what}: "
                f"{_some([entry.key for entry in which])}"
            )
    return index


def _some(names: list[str]) -> str:
    return "; ".join([*names[:3], *["..."] * (len(names) > 3)])


def _complaint(bad: tuple[tuple[str, str], ...], total: int, some_left: bool) -> str:
    lines = [
        f"{len(bad)} of {total} records cannot be used:",
        *(f"  {key}: {reason}" for key, reason in bad[:10]),
    ]
    lines += [f"  and {len(bad) - 10} more"] if len(bad) > 10 else []
    lines += [
        'Mend or remove them, or set data.on_bad_record="skip" to go on without them.'
        if some_left
        else "None is left to train on."
    ]
    return "\n".join(lines)


def _examine(source: Source, row: int, config: DataSettings, sizes: Known) -> Entry:
    record = source[row]
    if not isinstance(record, Record):
        raise InputError(
            f"record {row} of the source is {type(record).__name__}; limner.Record(key, image, "
            "captions) is expected"
        )
    try:
        digest, (height, width, look) = _measure(record.image, config, sizes)
        shape = buckets.choose_shape((height, width), config)
        tall, wide = geometry.covering_size((height, width), shape)
        if tall * wide > config.max_pixels:
            cover = (
                f"data.size = {config.size}"
                if config.buckets is None
                else f"its bucket of {shape[1]}x{shape[0]} is covered"
            )
            raise Undecodable(
                f"{width}x{height} pixels are too long and thin: {wide}x{tall} once the shorter "
                f"side is {cover}"
            )
    except (Undecodable, TooSmall) as error:
        raise BadRecord(record.key, str(error)) from error
    return Entry(row, record.key, record.captions, digest, height, width, look)


def _measure(
    picture: image.Picture, config: DataSettings, sizes: Known
) -> tuple[str, tuple[int, int, int]]:
    """Digest, and height, width and look: of a file's bytes, which decode alike each time; of the
    decoded pixels, where there is no file."""
    if isinstance(picture, Path | bytes):
        digest = _digest(picture)
        known = sizes.get(digest)
        if known is None or not 0 < known[0] * known[1] <= config.max_pixels:
            decoded = image.decode(
                picture, background=config.background, max_pixels=config.max_pixels
            )
            known = sizes[digest] = (
                decoded.height,
                decoded.width,
                similarity.perceptual_hash(decoded),
            )
        return digest, known
    decoded = image.decode(picture, background=config.background, max_pixels=config.max_pixels)
    digest = xxhash.xxh3_128(f"{decoded.size}".encode() + decoded.tobytes()).hexdigest()
    return digest, (decoded.height, decoded.width, similarity.perceptual_hash(decoded))


def _digest(picture: Path | bytes) -> str:
    if isinstance(picture, bytes):
        return xxhash.xxh3_128(picture).hexdigest()
    if not picture.is_file():
        raise Undecodable("not a regular file" if picture.exists() else "no such file")
    try:
        return atomic.digest_file(picture)
    except OSError as error:
        raise Undecodable(f"cannot be read: {error.strerror or error}") from error


def _recall(known: Path | None) -> Known:
    """Sizes and looks by digest; a file that is missing, damaged or of another decoder is as good
    as empty."""
    try:
        raw = json.loads(known.read_text(encoding="utf-8")) if known is not None else {}
        if raw["digest"] != atomic.digest_json([_DECODER, raw["pictures"]]):
            return {}
        return {
            digest: (height, width, look)
            for digest, (height, width, look) in raw["pictures"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(known: Path, sizes: Known, report: Report) -> None:
    pictures = _recall(known) | sizes
    try:
        atomic.write_text(
            known,
            json.dumps({"digest": atomic.digest_json([_DECODER, pictures]), "pictures": pictures}),
        )
    except (DiskError, OSError) as error:
        report(
            f"{known}: cannot be written, so the pictures will be decoded again next time ({error})"
        )


def write_skipped(run: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """``skipped.jsonl`` in the run's folder: path and reason of each record that was left out; no
    file, where there is none."""
    lines = [json.dumps({"path": key, "reason": reason}) + "\n" for key, reason in skipped]
    if lines:
        atomic.write_text(run / SKIPPED_FILE, "".join(lines))
    else:
        (run / SKIPPED_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class Overlong:
    """A caption that the text encoder would see cut."""

    key: str
    caption: str
    tokens: int


def caption_report(
    captions: Iterable[tuple[str, str]],
    tokenizer_lengths: Callable[[list[str]], list[int]],
    max_tokens: int,
) -> list[Overlong]:
    """The captions of more than ``max_tokens`` tokens; each distinct text is counted once by the
    tokenizer.

    Args:
        captions: (key of the record, caption), as ``Index.captions`` gives them.
        tokenizer_lengths: number of tokens of each text, start and end tokens included.
    """
    pairs = list(captions)
    texts = list(dict.fromkeys(text for _, text in pairs))
    lengths: dict[str, int] = {}
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        lengths |= zip(part, tokenizer_lengths(part), strict=True)
    return [Overlong(key, text, lengths[text]) for key, text in pairs if lengths[text] > max_tokens]
