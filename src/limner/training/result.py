"""Write the result of a run: a diffusers folder or a LoRA file."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from limner.base_model.base import INDEX, BaseModel
from limner.base_model.weight_files import has_usable_weights, has_weights, list_files
from limner.config import toml
from limner.config.schema import AdapterSettings, Config
from limner.errors import IntegrityError
from limner.families.family import Family
from limner.storage import atomic, layout, safetensors
from limner.storage.checkpoint import Checkpoint
from limner.storage.layout import LORA_FILE, WEIGHTS_FILE
from limner.storage.run_folder import CARD_FILE, GRID_FILE, RESULT_FILE
from limner.training.model_card import write_model_card

PREDICTS_SAMPLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def write_result(
    found: Checkpoint, config: Config, base: BaseModel, family: Family, predict: str
) -> None:
    """The result of a run from its last checkpoint, the moving average where one was kept, unless
    it is there already; and its model card."""
    run = Path(config.run)
    if not is_result_whole(run, found.step):
        arrays = layout.array_reader(found, config.adapter, family)(
            layout.result_group(found, config.adapter, family)
        )
        if config.adapter.kind == "lora":
            write_lora(base, family, run, arrays, config.adapter, found.step)
        else:
            write_full(base, family, run, arrays, predict, found.step)
    card = write_model_card(
        toml.to_plain(config),
        base,
        family,
        found.step,
        prompts=config.preview.prompts,
        repo=config.export.hub,
        grid=(run / GRID_FILE).is_file(),
    )
    atomic.write_text(run / CARD_FILE, card)


def write_full(
    base: BaseModel,
    family: Family,
    run: Path,
    arrays: Mapping[str, np.ndarray],
    predict: str,
    step: int,
) -> None:
    """Write a diffusers folder at the run's root: the base's components, with the trained one's new
    weights.

    Killed at any moment and called again it completes; until then there is no ``model_index.json``
    and no ``result.json``.
    """
    invalidate_result(run)
    index = {k: v for k, v in base.configs["model_index"].items() if k != "_name_or_path"}
    files = []
    for name in [k for k, v in index.items() if not k.startswith("_") and isinstance(v, list)]:
        if index[name][1] is None:
            continue
        if name not in family.components and not is_copyable(base, name):
            index[name] = [None, None]
            continue
        with atomic.write_folder(run / name, manifest=False) as path:
            if name == base.trained_component:
                write_json(path / "config.json", base.configs[name])
                safetensors.write_arrays(path / WEIGHTS_FILE, dict(arrays))
            elif name == "scheduler":
                changed = export_scheduler(base.configs[name], index[name][1], predict)
                index[name] = [index[name][0], changed.get("_class_name", index[name][1])]
                write_json(path / "scheduler_config.json", changed)
            else:
                copy_component(base, name, path)
        files += [f"{name}/{file}" for file in list_files(run / name)]
    atomic.write_text(run / INDEX, json.dumps(index, indent=2) + "\n")
    seal_result(run, "full", step, [INDEX, *files])


def write_lora(
    base: BaseModel,
    family: Family,
    run: Path,
    arrays: Mapping[str, np.ndarray],
    adapter: AdapterSettings,
    step: int,
) -> None:
    """Write ``pytorch_lora_weights.safetensors`` at the run's root; names as PEFT has them, e.g.
    ``unet.mid_block...to_q.lora_A.weight``."""
    invalidate_result(run)
    temporary = run / f".{LORA_FILE}.{os.getpid()}.tmp"
    with atomic.disk_errors(run / LORA_FILE, sum(a.nbytes for a in arrays.values())):
        safetensors.write_arrays(temporary, dict(arrays), layout.lora_header(adapter, family))
        atomic.sync(temporary)
        os.replace(temporary, run / LORA_FILE)
        atomic.sync(run)
    seal_result(run, "lora", step, [LORA_FILE])


def is_result_whole(run: Path, step: int | None = None) -> bool:
    """Whether the result (of this step) is there, every file of it as it was written."""
    try:
        found = read_result(run)
        return step in (None, found["step"]) and all(
            (run / n).stat().st_size == f["size"] and atomic.digest_file(run / n) == f["xxh3_128"]
            for n, f in found["files"].items()
        )
    except (OSError, IntegrityError):
        return False


def read_result(run: Path) -> dict[str, Any]:
    """``result.json``: step, kind (full or lora), and size and digest of every file."""
    try:
        found = json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
        files = found["files"]
        if (
            found["digest"] != atomic.digest_json([found["step"], found["kind"], files])
            or not files
        ):
            raise ValueError("changed since it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{run}: there is no whole result ({RESULT_FILE} is missing or damaged). Run the "
            "training "
            "command again: a finished run only writes its result anew."
        ) from error
    return found


def invalidate_result(run: Path) -> None:
    """Take away what calls an earlier result whole, before a file of it changes."""
    for name in (RESULT_FILE, INDEX):
        with atomic.disk_errors(run / name):
            (run / name).unlink(missing_ok=True)
    if run.is_dir():
        atomic.sync(run)


def seal_result(run: Path, kind: str, step: int, names: Sequence[str]) -> None:
    """Declare the result whole."""
    files = {
        name: {"size": (run / name).stat().st_size, "xxh3_128": atomic.digest_file(run / name)}
        for name in sorted(names)
    }
    atomic.write_text(
        run / RESULT_FILE,
        json.dumps(
            {
                "step": step,
                "kind": kind,
                "files": files,
                "digest": atomic.digest_json([step, kind, files]),
            },
            indent=1,
        ),
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A component's config without the path it was once loaded from."""
    path.write_text(
        json.dumps({k: v for k, v in value.items() if k != "_name_or_path"}, indent=2) + "\n",
        encoding="utf-8",
    )


def is_copyable(base: BaseModel, name: str) -> bool:
    """Whether a component beyond the family's own is there, without weights or with safetensors
    ones."""
    names = list_files(base.component_folder(name))
    return bool(names) and (not has_weights(names) or has_usable_weights(name, names, base.variant))


def copy_component(base: BaseModel, name: str, target: Path) -> None:
    """Copy one component of the base; weight files lose the infix of their variant."""
    source = base.component_folder(name)
    for file in list_files(source):
        if file.endswith(".json") and ".index." not in file:
            value = json.loads((source / file).read_text(encoding="utf-8"))
            write_json(target / file, value) if isinstance(
                value, dict
            ) and "_name_or_path" in value else shutil.copyfile(source / file, target / file)
        elif file.endswith((".txt", ".model")):
            shutil.copyfile(source / file, target / file)
    weights = base.weight_files(name) if has_weights(list_files(source)) else []
    shards: dict[str, str] = {}
    for path in weights:
        shard = re.search(r"-\d{5}-of-\d{5}", path.name)
        plain = re.split(r"[.-]", path.name)[0] + (shard[0] if shard else "") + ".safetensors"
        shutil.copyfile(path, target / plain)
        if shard:
            with safe_open(path, "np") as opened:
                shards |= dict.fromkeys(opened.keys(), plain)
    if shards:
        stem = weights[0].name.split(".")[0].split("-")[0]
        write_json(
            target / f"{stem}.safetensors.index.json",
            {
                "metadata": {"total_size": sum(p.stat().st_size for p in weights)},
                "weight_map": shards,
            },
        )


def export_scheduler(found: Mapping[str, Any], cls: str, predict: str) -> dict[str, Any]:
    """The base's scheduler config, telling what was trained; DDIM where the base's own sampler
    cannot use it."""
    if predict == found.get("prediction_type", "epsilon"):
        return dict(found)
    if predict != "sample" or cls in PREDICTS_SAMPLE:
        return {**found, "prediction_type": predict}
    kept = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "steps_offset",
        "set_alpha_to_one",
        "timestep_spacing",
        "rescale_betas_zero_snr",
        "_diffusers_version",
    )
    return {
        "_class_name": "DDIMScheduler",
        **{k: found[k] for k in kept if k in found},
        "clip_sample": False,
        "prediction_type": predict,
    }
