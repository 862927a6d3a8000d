"""The list of pictures that were decoded before, kept between runs."""

import json
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import PIL

from limner.errors import DiskError, shorten
from limner.json_types import parse_json
from limner.protocols import Report
from limner.storage import atomic

# The version of the list of decoded pictures, and the decoder: when either changes, pictures are
# decoded anew.
_DECODER = f"6, Pillow {PIL.__version__}, simplejpeg {metadata.version('simplejpeg')}"


class PictureFacts(NamedTuple):
    """What is known of a decoded picture; a row in the list of decoded pictures."""

    height: int  # upright
    width: int
    perceptual_hash: int
    mirrored_hash: int | None  # of its mirror image
    further_frames: bool  # whether its file has more frames or pages


# By digest of the content and background: what shows through a picture changes its hashes.
DecodedPictures = dict[str, PictureFacts]


def read_decoded_pictures(cache_file: Path | None, report: Report) -> DecodedPictures:
    """Read the list of decoded pictures.

    A file that is missing or of another decoder is as good as empty; so is a damaged one, and a
    line says so.
    """
    if cache_file is None or not cache_file.exists():
        return {}
    try:
        content = parse_json(cache_file.read_text(encoding="utf-8"))
        pictures = content["pictures"]
        if content["digest"] != atomic.digest_json([_DECODER, pictures]):
            return {}
        return {digest: PictureFacts(*facts) for digest, facts in pictures.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        report(f"{cache_file} is damaged and is ignored ({shorten(reason)}); it is made again")
        return {}


def write_decoded_pictures(cache_file: Path, decoded: DecodedPictures, report: Report) -> None:
    """Write the list of decoded pictures, with those that other runs have added."""
    # What is damaged was said when it was first read.
    pictures = read_decoded_pictures(cache_file, lambda line: None) | decoded
    content = {"digest": atomic.digest_json([_DECODER, pictures]), "pictures": pictures}
    try:
        atomic.write_text(cache_file, json.dumps(content))
    except (DiskError, OSError) as error:
        report(
            f"{cache_file}: cannot be written, so the pictures will be decoded again next time "
            f"({error})"
        )
