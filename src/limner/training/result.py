"""Write the result of a run: a diffusers folder or a LoRA file."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np

from limner.base_model.base import INDEX, BaseModel
from limner.base_model.configs import list_components
from limner.base_model.weight_files import STEMS, WEIGHTS_NAME, get_stem, has_weights, list_files
from limner.config import toml
from limner.config.schema import AdapterSettings, Config
from limner.diffusion.result_scheduler import adapt_scheduler
from limner.engines.adapters import get_alpha
from limner.errors import IntegrityError
from limner.families.family import Family
from limner.json_types import parse_json, read_object
from limner.redaction import redact, redact_text
from limner.storage import atomic, layout, safetensors
from limner.storage.checkpoint import Checkpoint
from limner.storage.layout import LORA_FILE, WEIGHTS_FILE
from limner.storage.run_folder import RESULT_FILE, RunFolder
from limner.training.model_card import write_model_card


class FileRecord(TypedDict):
    """Size and digest of one file of a result."""

    size: int
    xxh3_128: str


class ResultRecord(TypedDict):
    """What ``result.json`` holds."""

    step: int
    kind: str  # full or lora
    files: dict[str, FileRecord]  # by path below the run's folder
    digest: str  # of the three above


def write_result(
    checkpoint: Checkpoint,
    config: Config,
    base: BaseModel,
    family: Family,
    prediction_type: str | None,
) -> None:
    """Write a run's result from its last checkpoint, and the model card.

    The moving average is the result where there is one. A result that is already whole stays.
    """
    run = Path(config.run)
    if not is_result_whole(run, checkpoint.step):
        read_arrays = layout.array_reader(checkpoint, config.adapter, family)
        arrays = read_arrays(layout.result_group(checkpoint, config.adapter, family))
        if config.adapter.kind == "lora":
            write_lora(base, family, run, arrays, config.adapter, checkpoint.step)
        else:
            write_full(base, family, run, arrays, prediction_type, checkpoint.step)
    card = write_model_card(
        toml.to_saved(config),
        base,
        family,
        checkpoint.step,
        prompts=redact(config.preview.prompts),
        repo=config.export.hub,
        grid=RunFolder(run).grid.is_file(),
    )
    atomic.write_text(RunFolder(run).card, redact_text(card, environment=False))


def write_full(
    base: BaseModel,
    family: Family,
    run: Path,
    arrays: Mapping[str, np.ndarray],
    prediction_type: str | None,
    step: int,
) -> None:
    """Write a diffusers folder at the run's root: the base with the newly trained weights.

    An earlier result is in its place until this one is complete, see ``staging``.
    """
    index = {k: v for k, v in base.configs.model_index.items() if k != "_name_or_path"}
    with staging(run, "full", step) as stage:
        for name in list_components(index):
            if name not in family.components and not is_copyable(base, name):
                index[name] = [None, None]
                continue
            folder = stage / name
            folder.mkdir()
            if name == base.trained_component:
                write_json(folder / "config.json", base.configs[name])
                safetensors.write_arrays(folder / WEIGHTS_FILE, dict(arrays))
            elif name == "scheduler":
                library, class_name = index[name][:2]
                scheduler = adapt_scheduler(base.configs[name], class_name, prediction_type)
                index[name] = [library, scheduler["_class_name"]]
                write_json(folder / "scheduler_config.json", scheduler)
            else:
                copy_component(base, name, folder)
        write_json(stage / INDEX, index)


def write_lora(
    base: BaseModel,
    family: Family,
    run: Path,
    arrays: Mapping[str, np.ndarray],
    adapter: AdapterSettings,
    step: int,
) -> None:
    """Write ``pytorch_lora_weights.safetensors`` at the run's root.

    Names are those of PEFT, e.g. ``unet.mid_block...to_q.lora_A.weight``. Its alpha is equal to
    its rank, as whoever reads the arrays without the header takes it to be.
    """
    needed = sum(array.nbytes for array in arrays.values())
    header = layout.lora_header(replace(adapter, alpha=None), family)
    with staging(run, "lora", step) as stage, atomic.disk_errors(run / LORA_FILE, needed):
        safetensors.write_arrays(stage / LORA_FILE, fold_scale(arrays, adapter), header)


def fold_scale(arrays: Mapping[str, np.ndarray], adapter: AdapterSettings) -> dict[str, np.ndarray]:
    """Return a LoRA's arrays with alpha / rank multiplied into each ``lora_B``, float32."""
    scale = np.float32(get_alpha(adapter) / adapter.rank)
    return {
        name: array * scale if scale != 1 and name.endswith(".lora_B.weight") else array
        for name, array in arrays.items()
    }


def is_result_whole(run: Path, step: int | None = None) -> bool:
    """Return whether the result (of this step) exists, with every file as it was written."""
    try:
        result = read_result(run)
        if step not in (None, result["step"]):
            return False
        return all(is_unchanged(run / name, file) for name, file in result["files"].items())
    except (OSError, IntegrityError):
        return False


def check_result_of_run(folder: Path) -> None:
    """Refuse the result of a run that is not whole; nothing is known of another folder's files.

    Raises:
        IntegrityError: for a run's folder with files of a result that are not as they were written,
            as when the writing of a result was cut short.
    """
    has_result = (folder / INDEX).exists() or (folder / LORA_FILE).exists()
    if has_result and is_run(folder) and not is_result_whole(folder):
        raise IntegrityError(
            f"{folder}: the result of this run is not whole: {RESULT_FILE} is missing, or a file "
            "is not as it was written. Run the training command again: a finished run only writes "
            "its result anew. To draw with these files as they are, move them without the run's "
            "config.json, and give the base of a LoRA with --base."
        )


def is_run(folder: Path) -> bool:
    """Return whether a run has kept its settings in a folder."""
    try:
        settings = read_object(RunFolder(folder).config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "run" in settings and "train" in settings


def is_unchanged(path: Path, file: FileRecord) -> bool:
    """Return whether a file has the size and the digest with which it was written."""
    return path.stat().st_size == file["size"] and atomic.digest_file(path) == file["xxh3_128"]


def read_result(run: Path) -> ResultRecord:
    """Read ``result.json``.

    Raises:
        IntegrityError: when it is missing, damaged or changed.
    """
    try:
        result: Any = read_object(RunFolder(run).result.read_text(encoding="utf-8"))
        atomic.check_entries(result["files"])
        digest = atomic.digest_json([result["step"], result["kind"], result["files"]])
        if result["digest"] != digest or not isinstance(result["step"], int):
            raise ValueError("changed since it was written")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise IntegrityError(
            f"{run}: there is no whole result ({RESULT_FILE} is missing or damaged). Run the "
            "training command again: a finished run only writes its result anew."
        ) from error
    return cast(ResultRecord, result)


@contextlib.contextmanager
def staging(run: Path, kind: str, step: int) -> Iterator[Path]:
    """Yield an empty folder beside the result; what is in it at the end becomes the result.

    Until it is complete, and when the block raises, the earlier result stays as it is.
    """
    stage = atomic.name_temporary(run / "result", "tmp")
    with atomic.disk_errors(run):
        shutil.rmtree(stage, ignore_errors=True)
        atomic.make_folder(stage)
        try:
            yield stage
            files = seal_result(stage, kind, step)
            atomic.flush(stage)
            install_result(stage, run, files)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def install_result(stage: Path, run: Path, files: Mapping[str, FileRecord]) -> None:
    """Let what is new take the place of what is old, one name after another, ``result.json`` last.

    When the disk refuses, or the run is interrupted, what was done is undone.
    """
    names = sorted({name.split("/")[0] for name in files}, key=lambda name: name == INDEX)
    changed = [name for name in names if not is_same(stage / name, run / name, files)]
    moved: dict[str, int] = {}  # name -> inode of what is new
    old = stage / f"old-{RESULT_FILE}"
    try:
        # A mixture of two results must not look whole.
        if (run / RESULT_FILE).exists():
            os.rename(run / RESULT_FILE, old)
            atomic.sync(run)
        for name in changed:
            moved[name] = (stage / name).stat().st_ino
            swap(stage / name, run / name)
        atomic.sync(run)
        os.replace(stage / RESULT_FILE, run / RESULT_FILE)
        atomic.sync(run)
    except BaseException:
        if (stage / RESULT_FILE).exists():  # else the new result is whole
            for name in reversed(moved):
                swap_back(stage / name, run / name, moved[name])
            if old.exists():
                os.replace(old, run / RESULT_FILE)
        raise


def swap(new: Path, final: Path) -> None:
    """Let a file or folder take a name, and what had it, if anything, the other one."""
    if not final.exists():
        os.rename(new, final)
    elif not atomic.exchange(new, final):
        aside = name_aside(new)
        os.rename(final, aside)
        os.rename(new, final)
        os.rename(aside, new)


def swap_back(new: Path, final: Path, inode: int) -> None:
    """Undo a swap, wherever it was interrupted.

    Args:
        inode: of what was ``new`` before the swap.
    """
    if final.exists() and final.stat().st_ino == inode:
        if new.exists():
            swap(new, final)
        else:
            os.rename(final, new)
    if name_aside(new).exists() and not final.exists():
        os.rename(name_aside(new), final)


def name_aside(new: Path) -> Path:
    """Return where what had a name is while another takes it, and the system cannot exchange."""
    return new.with_name(f"{new.name}.old")


def is_same(new: Path, present: Path, files: Mapping[str, FileRecord]) -> bool:
    """Return whether a file or folder of a result is there already, whatever it was written by."""
    if new.is_file():
        return present.is_file() and is_unchanged(present, files[new.name])
    if not present.is_dir() or {p.name for p in present.iterdir()} != set(list_files(new)):
        return False
    return all(is_unchanged(present / n, files[f"{new.name}/{n}"]) for n in list_files(new))


def seal_result(stage: Path, kind: str, step: int) -> dict[str, FileRecord]:
    """Write ``result.json`` beside the files of a result, and return their sizes and digests."""
    files: dict[str, FileRecord] = {}
    for path in sorted(path for path in stage.rglob("*") if path.is_file()):
        name = path.relative_to(stage).as_posix()
        files[name] = {"size": path.stat().st_size, "xxh3_128": atomic.digest_file(path)}
    result: ResultRecord = {
        "step": step,
        "kind": kind,
        "files": files,
        "digest": atomic.digest_json([step, kind, files]),
    }
    text = json.dumps(result, indent=1)
    (stage / RESULT_FILE).write_text(text, encoding="utf-8")
    return files


def is_copyable(base: BaseModel, name: str) -> bool:
    """Return whether the base has this component, and has its weights, if any, as safetensors."""
    names = list_files(base.component_folder(name))
    return bool(names) and (not has_weights(names) or base.has_usable_weights(name))


def copy_component(base: BaseModel, name: str, target: Path) -> None:
    """Copy one component of the base into an empty folder."""
    source = base.component_folder(name)
    names = list_files(source)
    for file in names:
        if file.endswith(".json") and ".index." not in file:
            copy_json(source / file, target / file)
        elif file.endswith((".txt", ".model")):
            shutil.copyfile(source / file, target / file)
    if has_weights(names):
        copy_weights(base.weight_files(name), target, base.component_class(name)[0])


def copy_json(source: Path, target: Path) -> None:
    """Copy a file of JSON; a config loses the path from which it was once loaded."""
    try:
        value = parse_json(source.read_text(encoding="utf-8"))
    except ValueError:
        # Whatever else lies in the base's folder; the component's own config has been read.
        value = None
    if isinstance(value, dict) and "_name_or_path" in value:
        write_json(target, value)
    else:
        shutil.copyfile(source, target)


def write_json(path: Path, config: Mapping[str, object]) -> None:
    """Write a component's config without the path from which it was once loaded."""
    shown = {name: value for name, value in config.items() if name != "_name_or_path"}
    path.write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")


def copy_weights(paths: Sequence[Path], target: Path, library: str) -> None:
    """Copy a component's weight files; names lose their variant, shards get a new index."""
    stem = STEMS.get(library) or get_stem(paths[0].name)
    shards: dict[str, str] = {}  # name of an array -> its file
    for path in paths:
        shard = re.search(r"-\d{5}-of-\d{5}", path.name)
        is_usual = WEIGHTS_NAME.fullmatch(path.name) is not None
        name = f"{stem}{shard[0] if shard else ''}.safetensors" if is_usual else path.name
        shutil.copyfile(path, target / name)
        if shard or not is_usual:
            shards |= dict.fromkeys(sorted(safetensors.read_header(path).arrays), name)
    if shards:
        total_size = sum(path.stat().st_size for path in paths)
        index = {"metadata": {"total_size": total_size}, "weight_map": shards}
        write_json(target / f"{stem}.safetensors.index.json", index)
