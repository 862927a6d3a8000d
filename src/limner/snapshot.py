"""A run's state in a checkpoint folder: which arrays lie in which file, under the names that stock
diffusers loads."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from limner import checkpoint, config
from limner.checkpoint import Checkpoint
from limner.engine import Group
from limner.family import Family

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def file_of(group: str, adapt: config.Adapt, family: Family) -> str:
    """The file of a group of arrays: ``model`` and ``ema`` where diffusers users look for them."""
    if adapt.kind == "lora":
        return {"model": LORA, "ema": f"ema/{LORA}"}.get(group, f"{group}.safetensors")
    return {"model": f"{family.trains}/{WEIGHTS}", "ema": f"{family.trains}_ema/{WEIGHTS}"}.get(
        group, f"{group}.safetensors"
    )


def lora_metadata(adapt: config.Adapt, family: Family) -> dict[str, str]:
    """Rank, alpha and targets in the header of a LoRA file, as diffusers writes and reads them."""
    alpha = adapt.rank if adapt.alpha is None else adapt.alpha
    told: dict[str, Any] = {}
    for component in family.learns(adapt.text_encoders):
        modules = (
            adapt.targets
            if adapt.targets and component == family.trains
            else family.lora[component]
        )
        settings = {
            "r": adapt.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "target_modules": sorted(modules),
        }
        told |= {f"{component}.{key}": value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(told, sort_keys=True)}


def save(
    root: Path,
    step: int,
    groups: Iterable[tuple[str, Group]],
    state: dict[str, Any],
    cfg: config.Config,
    family: Family,
    trained: dict[str, Any],
) -> Path:
    """Write the checkpoint of ``step``; ``trained`` is the config.json of the trained component."""

    def files() -> Iterator[tuple[str, Group, dict[str, str]]]:
        for group, arrays in groups:
            lora = cfg.adapt.kind == "lora" and group in ("model", "ema")
            yield (
                file_of(group, cfg.adapt, family),
                arrays,
                lora_metadata(cfg.adapt, family) if lora else {},
            )

    def finish(folder: Path) -> None:
        for component in (family.trains, f"{family.trains}_ema"):
            if (folder / component).is_dir():
                (folder / component / "config.json").write_text(json.dumps(trained, indent=2))

    return checkpoint.save(root, step, files(), state, keep=cfg.checkpoint.keep, finish=finish)


def reader(found: Checkpoint, adapt: config.Adapt, family: Family) -> Callable[[str], Group]:
    """The inverse of ``save``: arrays of a group by the engine's names."""

    return lambda group: found.arrays(file_of(group, adapt, family))


def result_group(found: Checkpoint, adapt: config.Adapt, family: Family) -> str:
    """Which group of a checkpoint is the result: the average, where one was kept."""
    return "ema" if (found.folder / file_of("ema", adapt, family)).exists() else "model"
