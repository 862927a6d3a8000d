"""The list of pictures that were decoded before, kept between runs."""

import json
import os
import stat
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import PIL

from limner.errors import DiskError, say_count, shorten
from limner.json_types import parse_json
from limner.protocols import Report
from limner.storage import atomic

# The version of the list of decoded pictures, and the decoder: when either changes, pictures are
# decoded anew.
_DECODER = f"7, Pillow {PIL.__version__}, simplejpeg {metadata.version('simplejpeg')}"


class PictureFacts(NamedTuple):
    """What is known of a decoded picture; a row in the list of decoded pictures."""

    height: int  # upright
    width: int
    perceptual_hash: int
    mirrored_hash: int  # of its mirror image
    further_frames: bool  # whether its file has more frames or pages
    unusable_profile: bool  # whether its profile is ignored


# By digest of the content and background: what shows through a picture changes its hashes.
DecodedPictures = dict[str, PictureFacts]


def read_decoded_pictures(cache_file: Path | None, report: Report) -> DecodedPictures:
    """Read the list of decoded pictures.

    A file that is missing or of another decoder is as good as empty; so is a damaged one, or what
    is no file, and a line says so. Entries that no picture has are left out, and counted.
    """
    if cache_file is None:
        return {}
    try:
        # A pipe or a device could be read for ever.
        if not stat.S_ISREG(cache_file.stat().st_mode):
            report(
                f"{cache_file} is no regular file and is ignored, so pictures are decoded again "
                "each time; remove it"
            )
            return {}
        content = parse_json(cache_file.read_text(encoding="utf-8"))
        pictures = content["pictures"]
        if content["digest"] != atomic.digest_json([_DECODER, pictures]):
            return {}
        good = {name: PictureFacts(*facts) for name, facts in pictures.items() if is_sound(facts)}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        report(f"{cache_file} cannot be read and is ignored ({error.strerror})")
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        report(f"{cache_file} is damaged and is ignored ({shorten(reason)}); it is made again")
        return {}
    if bad := len(pictures) - len(good):
        one = "entry is of no picture: its picture is decoded again"
        several = "entries are of no picture: their pictures are decoded again"
        report(f"{cache_file}: {say_count(bad, one, several)}")
    return good


def is_sound(facts: object) -> bool:
    """Whether a row of the list holds what a decoded picture can have."""
    if not isinstance(facts, list) or len(facts) != len(PictureFacts.__annotations__):
        return False
    numbers, flags = facts[:4], facts[4:]
    # Neither are booleans numbers here, nor 64.0.
    if {type(number) for number in numbers} != {int} or {type(flag) for flag in flags} != {bool}:
        return False
    height, width, *hashes = numbers
    return 0 < height < 2**31 and 0 < width < 2**31 and all(0 <= one < 2**64 for one in hashes)


def write_decoded_pictures(cache_file: Path, decoded: DecodedPictures, report: Report) -> None:
    """Write the list of decoded pictures, with those that other runs have added."""
    if os.path.exists(cache_file) and not os.path.isfile(cache_file):
        return  # which was said when it was first read
    # What is damaged was said then, too.
    pictures = read_decoded_pictures(cache_file, lambda line: None) | decoded
    content = {"digest": atomic.digest_json([_DECODER, pictures]), "pictures": pictures}
    try:
        atomic.write_text(cache_file, json.dumps(content))
    except (DiskError, OSError) as error:
        report(
            f"{cache_file}: cannot be written, so the pictures will be decoded again next time "
            f"({error})"
        )
