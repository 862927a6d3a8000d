"""Make the fourteen tiny runs at two commits on this machine, and compare all that they leave.

    python tests/golden/compare_commits.py OLD [NEW] [--runs NAME ...] [--keep FOLDER]

NEW is the working tree if it is left out. Both train and draw a picture by the ``limner`` command,
on the same models and pictures, with the Python that runs this script. Arrays, headers, losses and
pixels must be equal to the bit; JSON, TOML and model cards after ``RENAMED_SETTINGS`` and
``RENAMED_WORDS`` have been applied to both sides. The exit code is 1 if anything differs.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden import runs

# Settings that have another name at another commit: old to new; a name that ends in a dot stands
# for a whole section. Each tree is asked which of the two it knows, so that the definitions in
# runs.py may have either.
RENAMED_SETTINGS = {
    "train.batch": "train.batch_size",
    "train.micro": "train.micro_batch_size",
    "train.accumulate": "train.accumulation_steps",
    "watch.": "validation.",
    "adapt.": "adapter.",
    "data.bad": "data.on_bad_record",
    "data.crops": "data.crop_variants",
    "data.chunks": "data.caption_chunks",
    "data.limit": "data.max_records",
    "checkpoint.allow": "checkpoint.allow_changes",
    "model.partner": "model.other_stage",
}

# Other words that have changed: names of files, keys of JSON, words of model cards; old to new.
RENAMED_WORDS: dict[str, str] = {}

# Keys at the top of a JSON file that have changed, by file; old to new.
RENAMED_KEYS = {
    "state.json": {
        "base": "base_digest",
        "batch": "batch_size",
        "data": "data_digest",
        "draws": "random_digest",
        "numpy": "numpy_version",
        "world": "world_size",
    }
}

# What may differ, and why. Nothing else is passed over.
IGNORED_FILES = {
    ".lock": "names the process that wrote there",
    "status.json": "names the process, the host and the time",
}
IGNORED_VALUES = {
    ("metrics.jsonl", "images_per_second"): "the speed of the machine",
    ("state.json", "version"): "what a run of another build is refused by",
    ("MANIFEST.json", "files.state.json.size"): "state.json is compared, after renaming",
    ("MANIFEST.json", "files.state.json.xxh3_128"): "state.json is compared, after renaming",
    ("MANIFEST.json", "digest"): "of the manifest, with the two values above",
}

REPOSITORY = Path(__file__).parents[2]
REFUSALS = ("no such setting", "renamed to")  # what limner says of a name that it does not know
SHOWN = 8  # differences of a run that are printed
AT_ONCE = 2  # processes
SAME_FOR_BOTH = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Tree:
    """The code of one commit, and the folder in which its runs are made."""

    label: str
    source: Path  # what PYTHONPATH names
    work: Path
    compiled: Path  # JAX's programs, which it finds by what they compute: both trees share them

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run Python with this tree's package, in the tree's work folder."""
        own = {"PYTHONPATH": str(self.source), "JAX_COMPILATION_CACHE_DIR": str(self.compiled)}
        own |= {"LIMNER_CACHE": str(self.work / "cache"), "HF_HOME": str(self.work / "hub")}
        how: dict[str, Any] = {"cwd": self.work, "env": os.environ | own, "check": False}
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, **how)


def main() -> int:
    """Make all runs in both trees, compare them, and return the exit code."""
    chosen = read_arguments()
    os.environ |= SAME_FOR_BOTH
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # trees are removed then, too
    with contextlib.ExitStack() as held:
        place = chosen.keep or held.enter_context(tempfile.TemporaryDirectory(prefix="limner-"))
        place = Path(place).resolve()
        inputs = runs.make_inputs(place / "inputs")
        trees = []
        for side, commit in (("old", chosen.old), ("new", chosen.new)):
            root = held.enter_context(check_out(commit, place / f"{side}-tree"))
            tree = Tree(commit or "working tree", root / "src", place / side, place / "compiled")
            tree.work.mkdir(parents=True)
            make_sure_of_package(tree)
            trees.append(tree)
        spellings = [choose_names(tree, chosen.runs) for tree in trees]
        pool = ThreadPoolExecutor(AT_ONCE)
        held.callback(pool.shutdown, cancel_futures=True)
        jobs = [
            [pool.submit(make_run, tree, name, inputs, known) for name in chosen.runs]
            for tree, known in zip(trees, spellings, strict=True)
        ]
        pairs = zip(chosen.runs, *jobs, strict=True)
        results = [report(name, *trees, *pair) for name, *pair in pairs]
    return 0 if all(results) else 1


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="another one (default: the working tree)")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=list(runs.RUNS),
        choices=list(runs.RUNS),
        help="a commit from before a family has none of it",
    )
    parser.add_argument("--keep", metavar="FOLDER", help="a new folder that keeps all that is made")
    return parser.parse_args()


@contextlib.contextmanager
def check_out(commit: str | None, place: Path) -> Iterator[Path]:
    """Yield a folder with the files of a commit, which is removed again, or the working tree."""
    if commit is None:
        yield REPOSITORY
        return
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def make_sure_of_package(tree: Tree) -> None:
    """Refuse to go on where Python finds another package than the tree's."""
    found = tree.call("-c", "import limner; print(limner.__file__)").stdout.strip()
    if not Path(found).is_relative_to(tree.source):
        raise SystemExit(f"{tree.label}: limner is imported from {found or 'nowhere'}")


def choose_names(tree: Tree, names: list[str]) -> dict[str, str]:
    """Find out how a tree calls the renamed settings that the definitions of some runs use.

    Returns:
        The tree's name of each setting that it has under another one.
    """
    (tree.work / "empty.toml").touch()
    back = {new: old for old, new in RENAMED_SETTINGS.items()}
    used = {setting for name in names for setting in runs.settings_of(name, Path(), "run")}
    chosen = {}
    for setting in sorted(used):
        others = {rename(setting, RENAMED_SETTINGS), rename(setting, back)} - {setting}
        if others and not knows(tree, setting):
            (chosen[setting],) = others
    return chosen


def knows(tree: Tree, setting: str) -> bool:
    """Ask a tree whether it has a setting of that name."""
    said = tree.call("-m", "limner", "show", "empty.toml", f"{setting}=none")
    return not any(refusal in said.stderr for refusal in REFUSALS)


def make_run(tree: Tree, name: str, inputs: Path, spelling: dict[str, str]) -> str:
    """Train as a run says and draw one picture with its result; return why that failed, or ""."""
    settings = runs.settings_of(name, inputs, f"runs/{name}")
    spelled = {spelling.get(setting, setting): value for setting, value in settings.items()}
    recipe = runs.write_recipe(spelled, tree.work / f"{name}.toml")
    draw = ["generate", f"runs/{name}", runs.PROMPT, "--seed", "5", "--steps", "2", "--size"]
    draw += [str(runs.SIZE), "--engine", settings.get("engine.kind", "torch")]
    draw += ["--output", f"pictures/{name}"]
    began = time.monotonic()
    for words in (["train", str(recipe)], draw):
        done = tree.call("-m", "limner", *words)
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-10:])
            return f"limner {words[0]} ended with code {done.returncode} at {tree.label}:\n{last}"
    took = time.monotonic() - began
    print(f"made {name} at {tree.label} in {took:.0f} s", file=sys.stderr, flush=True)
    return ""


def report(name: str, old: Tree, new: Tree, *jobs: Any) -> bool:
    """Print what differs in one run, or that nothing does; return whether nothing does."""
    found = [failure for job in jobs if (failure := job.result())]
    count = 0
    for kind in ("runs", "pictures") if not found else ():
        compared, different = compare_folders(old.work / kind / name, new.work / kind / name)
        found += different
        count += compared
    if not found:
        print(f"{name}: equal, {count} files", flush=True)
        return True
    print(f"{name}: {len(found)} differences between {old.label} and {new.label}")
    print("".join(f"  {line}\n" for line in found[:SHOWN]), end="", flush=True)
    return False


def compare_folders(old: Path, new: Path) -> tuple[int, list[str]]:
    """Compare all files of two folders; return how many there are, and what differs."""
    sides = [list_files(folder) for folder in (old, new)]
    found = [f"{name}: only at one commit" for name in sorted(sides[0].keys() ^ sides[1].keys())]
    both = sorted(sides[0].keys() & sides[1].keys())
    for name in both:
        compare = COMPARED.get(sides[0][name].suffix, compare_bytes)
        found += [f"{name}: {text}" for text in compare(sides[0][name], sides[1][name])]
    return len(both), found


def list_files(folder: Path) -> dict[str, Path]:
    """List the files below a folder by their renamed paths."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        apply_renames(path.relative_to(folder).as_posix()): path
        for path in files
        if path.name not in IGNORED_FILES
    }


def compare_arrays(old: Path, new: Path) -> list[str]:
    """Compare the headers of two safetensors files, metadata included, and each array."""
    headers, contents = zip(*map(read_safetensors, (old, new)), strict=True)
    found = compare_values(*map(flatten, headers))
    if not found and list(headers[0]) != list(headers[1]):
        found.append("the arrays are in another order")
    for name in sorted(headers[0].keys() & headers[1].keys() - {"__metadata__"}):
        one, two = (
            content[slice(*header[name]["data_offsets"])]
            for header, content in zip(headers, contents, strict=True)
        )
        if one != two:
            found.append(f"{name}: {describe(one, two, headers[0][name]['dtype'])}")
    return found


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Read the header and the bytes of all arrays of a safetensors file."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def describe(one: bytes, two: bytes, dtype: str) -> str:
    """Tell how far two arrays are apart."""
    if dtype != "F32" or len(one) != len(two):
        return "the bytes differ"
    arrays = [np.frombuffer(part, np.float32) for part in (one, two)]
    count = int((arrays[0].view(np.uint32) != arrays[1].view(np.uint32)).sum())
    return f"{count} of {arrays[0].size} differ, by {np.abs(arrays[0] - arrays[1]).max():.2g}"


def compare_json(old: Path, new: Path) -> list[str]:
    """Compare two JSON files, renamed."""
    sides = [flatten(read_json(path)) for path in (old, new)]
    return compare_values(*(take_away_ignored(side, old.name) for side in sides))


def read_json(path: Path) -> Any:
    """Read a JSON file, the keys at its top renamed."""
    value, names = json.loads(path.read_text(encoding="utf-8")), RENAMED_KEYS.get(path.name)
    return value if names is None else {names.get(key, key): one for key, one in value.items()}


def compare_json_lines(old: Path, new: Path) -> list[str]:
    """Compare two files with a JSON value in each line, renamed."""
    sides = [flatten(list(map(json.loads, path.read_text().splitlines()))) for path in (old, new)]
    return compare_values(*(take_away_ignored(side, old.name) for side in sides))


def compare_toml(old: Path, new: Path) -> list[str]:
    """Compare two TOML files, renamed."""
    return compare_values(*(flatten(tomllib.loads(path.read_text())) for path in (old, new)))


def compare_text(old: Path, new: Path) -> list[str]:
    """Compare two texts line by line, renamed."""
    sides = [apply_renames(path.read_text(encoding="utf-8")).split("\n") for path in (old, new)]
    changes = list(difflib.unified_diff(*sides, n=0, lineterm=""))[2:]
    return [line for line in changes if not line.startswith("@@")]


def compare_pictures(old: Path, new: Path) -> list[str]:
    """Compare the pixels of two pictures, and the texts in their files."""
    found = []
    with Image.open(old) as one, Image.open(new) as two:
        if one.info != two.info:
            found.append(f"{one.info} became {two.info}")
        if (one.mode, one.size) != (two.mode, two.size):
            return [*found, f"{one.mode} of {one.size} became {two.mode} of {two.size}"]
        apart = np.abs(np.asarray(one).astype(int) - np.asarray(two))
    if apart.any():
        found.append(f"{(apart > 0).sum()} of {apart.size} values differ, by up to {apart.max()}")
    return found


def compare_bytes(old: Path, new: Path) -> list[str]:
    """Compare two files of any other kind."""
    return [] if old.read_bytes() == new.read_bytes() else ["the bytes differ"]


COMPARED: dict[str, Callable[[Path, Path], list[str]]] = {
    ".safetensors": compare_arrays,
    ".json": compare_json,
    ".jsonl": compare_json_lines,
    ".toml": compare_toml,
    ".md": compare_text,
    ".png": compare_pictures,
}


def flatten(value: Any, where: str = "") -> dict[str, Any]:
    """Turn nested plain data into single values by their renamed, dotted paths."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        out: dict[str, Any] = {}
        for key, one in pairs:
            out |= flatten(one, f"{where}.{key}" if where else str(key))
        return out
    return {apply_renames(where): apply_renames(value) if isinstance(value, str) else value}


def take_away_ignored(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Leave out the values of a file that may differ."""
    ignored = [name for known, name in IGNORED_VALUES if known == file]
    return {
        path: value
        for path, value in values.items()
        if not any(path == name or path.endswith(f".{name}") for name in ignored)
    }


def compare_values(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name the values that differ; floats are equal where their bits are, as JSON has them."""
    found = [f"{name}: only at the old commit" for name in old.keys() - new.keys()]
    found += [f"{name}: only at the new commit" for name in new.keys() - old.keys()]
    both = sorted(old.keys() & new.keys())
    pairs = ((name, json.dumps(old[name]), json.dumps(new[name])) for name in both)
    return sorted(found) + [f"{name}: {one} became {two}" for name, one, two in pairs if one != two]


def apply_renames(text: str) -> str:
    """Give settings and other words their new names; what has them already stays as it is."""
    return rename(rename(text, RENAMED_SETTINGS), RENAMED_WORDS)


def rename(text: str, table: dict[str, str]) -> str:
    """Replace whole names in a text, as they are and as Markdown escapes them; sections last."""
    for old in sorted(table, key=lambda name: name.endswith(".")):
        end = "" if old.endswith(".") else r"(?![\w\\])"
        for one, other in ((old, table[old]), (escape(old), escape(table[old]))):
            text = re.sub(rf"(?<!\w){re.escape(one)}{end}", other.replace("\\", r"\\"), text)
    return text


def escape(name: str) -> str:
    """Write a name as model cards have it."""
    return re.sub(r"([._])", r"\\\1", name)


if __name__ == "__main__":
    raise SystemExit(main())
