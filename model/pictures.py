"""Rebuilds the folder of captioned pictures that the bundled model is trained on from a clone of
Google's Noto Emoji.

    git clone https://github.com/googlefonts/noto-emoji
    pip install emoji==2.16.0
    python model/pictures.py noto-emoji PICTURES

The pictures are the files of ``png/128`` at one pinned commit, byte for byte, without skin-tone
variants (country flags are kept elsewhere). The captions are ``an emoji of NAME`` with Unicode's
English short names, as the package ``emoji`` lists them. A digest of its file name decides which
pictures (15 %) are left out, so that there are pictures of the same kind which no model made from
this folder has seen.
"""

import argparse
import hashlib
import json
import subprocess
from pathlib import Path

import emoji

from limner.storage import atomic
from limner.storage.atomic import MANIFEST

COMMIT = "b3e3051a088047d19fd4d49b1c3ac42fb8c3aaf8"
SKIN_TONES = {f"{0x1F3FB + i:x}" for i in range(5)}
LEFT_OUT = 38  # of 256


def names() -> dict[str, str]:
    """English short names by the file name of Noto Emoji, which leaves the variation selector fe0f
    out."""
    return {
        "emoji_u" + "_".join(f"{ord(c):04x}" for c in symbol if c != "\ufe0f") + ".png": entry["en"]
        .strip(":")
        .replace("_", " ")
        for symbol, entry in emoji.EMOJI_DATA.items()
    }


def wanted(file: str) -> bool:
    """Whether a file is neither a skin-tone variant nor left out by its digest."""
    stem = file.removesuffix(".png")
    return (
        not SKIN_TONES & set(stem.removeprefix("emoji_u").split("_"))
        and hashlib.sha256(stem.encode()).digest()[0] >= LEFT_OUT
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path)
    parser.add_argument("pictures", type=Path)
    a = parser.parse_args()
    git = ["git", "-C", str(a.clone)]
    files = subprocess.run(
        [*git, "ls-tree", "--name-only", f"{COMMIT}:png/128"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    known = names()
    chosen = [file for file in sorted(files) if file in known and wanted(file)]
    with atomic.write_folder(a.pictures) as path:
        for file in chosen:
            (path / file).write_bytes(
                subprocess.run(
                    [*git, "cat-file", "blob", f"{COMMIT}:png/128/{file}"],
                    check=True,
                    capture_output=True,
                ).stdout
            )
        lines = [
            json.dumps(
                {"file_name": file, "text": f"an emoji of {known[file]}"}, ensure_ascii=False
            )
            + "\n"
            for file in chosen
        ]
        (path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (a.pictures / MANIFEST).unlink()
    print(f"{len(chosen)} pictures")


if __name__ == "__main__":
    main()
