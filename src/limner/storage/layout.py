"""Where a run's state lies in a checkpoint, under the file names of stock diffusers."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from limner.config.schema import AdapterSettings, Config
from limner.families.family import Family
from limner.json_types import Plain
from limner.protocols import Arrays
from limner.storage import checkpoint
from limner.storage.checkpoint import Checkpoint
from limner.storage.run_state import RunState

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"


def file_name(group: str, adapter: AdapterSettings, family: Family) -> str:
    """Return the file of a group of arrays; diffusers loads those of ``model`` and ``ema``."""
    if adapter.kind == "lora":
        files = {"model": LORA_FILE, "ema": f"ema/{LORA_FILE}"}
    else:
        component = family.network.component
        files = {
            "model": f"{component}/{WEIGHTS_FILE}",
            "ema": f"{component}_ema/{WEIGHTS_FILE}",
        }
    return files.get(group, f"{group}.safetensors")


def target_modules(adapter: AdapterSettings, family: Family, component: str) -> tuple[str, ...]:
    """Return the last parts of the names of a component's modules that have adapters."""
    if adapter.targets and component == family.network.component:
        return adapter.targets
    return family.lora_targets[component]


def lora_header(adapter: AdapterSettings, family: Family) -> dict[str, str]:
    """Return a LoRA file's metadata: rank, alpha and targets, as diffusers has them."""
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    metadata: Plain = {}
    for component in family.trained_components(adapter.text_encoders):
        metadata[f"{component}.r"] = adapter.rank
        metadata[f"{component}.lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
        metadata[f"{component}.target_modules"] = sorted(target_modules(adapter, family, component))
    return {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)}


def save_groups(
    root: Path,
    step: int,
    groups: Iterable[tuple[str, Arrays]],
    state: RunState,
    config: Config,
    family: Family,
    trained: Plain,
) -> Path:
    """Write the checkpoint of a step.

    Args:
        groups: of arrays, as the engine's ``snapshot`` yields them.
        trained: the config of the trained component.
    """

    def name_files() -> Iterator[tuple[str, Arrays, dict[str, str]]]:
        for group, arrays in groups:
            has_header = config.adapter.kind == "lora" and group in ("model", "ema")
            header = lora_header(config.adapter, family) if has_header else {}
            yield file_name(group, config.adapter, family), arrays, header

    def write_configs(folder: Path) -> None:
        for component in (family.network.component, f"{family.network.component}_ema"):
            if (folder / component).is_dir():
                (folder / component / "config.json").write_text(json.dumps(trained, indent=2))

    plain, keep = state.to_plain(), config.checkpoint.keep
    return checkpoint.save(root, step, name_files(), plain, keep=keep, finish=write_configs)


def array_reader(
    saved: Checkpoint, adapter: AdapterSettings, family: Family
) -> Callable[[str], Arrays]:
    """Return a function that reads the arrays of a group, by the engine's names."""
    return lambda group: saved.arrays(file_name(group, adapter, family))


def result_group(saved: Checkpoint, adapter: AdapterSettings, family: Family) -> str:
    """Return the group of arrays that is the result: the moving average where there is one."""
    return "ema" if (saved.folder / file_name("ema", adapter, family)).exists() else "model"
