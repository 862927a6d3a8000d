"""A run's state in a checkpoint folder: which arrays lie in which file, under the names that stock
diffusers loads."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from limner.config.schema import AdapterSettings, Config
from limner.families.family import Family
from limner.protocols import Arrays
from limner.storage import checkpoint
from limner.storage.checkpoint import Checkpoint

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"


def file_name(group: str, adapter: AdapterSettings, family: Family) -> str:
    """The file of a group of arrays: ``model`` and ``ema`` where diffusers users look for them."""
    if adapter.kind == "lora":
        return {"model": LORA_FILE, "ema": f"ema/{LORA_FILE}"}.get(group, f"{group}.safetensors")
    return {
        "model": f"{family.trained_component}/{WEIGHTS_FILE}",
        "ema": f"{family.trained_component}_ema/{WEIGHTS_FILE}",
    }.get(group, f"{group}.safetensors")


def lora_header(adapter: AdapterSettings, family: Family) -> dict[str, str]:
    """Rank, alpha and targets in the header of a LoRA file, as diffusers writes and reads them."""
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    told: dict[str, Any] = {}
    for component in family.trained_components(adapter.text_encoders):
        modules = (
            adapter.targets
            if adapter.targets and component == family.trained_component
            else family.lora_targets[component]
        )
        settings = {
            "r": adapter.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "target_modules": sorted(modules),
        }
        told |= {f"{component}.{key}": value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(told, sort_keys=True)}


def save_groups(
    root: Path,
    step: int,
    groups: Iterable[tuple[str, Arrays]],
    state: dict[str, Any],
    config: Config,
    family: Family,
    trained: dict[str, Any],
) -> Path:
    """Write the checkpoint of ``step``; ``trained`` is the config.json of the trained component."""

    def files() -> Iterator[tuple[str, Arrays, dict[str, str]]]:
        for group, arrays in groups:
            lora = config.adapter.kind == "lora" and group in ("model", "ema")
            yield (
                file_name(group, config.adapter, family),
                arrays,
                lora_header(config.adapter, family) if lora else {},
            )

    def finish(folder: Path) -> None:
        for component in (family.trained_component, f"{family.trained_component}_ema"):
            if (folder / component).is_dir():
                (folder / component / "config.json").write_text(json.dumps(trained, indent=2))

    return checkpoint.save(root, step, files(), state, keep=config.checkpoint.keep, finish=finish)


def array_reader(
    found: Checkpoint, adapter: AdapterSettings, family: Family
) -> Callable[[str], Arrays]:
    """The inverse of ``save``: arrays of a group by the engine's names."""

    return lambda group: found.arrays(file_name(group, adapter, family))


def result_group(found: Checkpoint, adapter: AdapterSettings, family: Family) -> str:
    """Which group of a checkpoint is the result: the average, where one was kept."""
    return "ema" if (found.folder / file_name("ema", adapter, family)).exists() else "model"
